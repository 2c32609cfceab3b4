"""Models of transformers that train something else than they seem to, and adapters: what is refused at the
coordinator, what goes on from a folder and comes out as peft reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_model import save_tiny_llama
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.messages import digest_of
from thinwire.node.config import RunConfig, parse_config
from thinwire.node.genesis import initialise, layout_of, make_genesis, public_config
from thinwire.node.tasks.base import Mergeable, Pretrained
from thinwire.node.tasks.registry import make_task

pytest.importorskip("transformers", reason="the hf task is an extra")
pytest.importorskip("peft", reason="the hf task is an extra")
pytest.importorskip("datasets", reason="the hf task is an extra")

from thinwire.node.tasks import hf_adapters, hf_model

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "llama"
    save_tiny_llama(folder)
    return folder


def saved(folder: Path, kind: str, **options: Any) -> Path:
    """A model of this type with fresh weights, as transformers saves it."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = hf_model.build(hf_model.read_architecture(folder), None)
    return hf_model.read_weights(folder, model)


def run_of(model: Path, tokenizer: Path, **task: Any) -> RunConfig:
    """The tokenizer of one folder for the model of another."""
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, model) if model != tokenizer else None
    (model.parent / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    options = {"model": str(model), "corpus": str(model.parent / "text.txt"), "context": 8, "held_out": 2}
    strategy = {"name": "decoupled", "compressor": {"name": "dense"}}
    return RunConfig.model_validate({"task": {"name": "hf", **options, **task}, "strategy": strategy})


def on_a_node(run: RunConfig) -> tuple[torch.nn.Module, Any, RunConfig]:
    """The model as a node builds it from record 0 and the base weights, and its task."""
    genesis = make_genesis(run, make_task(run.task, None, None), "x", 1)
    config = parse_config(genesis.body.config)
    task = make_task(config.task, None, None)
    model = task.model()
    assert layout_of(model, task) == genesis.body.layout
    initialise(model, genesis.body, 1, genesis.blobs[0])
    assert genesis.body.held_out is not None
    held_out = next(b for b in genesis.blobs if digest_of(b) == genesis.body.held_out.digest)
    return model.eval(), (task, held_out), config


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20, 30)[None], use_cache=False).logits


# ------------------------------------------------------------------------------------------- foresight


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", SMALL),
        ("roberta", {**SMALL, "pad_token_id": 1}),
        ("roformer", {**SMALL, "embedding_size": 16}),
        ("xlm", {"emb_dim": 16, "n_layers": 2, "n_heads": 2}),
    ],
)
def test_an_encoder_that_sees_the_next_token_is_refused(
    tmp_path: Path, kind: str, options: Mapping[str, Any]
) -> None:
    folder = saved(tmp_path / kind, kind, vocab_size=64, max_position_embeddings=64, **options)
    with pytest.raises(ConfigError, match="sees the token that it is to predict"):
        weights_of(folder)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {**SMALL, "is_decoder": True}),
        ("mixtral", {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}),
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    ],
)
def test_a_causal_model_is_taken(tmp_path: Path, kind: str, options: Mapping[str, Any]) -> None:
    weights_of(saved(tmp_path / kind, kind, vocab_size=64, max_position_embeddings=64, **options))


def test_a_head_that_differs_from_the_embeddings_it_is_said_to_be_tied_to_is_refused(
    tmp_path: Path, llama: Path
) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"] + 1
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lm_head\.weight would be lost.*tie_word_embeddings.*false"):
        weights_of(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert torch.equal(weights_of(folder)["lm_head.weight"], head)


# -------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("mixtral", {"r": 2, "targets": ["all-linear"]}),
        ("llama", {"r": 2, "targets": ["lm_head", "q_proj"]}),
        ("llama", {"r": 2, "targets": ["embed_tokens"]}),
        ("llama", {"r": 2, "targets": ["q_proj", "down_proj"], "kind": "hadamard"}),
    ],
    ids=["experts", "tied head", "embeddings", "FedPara"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning")
def test_adapters_are_what_the_coordinator_built_and_go_out_and_come_back(
    tmp_path: Path, llama: Path, kind: str, lora: dict[str, Any]
) -> None:
    import peft
    import transformers

    options = {
        "vocab_size": 400,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "tie_word_embeddings": True,
    }
    folder = saved(tmp_path / kind, kind, max_position_embeddings=64, **SMALL, **options)
    model, (task, held_out), config = on_a_node(run_of(folder, llama, lora=lora))
    before = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.allclose(logits_of(before), logits_of(model), atol=1e-5), "they add nothing at first"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if hf_adapters.is_adapter(name):
                p.add_(torch.linspace(-0.2, 0.3, p.numel()).view(p.shape))
    assert isinstance(task, Pretrained)
    task.export(model, held_out, tmp_path / "out")
    task.export(model, held_out, tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert torch.allclose(logits_of(reloaded), logits_of(model), atol=1e-5)

    run = run_of(folder, llama, adapter=str(tmp_path / "out"))
    on, _, config_on = on_a_node(run)
    assert config_on.task.lora == config.task.lora
    assert torch.equal(logits_of(on), logits_of(model))
    assert str(tmp_path) not in public_config(run, make_task(run.task, None, None)).to_json()

    # peft 0.21.2: merged by its own merge_and_unload, what adapts a tied matrix is in both of its uses.
    expected = logits_of(model)
    assert isinstance(task, Mergeable)
    task.export_merged(model, held_out, tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits_of(whole.eval()), expected, atol=1e-5)
    with torch.no_grad():
        for name, p in on.named_parameters():
            p.fill_(torch.nan if hf_adapters.is_adapter(name) else 1.0)
    with pytest.raises(ConfigError, match=r"off by nan\): export without --merged"):
        task.export_merged(on, held_out, tmp_path / "not whole")
    assert not (tmp_path / "not whole").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "its use_dora is 'True'"),
        ({"peft_type": "IA3"}, "IA3 adapters"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": "two"}, r"adapter_config\.json"),
        ({"target_modules": ["k_proj"]}, "it has no .*k_proj|no place for its"),
        ({"r": 4}, "the model wants"),
    ],
)
def test_adapters_that_training_cannot_go_on_from_are_named(
    tmp_path: Path, llama: Path, settings: dict[str, Any], message: str
) -> None:
    model, (task, held_out), _ = on_a_node(run_of(llama, llama, lora={"r": 2, "targets": ["q_proj"]}))
    task.export(model, held_out, tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    run = run_of(llama, llama, adapter=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=message):
        make_genesis(run, make_task(run.task, None, None), "x", 1)


def test_products_of_two_products_are_of_linear_layers(llama: Path) -> None:
    run = run_of(llama, llama, lora={"kind": "hadamard", "parameters": ["gate_up_proj"]})
    with pytest.raises(ConfigError, match="knows linear layers alone"):
        make_task(run.task, None, None).model()


def test_a_run_without_new_keys_of_adapters_writes_none(tmp_path: Path, llama: Path) -> None:
    run = run_of(llama, llama, lora={"r": 2, "targets": ["q_proj"]})
    public = json.loads(public_config(run, make_task(run.task, None, None)).to_json())
    assert public["task"]["lora"] == {"r": 2, "alpha": 16.0, "targets": ["q_proj"]}
    assert "adapter" not in public["task"]
