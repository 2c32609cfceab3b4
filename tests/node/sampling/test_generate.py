"""`thinwire generate`: text from exports, files of weights and snapshots, against the model itself."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.local_nodes import DECOUPLED, config_of, swarm_of
from tests.support.paths import ROOT
from tests.support.tiny_model import save_tiny_llama
from thinwire.coordinator.protocol.messages import BlobRef
from thinwire.node.cli.ledger_command import write_export
from thinwire.node.cli.main import main
from thinwire.node.config import RunConfig
from thinwire.node.runner import Runner
from thinwire.node.tasks.gpt import ByteGPT

CONFIG = config_of(DECOUPLED, rounds=4, verify_every=2, snapshot_every=2, min_peers=1)
SPSA = {"name": "spsa", "lr": 1e-2, "eps": 1e-2, "probes": 2}
GOLDEN = ROOT / "tests" / "golden" / "state"
KEYS = ("layers", "width", "heads", "context", "batch", "held_out_bytes")
RUN = "\n".join(["[task]", *(f"{key} = {getattr(CONFIG.task, key)}" for key in KEYS)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a node of a finished run has: an export in `out`, snapshots below `node`."""
    folder = tmp_path_factory.mktemp("trained")
    with swarm_of(folder / "swarm", CONFIG) as swarm:
        runner = Runner(swarm.link("one"), folder=folder / "node")
        runner.run()
        write_export(folder / "out", runner.replica, runner.work.task, runner.genesis, blob_of(runner))
    return folder


def blob_of(runner: Runner) -> Callable[[BlobRef], bytes]:
    return lambda ref: runner.link.fetch(ref.digest, ref.n_bytes)


def generated(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert main(["generate", *map(str, args), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def likeliest(weights: Path, prompt: bytes, n: int) -> str:
    """By the model alone, without any of the code that is tested."""
    o = CONFIG.task
    model = ByteGPT(o.layers, o.width, o.heads, o.context)
    model.load_state_dict(load_file(weights))
    text = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            text.append(int(model(torch.tensor([text[-o.context :]]))[0, -1].argmax()))
    return bytes(text[len(prompt) :]).decode(errors="replace")


def test_an_export_and_a_file_of_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "The longer a prompt, the less of it is seen."
    wanted = likeliest(trained / "out" / "model.safetensors", prompt.encode(), 30)
    args = ("--prompt", prompt, "--tokens", 30, "--temperature", 0)
    found = generated(capsys, trained / "out", *args)
    assert found == {"prompt": prompt, "text": wanted, "tokens": 30, "seed": 0}
    assert generated(capsys, trained / "out" / "model.safetensors", *args) == found
    assert main(["generate", str(trained / "out"), *map(str, args)]) == 0
    assert capsys.readouterr().out == f"{prompt}{wanted}\n"


def test_a_snapshot_or_a_bare_file(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What says no model is told one."""
    snapshots = sorted((trained / "node" / "snapshots").glob("0*"))
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN)
    wanted = likeliest(trained / "out" / "model.safetensors", b"x", 12)
    args = ("--prompt", "x", "--tokens", 12, "--temperature", 0)
    found = generated(capsys, snapshots[-1], *args, "--run", run_file)
    assert found["text"] == wanted, "the newest one is that of the last round"
    bare = tmp_path / "weights.safetensors"
    save_file(load_file(trained / "out" / "model.safetensors"), bare)
    assert main(["generate", str(bare)]) == 2
    assert "name its run file with --run" in capsys.readouterr().err
    assert generated(capsys, bare, *args, "--run", run_file)["text"] == wanted


def test_a_state_folder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A coordinator's, replayed; a snapshot in a state folder needs nobody to say what it is."""
    wanted = likeliest(trained / "out" / "model.safetensors", b"x", 12)
    args = ("--prompt", "x", "--tokens", 12, "--temperature", 0)
    assert generated(capsys, trained / "swarm", *args)["text"] == wanted
    run = tmp_path / "run"
    shutil.copytree(trained / "swarm", run)
    shutil.copytree(trained / "node" / "snapshots", run / "snapshots")
    newest = sorted((run / "snapshots").glob("0*"))[-1]
    assert generated(capsys, newest, *args)["text"] == wanted
    assert generated(capsys, GOLDEN / "coordinator", *args)["tokens"] == 12
    assert main(["generate", str(GOLDEN / "node")]) == 2
    assert "has no record 0" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [None, {"r": 2, "alpha": 4.0}])
def test_a_state_folder_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: dict[str, float] | None
) -> None:
    """Says what the same run's export says."""
    pytest.importorskip("datasets", reason="the hf task is an extra")
    pytest.importorskip("peft", reason="the hf task is an extra")
    save_tiny_llama(tmp_path / "model")
    plain = config_of(SPSA, rounds=2, verify_every=2, snapshot_every=2, min_peers=1).model_dump()
    task = {"name": "hf", "model": str(tmp_path / "model"), "context": 16, "batch": 2, "held_out": 4}
    config = RunConfig.model_validate({**plain, "task": {**task, "lora": lora}})
    with swarm_of(tmp_path / "swarm", config) as swarm:
        runner = Runner(swarm.link("one"), folder=tmp_path / "node")
        runner.run()
        write_export(tmp_path / "out", runner.replica, runner.work.task, runner.genesis, blob_of(runner))
    args = ("--prompt", "An assignment", "--tokens", 20, "--temperature", 0)
    base = () if lora is None else ("--base", tmp_path / "model")
    exported = generated(capsys, tmp_path / "out", *args, *base)
    assert generated(capsys, tmp_path / "swarm", *args) == exported
    assert exported["tokens"] == 20


def test_a_seed_decides(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        generated(capsys, trained / "out", "--tokens", 40, "--temperature", 1.5, "--seed", seed)["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by an old name
def test_models_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against transformers' own generation; adapters need their model."""
    pytest.importorskip("transformers", reason="the hf task is an extra")
    peft = pytest.importorskip("peft", reason="the hf task is an extra")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder, prompt = tmp_path / "model", "An assignment \u00e9"
    save_tiny_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    adapter = tmp_path / "adapter"
    adapted.peft_config["default"].base_model_name_or_path = "run"
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    tokenizer.save_pretrained(adapter)
    ids = tokenizer(prompt, return_tensors="pt")
    args = ("--prompt", prompt, "--tokens", 20, "--temperature", 0)
    for source, oracle, more in ((folder, model, ()), (adapter, adapted, ("--base", folder))):
        whole = oracle.generate(**ids, max_new_tokens=20, do_sample=False)[0]
        new = whole[ids["input_ids"].shape[1] :]
        wanted = tokenizer.decode([t for t in new.tolist() if t != tokenizer.eos_token_id])
        assert generated(capsys, source, *args, *more)["text"] == wanted
    assert main(["generate", str(adapter)]) == 2
    assert "--base DIR" in capsys.readouterr().err
    assert generated(capsys, folder, "--tokens", 500)["tokens"] <= 64, "no more than the model takes"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("none",), "none: no such file or folder"),
        ((".",), "no weights in it"),
        (("bad.safetensors", "--run", "run.toml"), "cannot be read as safetensors"),
        (("other.safetensors", "--run", "run.toml"), "are missing or of another shape"),
        (("other.safetensors", "--tokens", "0"), "--tokens: at least 1"),
        (("other.safetensors", "--temperature", "nan"), "--temperature: a number from 0"),
        (("nan.safetensors", "--run", "run.toml"), "not finite"),
    ],
)
def test_refusals(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04nothing")
    save_file({"w": torch.zeros(3)}, tmp_path / "other.safetensors")
    weights = load_file(trained / "out" / "model.safetensors")
    save_file({k: t * float("nan") for k, t in weights.items()}, tmp_path / "nan.safetensors")
    assert main(["generate", *args]) == 2
    assert message in capsys.readouterr().err
