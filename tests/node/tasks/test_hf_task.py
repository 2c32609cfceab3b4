"""The task `hf`: tiny models, made here; replicas, base weights, tokens, prompts and what a user is told."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.local_nodes import KEY, Meddled, Steady, in_background, newest_attested, run_all, wait_for
from tests.support.tiny_model import save_tiny_llama
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.ledger_file import write_ledger
from thinwire.coordinator.protocol.messages import digest_of
from thinwire.node import config
from thinwire.node.cli.ledger_command import export_state
from thinwire.node.cli.replay import replay
from thinwire.node.config import RunConfig, load_config, parse_config
from thinwire.node.genesis import base_bytes, make_genesis, public_config
from thinwire.node.links.local import LocalSwarm, local_swarm
from thinwire.node.runner import Result, Runner
from thinwire.node.tasks.registry import make_task

pytest.importorskip("transformers", reason="the hf task is an extra")
pytest.importorskip("peft", reason="the hf task is an extra")
pytest.importorskip("datasets", reason="the hf task is an extra")

from thinwire.node.tasks import hf_adapters, hf_data, hf_model
from thinwire.node.tasks.classes import Piece
from thinwire.node.tasks.hf_data import Prompts, Stream, Tokenizer
from thinwire.node.tasks.hf_task import HfTask

LORA = {"r": 2, "alpha": 4.0}
STRATEGIES: dict[str, dict[str, Any]] = {
    "spsa": {"name": "spsa", "lr": 1e-3, "eps": 1e-2, "probes": 2},
    "decoupled": {"name": "decoupled", "lr": 1e-2, "beta": 0.9, "compressor": {"name": "dense"}},
}
PROMPT = {"prompt": "{text} It was", "labels": {"0": " terrible", "1": " great"}}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights in bfloat16, embeddings tied, with a tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-llama"
    save_tiny_llama(folder)
    return folder


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """JSONL with a text and a label that the text gives away."""
    path = tmp_path / "reviews.jsonl"
    words = (("awful", "poor", "dull"), ("lovely", "fine", "superb"))
    rows = [{"text": f"A {words[i % 2][i % 3]} film, number {i}.", "label": i % 2} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_of(model: Path, corpus: Path, strategy: str, rounds: int = 8, **task: Any) -> RunConfig:
    options = {"model": str(model), "corpus": str(corpus), "context": 16, "batch": 2, "held_out": 4, **task}
    return RunConfig.model_validate(
        {
            "run": {
                "rounds": rounds,
                "min_peers": 2,
                "eval_every": 4,
                "verify_every": 2,
                "snapshot_every": 2,
            },
            "task": {"name": "hf", **options},
            "strategy": STRATEGIES[strategy],
            "schedule": {"warmup_rounds": 0},
            "policy": {"name": "all"},
            "network": {"heartbeat_s": 0.2},
        }
    )


def task_of(model: Path, corpus: Path, **options: Any) -> HfTask:
    return HfTask(run_of(model, corpus, "spsa", **options).task, None)


@contextmanager
def swarm_of(folder: Path, run: RunConfig) -> Iterator[LocalSwarm]:
    genesis = make_genesis(run, make_task(run.task, None, None), peer_id_of(KEY.public_key()), 1)
    folder.mkdir()
    with local_swarm(folder, genesis.body, KEY, blobs=genesis.blobs) as swarm:
        yield swarm


def plain_weights(runner: Runner) -> dict[str, torch.Tensor]:
    """What a replica has beside its adapters, by transformers' own names."""
    weights = runner.replica.weights()
    return {hf_model.plain_name(n): w for n, w in weights.items() if not hf_adapters.is_adapter(n)}


# ----------------------------------------------------------------------------------------------- swarms


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "all"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_late_joiner_ends_equal_and_only_what_is_trained_changes(
    tmp_path: Path,
    tiny_llama: Path,
    documents: Path,
    strategy: str,
    lora: dict[str, Any] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With dense payloads the joiner takes a snapshot; a frozen base comes beside it."""
    caplog.set_level(logging.INFO, logger="thinwire.node")
    run = run_of(tiny_llama, documents, strategy, rounds=10, lora=lora)
    with swarm_of(tmp_path / "run", run) as swarm:
        reached, release = threading.Event(), threading.Event()

        def hold(_runner: Runner) -> None:
            reached.set()
            assert release.wait(60)

        early = [Steady(swarm.link("peer-0")), Steady(swarm.link("peer-1"), {7: hold})]
        thread, results = in_background(early)
        assert reached.wait(60)
        wait_for(lambda: newest_attested(swarm) >= 4)
        late = Meddled(swarm.link("peer-2"), {7: lambda _: release.set()})
        results += run_all([late])
        thread.join(100)
    assert len(results) == 3
    assert len({r.fingerprint for r in results}) == 1
    took_snapshot = any("took the replica" in r.getMessage() for r in caplog.records)
    # Payloads of spsa are smaller than a snapshot of all weights, not than one of small adapters.
    assert took_snapshot == ((strategy, lora) != ("spsa", None))
    runners = [*early, late]
    base = load_file(tiny_llama / "model.safetensors")
    if lora is not None:
        assert all(r.replica.has_frozen for r in runners)
        for runner in runners:
            weights = plain_weights(runner)
            assert weights.pop("lm_head.weight").equal(weights["model.embed_tokens.weight"]), "they are tied"
            assert all(torch.equal(w, base[name].float()) for name, w in weights.items())
    first = runners[0].replica.weights()
    for runner in runners[1:]:
        assert all(torch.equal(w, first[name]) for name, w in runner.replica.weights().items())
    trained = {n: w for n, w in first.items() if n != "lm_head.weight"}  # tied to the embeddings
    changed = [n for n in trained if hf_adapters.is_adapter(n) or lora is None]
    start = make_genesis(run, make_task(run.task, None, None), "x", 1).body
    assert len(changed) == (8 if lora else len(start.layout))
    assert all(float(w.abs().sum()) > 0 for n, w in first.items() if ".lora_B." in n)


def test_classification_by_label_words_learns(
    tmp_path: Path, tiny_llama: Path, documents: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And says how often it is right."""
    run = run_of(
        tiny_llama,
        documents,
        "decoupled",
        rounds=60,
        **PROMPT,
        loss="candidates",
        context=48,
        batch=8,
        held_out=16,
    )
    with swarm_of(tmp_path / "run", run) as swarm:
        runners = [Runner(swarm.link(f"peer-{i}")) for i in range(2)]
        results = run_all(runners)
        status = swarm.call(lambda service, now_s: service.status(now_s))
    assert len({r.fingerprint for r in results}) == 1
    losses = [loss for _, loss in status["held_out"]]
    assert losses[0] == pytest.approx(np.log(2), abs=0.2)
    assert losses[-1] < 0.35
    caplog.set_level(logging.INFO, logger="thinwire.node")
    caplog.clear()
    assert runners[0].work.evaluate() == pytest.approx(losses[-1])
    (told,) = [r.args for r in caplog.records if "held-out accuracy" in r.msg]
    assert isinstance(told, tuple)
    assert told[1] >= 15  # type: ignore[operator]  # of 16


def test_the_run_is_replayed_from_its_ledger_and_the_folder(
    tmp_path: Path, tiny_llama: Path, documents: Path
) -> None:
    run = run_of(tiny_llama, documents, "spsa", rounds=4, lora=LORA)
    with swarm_of(tmp_path / "run", run) as swarm:
        live = run_all([Runner(swarm.link(f"peer-{i}")) for i in range(2)])
        link = swarm.link("reader")
        welcome = link.open()
        path = tmp_path / "run.ledger"
        write_ledger(path, welcome.genesis, welcome.signature, link.records(0), lambda _digest: None)
        link.close()
    with pytest.raises(ConfigError, match="or the folder of the model that it began with"):
        replay(path)
    replayed = replay(path, base=tiny_llama)
    assert replayed is not None
    assert replayed.fingerprint == live[0].fingerprint
    assert replayed.differing == 0


RUN = """
[run]
name = "tiny"
rounds = 100000
min_peers = 1
verify_every = 2
[task]
name = "hf"
model = "model"
corpus = "pydoc"
context = 16
batch = 2
held_out = 4
lora = { r = 2 }
[strategy]
name = "decoupled"
[network]
heartbeat_s = 0.5
"""


@pytest.mark.swarm
@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_processes_train_and_export_without_the_folder(
    thinwire: Callable[..., Any], here: Callable[..., Any], tmp_path: Path, tiny_llama: Path
) -> None:
    """Only the coordinator sees the model's folder, when it begins the run."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "run.toml").write_text(RUN)
    ticket = thinwire("coordinator", "run.toml", "--host", "127.0.0.1").first_line(100)
    shutil.rmtree(tmp_path / "model")
    node = thinwire("join", ticket, "--threads", "1")
    node.wait_for("round 4/", 100)
    code, _, said = here("export", ticket, "-o", str(tmp_path / "adapter"))
    assert code == 0, said
    node.process.send_signal(signal.SIGINT)
    assert node.wait() == 130, node.stderr()
    _export_from_the_folder_of_a_node_that_left(node.stderr(), tmp_path / "offline")
    online, offline = ({p.name for p in (tmp_path / f).iterdir()} for f in ("adapter", "offline"))
    assert online == offline
    tokenizers = [(tmp_path / f / "tokenizer.json").read_bytes() for f in ("adapter", "offline")]
    assert tokenizers[0] == tokenizers[1]
    assert not list((tmp_path / "adapter").glob(".*")), "nothing is left of what was written aside"
    about = json.loads((tmp_path / "adapter" / "thinwire.json").read_text())
    assert about["round"] >= 4
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert {
        n.rpartition(".lora_")[0] for n, _ in adapted.named_parameters() if hf_adapters.is_adapter(n)
    } == {f"base_model.model.model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}
    assert any(float(p.detach().abs().sum()) > 0 for n, p in adapted.named_parameters() if ".lora_B." in n)


def _export_from_the_folder_of_a_node_that_left(said: str, output: Path) -> None:
    """Its last line names the folder, which has the base weights and the tokenizer, too."""
    last = said.rstrip().splitlines()[-1]
    found = re.search(
        r"the replica after round (\d+) .* are saved in (\S+)\. The same thinwire join command", last
    )
    assert found is not None, last
    export_state(Path(found[2]), output, None)
    about = json.loads((output / "thinwire.json").read_text())
    assert about["round"] >= int(found[1]), "its ledger may have one more record than it has applied"


# ------------------------------------------------------------------------------------ model and weights


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("lora", [None, config.Lora(targets=("all-linear",))], ids=["all", "lora"])
def test_what_a_node_builds_from_record_0_computes_what_transformers_does(
    tmp_path: Path, kind: str, lora: config.Lora | None
) -> None:
    """Buffers that no file holds (rotary frequencies, masks), ties and merged experts included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    widths: dict[str, dict[str, int]] = {
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
        "opt": {
            "hidden_size": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 16,
        },
        "mixtral": {"num_local_experts": 2},
    }
    like_llama = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    sizes = widths[kind] if kind in ("gpt2", "opt") else {**like_llama, **widths.get(kind, {})}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **sizes))
    made.save_pretrained(tmp_path)
    architecture = hf_model.read_architecture(tmp_path)
    with torch.device("meta"):
        layout = hf_model.build(architecture, lora)
    weights = hf_model.read_weights(tmp_path, layout)
    model = hf_model.build(architecture, lora).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights.get(name, torch.zeros(())))
        ids = torch.arange(3, 20)[None]
        expected = made.eval()(input_ids=ids, use_cache=False).logits
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_base_weights_travel_in_the_type_that_holds_them(tiny_llama: Path, documents: Path) -> None:
    task = task_of(tiny_llama, documents)
    with torch.device("meta"):
        model = task.model()
    base = task.base(model)
    assert {t.dtype for t in base.values()} == {torch.bfloat16}
    assert digest_of(base_bytes(base)) == digest_of(base_bytes(task.base_in(tiny_llama, model)))
    odd = torch.tensor([1.0, 1.0 + 2**-20, -0.0])
    assert hf_model.compact(odd).dtype == torch.float32
    assert hf_model.compact(odd[[0, 2]]).dtype == torch.bfloat16
    assert hf_model.compact(torch.tensor([1.0 + 2**-10])).dtype == torch.float16
    assert hf_model.compact(torch.tensor([2.0**-30, 1.0 + 2**-10])).dtype == torch.float32


def test_record_0_says_all_that_a_node_needs_and_no_path(tiny_llama: Path, documents: Path) -> None:
    run = run_of(tiny_llama, documents, "decoupled", lora=LORA)
    body = make_genesis(run, make_task(run.task, None, None), "x", 1).body
    assert str(tiny_llama.parent) not in body.config
    assert str(documents.parent) not in body.config
    options = json.loads(body.config)["task"]
    assert options["lora"]["targets"] == ["q_proj", "v_proj"]
    assert json.loads(options["architecture"])["model_type"] == "llama"
    there = parse_config(body.config)
    task = make_task(run.task, None, None)
    assert public_config(there, task) == there == public_config(run, task), "the same run, started again"
    other = run.model_copy(update={"task": run.task.model_copy(update={"context": 17})})
    assert public_config(other, make_task(other.task, None, None)) != there
    rules = {e.name.rpartition("layers.0.")[2]: (e.init, e.scale) for e in body.layout}
    assert rules["self_attn.q_proj.lora_A.default.weight"] == ("normal", pytest.approx((3 * 32) ** -0.5))
    assert rules["self_attn.q_proj.lora_B.default.weight"] == ("zeros", 0.0)


# peft asks transformers for something by its old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("form", ["transformers", "peft"])
def test_an_export_loads_in_its_own_library(
    tmp_path: Path, tiny_llama: Path, documents: Path, form: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = run_of(tiny_llama, documents, "decoupled", rounds=2, lora=LORA if form == "peft" else None)
    with swarm_of(tmp_path / "run", run) as swarm:
        runners = [Runner(swarm.link(f"peer-{i}")) for i in range(2)]
        run_all(runners)
        body = runners[0].genesis
        assert body.held_out is not None
        held_out = swarm.blobs.read(body.held_out.digest)
    folder = tmp_path / "exported"
    folder.mkdir()
    trained = runners[0].replica.model.eval()
    task = runners[0].work.task
    assert isinstance(task, HfTask)
    task.export(trained, held_out, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer("a fine film").input_ids
        == AutoTokenizer.from_pretrained(tiny_llama)("a fine film").input_ids
    )
    assert tokenizer.eos_token == "</s>"
    if form == "peft":
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, folder).eval()
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        found = loaded(input_ids=ids, use_cache=False).logits
        assert torch.equal(found, trained(input_ids=ids, use_cache=False).logits)


# ------------------------------------------------------------------------------------------------- tokens


def test_documents_are_packed_with_an_end_between_them_and_cut_into_windows(
    tiny_llama: Path, documents: Path
) -> None:
    task = task_of(tiny_llama, documents)
    tokens, held_out, tokenizer = task._both
    assert isinstance(tokens, Stream)
    assert isinstance(held_out, Stream)
    lines = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    whole = [i for ids in tokenizer.documents(lines) for i in ids]
    assert whole.count(1) == 60, "an end after each"
    assert np.concatenate([tokens.ids, held_out.ids]).tolist() == whole
    assert held_out.windows(16) == 4
    corpus, held = hf_data.from_bytes(task.corpus()), hf_data.from_bytes(task.held_out())
    assert isinstance(corpus[0], Stream)
    assert np.array_equal(corpus[0].ids, tokens.ids)
    assert corpus[1] is None
    assert held[1] == tokenizer.to_json()
    n = tokens.windows(16)
    rows = [hf_task_windows(tokens, i) for i in range(n)]
    assert [r[-1] for r in rows[:-1]] == [r[0] for r in rows[1:]], (
        "each token but the first is predicted once"
    )


def test_text_is_divided_by_sections_and_examples_by_label(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    task = task_of(tiny_llama, documents)
    whole = np.concatenate([tokens.ids for tokens in task._both[:2]])  # type: ignore[union-attr]
    classes = task.divide(3)
    held, _ = hf_data.from_bytes(task.held_out())
    assert isinstance(held, Stream)
    assert held.windows(16) == 4
    assert sum(classes.sizes) + len(held.ids) == len(whole)
    middle, _ = hf_data.from_bytes(classes.taken([Piece(1, 5, 25)]))
    first = len(whole) // 3 + 5
    assert middle.ids.tolist() == whole[first : first + 20].tolist()

    rows = [{"text": f"film {i}", "label": i % 3 == 0} for i in range(30)]
    path = tmp_path / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    labels = {"true": " great", "false": " terrible"}
    task = task_of(tiny_llama, path, prompt="{text} It was", labels=labels, held_out=6)
    classes = task.divide(3)
    assert classes.names == ("true", "false")
    assert sum(classes.sizes) == 24
    some, _ = hf_data.from_bytes(classes.taken([Piece(1, 1, 4)]))
    assert isinstance(some, Prompts)
    assert some.answers.tolist() == [1, 1, 1]
    assert classes.held_out == task.held_out()


def hf_task_windows(stream: Stream, i: int) -> list[int]:
    from thinwire.node.tasks.hf_task import _windows

    found: list[int] = _windows(stream, [i], 16)[0].tolist()
    return found


def test_a_batch_counts_its_tokens_and_repeats_its_bits(tiny_llama: Path, documents: Path) -> None:
    for options in ({}, {**PROMPT, "context": 48}):
        task = task_of(tiny_llama, documents, **options)
        task.load(task.corpus(), task.held_out())
        model = task.model().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.01)
        closure = task.draw(model, 5)
        assert torch.equal(closure(), closure())
        assert closure().ndim == 0
        if options:
            rows = task._tokens
            assert isinstance(rows, Prompts)
            sizes = {len(rows.row(e, int(rows.answers[e]))[0]) for e in range(len(rows.answers))}
            assert 2 * min(sizes) <= task.n_tokens <= 2 * max(sizes)
        else:
            assert task.n_tokens == 2 * 16


@pytest.mark.parametrize("loss", ["words", "candidates"])
def test_the_loss_of_a_prompt_is_that_of_the_label_s_words_alone(
    tiny_llama: Path, documents: Path, loss: str
) -> None:
    """Against the plain computation: one row at a time, without padding."""
    from transformers import AutoModelForCausalLM

    task = task_of(
        tiny_llama, documents, **PROMPT, loss=loss, context=48, batch=5, held_out=7, held_out_from="end"
    )
    task.load(task.corpus(), task.held_out())
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokenizer = Tokenizer.of(tiny_llama)
    lines = [json.loads(line) for line in documents.read_text().splitlines()][-7:]
    losses, n_right = [], 0
    with torch.no_grad():
        for line in lines:
            scores = []
            for words in PROMPT["labels"].values():  # type: ignore[attr-defined]
                prompt = tokenizer._rules.encode(line["text"] + " It was").ids
                ids = prompt + tokenizer._rules.encode(words).ids
                log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
                of_words = [log_p[i - 1, ids[i]] for i in range(len(prompt), len(ids))]
                scores.append(torch.stack(of_words).mean())
            answer = line["label"]
            n_right += int(torch.stack(scores).argmax()) == answer
            whole = torch.stack(scores).log_softmax(dim=0)
            losses.append(float(-(whole if loss == "candidates" else torch.stack(scores))[answer]))
        assert task.evaluate(model) == pytest.approx(np.mean(losses), rel=1e-5)


def test_long_prompts_lose_their_beginning_and_never_their_words(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(
        "".join(json.dumps({"text": "far too long " * 40, "label": i % 2}) + "\n" for i in range(6))
    )
    task = task_of(tiny_llama, path, **PROMPT, held_out=2)
    tokens = task._both[0]
    assert isinstance(tokens, Prompts)
    ids, first = tokens.row(1, 1)
    assert len(ids) == 17
    assert ids[first:].tolist() == Tokenizer.of(tiny_llama)._rules.encode(" great").ids


def test_a_node_s_own_documents_stay_with_it(tmp_path: Path, tiny_llama: Path, documents: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("the same words " * 200)
    run = run_of(tiny_llama, documents, "spsa", rounds=2)
    results: list[Result]
    with swarm_of(tmp_path / "run", run) as swarm:
        runners = [Runner(swarm.link("peer-0"), data=own), Runner(swarm.link("peer-1"))]
        results = run_all(runners)
    assert len({r.fingerprint for r in results}) == 1
    task = runners[0].work.task
    assert isinstance(task, HfTask)
    assert isinstance(task._tokens, Stream)
    assert task._tokens.ids.tolist() == Tokenizer.of(tiny_llama).documents([own.read_text()])[0]


def test_a_folder_that_datasets_reads(
    tmp_path: Path, tiny_llama: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = [json.loads(line) for line in documents.read_text().splitlines()]
    parts = {"train": rows[:40], "validation": rows[40:]}
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()})
    made.save_to_disk(str(tmp_path / "set"))
    plain = task_of(tiny_llama, documents, **PROMPT, context=48, held_out=20, held_out_from="end")
    task = task_of(
        tiny_llama, tmp_path / "set", **PROMPT, context=48, held_out=20, held_out_split="validation"
    )
    assert task.corpus() == plain.corpus()
    assert task.held_out() == plain.held_out()


def test_a_file_without_splits_is_not_evaluated_on_what_it_trains(tiny_llama: Path, documents: Path) -> None:
    split = {**PROMPT, "context": 48, "held_out": 20}
    plain = task_of(tiny_llama, documents, **split)
    assert task_of(tiny_llama, documents, **split, held_out_split="").held_out() == plain.held_out()
    for corpus in (documents, Path("pydoc")):
        with pytest.raises(ConfigError, match=r"held_out_split: .+ has no splits; leave it out"):
            task_of(tiny_llama, corpus, context=48, held_out_split="validation").held_out()


def test_slices_of_a_file_are_trained_on_and_held_out(tiny_llama: Path, documents: Path) -> None:
    slices = {**PROMPT, "context": 48, "held_out": 20, "split": "train[:40]"}
    task = task_of(tiny_llama, documents, **slices, held_out_split="train[40:]")
    end = task_of(tiny_llama, documents, **{**slices, "split": "train", "held_out_from": "end"})
    assert (task.corpus(), task.held_out()) == (end.corpus(), end.held_out())
    with pytest.raises(ConfigError, match=r"it has what task\.split 'train\[:40\]' has"):
        task_of(tiny_llama, documents, **slices, held_out_split="train").held_out()


def test_held_out_examples_are_drawn_so_that_a_sorted_file_does_no_harm(
    tiny_llama: Path, documents: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same ones for every run; and a label that is not among them is said."""
    lines = sorted(documents.read_text().splitlines(), key=lambda line: json.loads(line)["label"])
    documents.write_text("\n".join(lines))
    drawn, again, end = (
        task_of(tiny_llama, documents, **PROMPT, context=48, held_out=16, held_out_from=which)
        for which in (None, "shuffled", "end")
    )
    tokens, held_out, _ = drawn._both
    assert isinstance(tokens, Prompts)
    assert isinstance(held_out, Prompts)
    assert set(held_out.answers) == {0, 1}
    assert len(held_out.answers) == 16
    assert drawn.held_out() == again.held_out()
    assert not caplog.records
    rows = {
        tuple(part.row(e, c)[0].tolist())
        for part in (tokens, held_out)
        for e in range(len(part.answers))
        for c in (0, 1)
    }
    assert len(rows) == 120, "every example is in one of both"
    assert all(
        part.row(e, 1)[0][part.row(e, 1)[1] :].tolist() == part.row(0, 1)[0][part.row(0, 1)[1] :].tolist()
        for part in (tokens, held_out)
        for e in range(len(part.answers))
    )
    end.held_out()
    assert "none of the 16 examples held out has the label '0'" in caplog.text
    assert drawn.public(drawn.options) == end.public(end.options), "record 0 has the examples themselves"


def test_the_held_out_data_say_how_much_text_a_token_is(
    tmp_path: Path, tiny_llama: Path, documents: Path
) -> None:
    """Measured on what is held out, so that a loss is known in bits per byte; the coordinator shows it."""
    with documents.open("a") as file:  # the end is longer per token than the beginning
        file.write(json.dumps({"text": " great terrible" * 40}) + "\n")
    task = task_of(tiny_llama, documents)
    _, held_out, tokenizer = task._both
    assert isinstance(held_out, Stream)
    text = tokenizer._rules.decode(held_out.ids.tolist(), skip_special_tokens=True)
    assert held_out.bytes_per_token == pytest.approx(len(text) / len(held_out.ids), rel=0.05)
    assert task.loss_unit == "nats/token"
    with swarm_of(tmp_path / "run", run_of(tiny_llama, documents, "spsa")) as swarm:
        status = swarm.call(lambda service, now_s: service.status(now_s))
        page = swarm.call(lambda service, now_s: service.overview(now_s))
    for told in (status, page):
        assert told["loss_unit"] == "nats/token"
        assert told["bytes_per_token"] == pytest.approx(held_out.bytes_per_token, abs=1e-4)
    assert hf_data.from_bytes(task.held_out())[1] == tokenizer.to_json(), "older nodes read it too"
    # safetensors 0.8 writes several notes in another order each time; record 0 names these bytes by digest.
    (header,) = struct.unpack_from("<Q", task.held_out())
    assert len(json.loads(task.held_out()[8 : 8 + header])["__metadata__"]) == 1


def test_empty_documents_are_counted_and_left_out(
    tiny_llama: Path, documents: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = task_of(tiny_llama, documents, **PROMPT, context=48)
    whole = task_of(tiny_llama, documents)
    expected = [full.corpus(), whole.corpus()]
    with documents.open("a") as file:
        file.write('{"text": " ", "label": 0}\n{"text": "", "label": 1}\n')
    for options, blob in zip(({**PROMPT, "context": 48}, {}), expected, strict=True):
        caplog.clear()
        assert task_of(tiny_llama, documents, **options).corpus() == blob
        assert "2 of 62 documents are empty and left out; the first: " in caplog.text
        assert "reviews.jsonl, line 61" in caplog.text


def test_prompts_that_lose_their_beginning_are_counted(
    tiny_llama: Path, documents: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task_of(tiny_llama, documents, **PROMPT, context=12).corpus()
    assert "prompts are longer than task.context = 12 and lost their beginning" in caplog.text


# --------------------------------------------------------------------------------------------------- chats

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
)


@pytest.fixture
def chatty(tmp_path: Path, tiny_llama: Path) -> Path:
    """The tiny model, with a chat template beside its tokenizer, as transformers saves it."""
    folder = tmp_path / "chatty"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def chats(folder: Path, *roles: str) -> Path:
    path = folder / "chats.jsonl"
    messages = [{"role": role, "content": f"I am {role}."} for role in roles]
    path.write_text((json.dumps({"messages": messages}) + "\n") * 9)
    return path


def test_chats_become_text_by_the_model_s_own_template(tmp_path: Path, chatty: Path) -> None:
    from transformers import AutoTokenizer

    corpus = chats(tmp_path, "user", "assistant")
    task = task_of(chatty, corpus, field="messages")
    tokens, held_out, tokenizer = task._both
    assert isinstance(tokens, Stream)
    assert isinstance(held_out, Stream)
    library = AutoTokenizer.from_pretrained(chatty)
    messages = json.loads(corpus.read_text().splitlines()[0])["messages"]
    wanted = library.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert [*tokens.ids, *held_out.ids] == wanted * 9, "the special tokens of the template, no others"
    tokenizer.save(tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.chat_template == TEMPLATE, "who uses the model later has it"
    with pytest.raises(
        ConfigError, match=r"has no 'text'; its fields are messages.*It is a chat: set task.field"
    ):
        task_of(chatty, corpus).corpus()


def test_a_chat_that_cannot_be_written_is_named(tmp_path: Path, chatty: Path, tiny_llama: Path) -> None:
    corpus = chats(tmp_path, "user", "tool")
    with pytest.raises(ConfigError, match=r"chats\.jsonl, line 1: the chat template refuses it: no tools"):
        task_of(chatty, corpus, field="messages").corpus()
    with pytest.raises(ConfigError, match="line 1: a chat, but the model's tokenizer has no chat template"):
        task_of(tiny_llama, corpus, field="messages").corpus()


def test_a_node_runs_no_template_that_came_over_the_network(tmp_path: Path, chatty: Path) -> None:
    corpus = chats(tmp_path, "user", "assistant")
    task = task_of(chatty, corpus, field="messages")
    blobs = task.corpus(), task.held_out()
    node = HfTask(task.public(task.options), corpus)
    with pytest.raises(ConfigError, match="line 1: chats are made text by the coordinator only"):
        node.load(*blobs)
    told = json.dumps({**json.loads(task._both[2].to_json()), "chats": True})
    with pytest.raises(ConfigError, match="by the coordinator only"):
        Tokenizer.from_json(told).chat([{"role": "user", "content": "x"}], "here")


# ------------------------------------------------------------------------------------- what a user is told


def changed(folder: Path, target: Path, **keys: Any) -> Path:
    """A copy of a model's folder with other entries in its config.json."""
    shutil.copytree(folder, target)
    found = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**found, **keys}))
    return target


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, "has auto_map.*thinwire runs none"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights are quantised"),
        ({"model_type": "never_heard_of"}, "'never_heard_of' is no causal language model"),
        ({"model_type": "bert-generation-of-mine"}, "no causal language model"),
    ],
)
def test_a_model_that_is_not_transformers_own_is_refused(
    tmp_path: Path, tiny_llama: Path, documents: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(changed(tiny_llama, tmp_path / "model", **keys), documents)


@pytest.mark.parametrize(
    "keys",
    [
        {"auto_map": {"AutoConfig": "x.Y"}},
        {"text_config": {"_attn_implementation": "somebody/kernel"}},
        {"attn_implementation": "somebody/kernel"},
        {"experts_implementation": "somebody/kernel"},
    ],
)
def test_a_node_refuses_a_record_0_that_names_code(tiny_llama: Path, keys: dict[str, Any]) -> None:
    architecture = json.loads(hf_model.read_architecture(tiny_llama))
    options = config.Task(name="hf", model="run", architecture=json.dumps({**architecture, **keys}))
    with pytest.raises(ConfigError, match=f"has {next(iter(keys))[:4]}|has _attn_implementation"):
        HfTask(options, None)


def test_a_node_opens_no_path_that_a_run_names(tmp_path: Path, tiny_llama: Path, documents: Path) -> None:
    """Whatever `model` and `corpus` say beside an architecture, nobody looks."""
    task = task_of(tiny_llama, documents)
    gone = {"model": str(tmp_path / "gone"), "corpus": str(tmp_path / "gone")}
    options = task.public(task.options).model_copy(update=gone)
    node = HfTask(options, None)
    node.model()
    with pytest.raises(ConfigError, match="no tokens to train on"):
        node.load(None, None)
    with pytest.raises(ConfigError, match="architecture is written by the coordinator"):
        node.corpus()


def test_pickles_and_folders_without_weights_are_refused(
    tmp_path: Path, tiny_llama: Path, documents: Path
) -> None:
    folder = changed(tiny_llama, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no safetensors file"):
        task_of(folder, documents)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin only, a pickle"):
        task_of(folder, documents)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        task_of(tmp_path, documents)


def test_weights_of_another_shape_are_refused(tmp_path: Path, tiny_llama: Path, documents: Path) -> None:
    task = task_of(changed(tiny_llama, tmp_path / "model", intermediate_size=50), documents)
    with torch.device("meta"):
        model = task.model()
    with pytest.raises(ConfigError, match=r"cannot be loaded|no fitting weights"):
        task.base(model)


@pytest.mark.parametrize("what", ["model", "corpus"])
def test_without_a_network_it_says_what_to_do(
    tiny_llama: Path, documents: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    wrong = {"model": "nobody/nothing"} if what == "model" else {"corpus": "nobody/nothing"}
    options = run_of(tiny_llama, documents, "spsa").task.model_copy(update=wrong)
    with pytest.raises(ConfigError, match=rf"task\.{what} nobody/nothing.*hf download.*give .*folder"):
        HfTask(options, None).corpus()


def test_a_missing_extra_is_named(tiny_llama: Path, documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_model, "find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(ConfigError, match=r"peft cannot be imported here: pip install 'thinwire\[hf\]'"):
        task_of(tiny_llama, documents)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"field": "body"},
            r"task.field: .*reviews\.jsonl, line 1 has no 'body'; its fields are label, text",
        ),
        ({"prompt": "{text} It was"}, "belong together"),
        ({**PROMPT, "labels": {"0": " bad", "1": " bad"}}, "two labels have the same words"),
        ({**PROMPT, "labels": {"0": " bad"}}, "at least two"),
        ({**PROMPT, "labels": {"0": " bad", "2": " good"}}, "line 2 has label '1'; there are 0, 2"),
        ({**PROMPT, "labels": {"0": "", "1": " good"}}, "'' makes no token"),
        ({**PROMPT, "prompt": "It was"}, "no field in it"),
        (
            {**PROMPT, "prompt": "{body} It was"},
            r"task.prompt: .*line 1 has no 'body'; its fields are label, t",
        ),
        ({**PROMPT, "prompt": "{text It was"}, "'{' at character 1 of '{text It was' has no other half"),
        ({**PROMPT, "label_field": "text"}, "has label 'A awful film"),
        ({"context": 65}, "takes at most 64 tokens"),
        ({"held_out": 10**6}, "too few to hold out"),
        ({"corpus": "/nowhere/at-all.jsonl"}, "no such file or folder"),
        ({"lora": {"targets": ["nothing"]}}, "Name some of the model's linear layers: .*q_proj"),
    ],
)
def test_wrong_options_are_named(
    tiny_llama: Path, documents: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_genesis(
            RunConfig(task=run_of(tiny_llama, documents, "spsa").task),
            task_of(tiny_llama, **{"corpus": documents, **options}),
            "x",
            1,
        )


def test_a_word_that_the_tokenizer_does_not_know_is_named() -> None:
    from tokenizers import Tokenizer as Rules
    from tokenizers import models, pre_tokenizers

    rules = Rules(models.WordLevel({"[UNK]": 0, "It": 1, "was": 2, "great": 3}, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(rules.to_str(), None, {"unk_token": "[UNK]"})
    assert tokenizer.prompt("It was", " great") == ([1, 2, 3], 2)
    with pytest.raises(ConfigError, match="does not know ' terrible'"):
        tokenizer.prompt("It was", " terrible")


def test_an_unknown_option_of_a_table_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'task\.lora\.alfa'; did you mean 'alpha'"):
        load_config(None, {"task.lora": {"alfa": 1}}, environ={})


def test_options_of_another_task_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.layers is an option of the task 'text'"):
        make_task(config.Task(name="hf", model="x", layers=5), None, None)
    with pytest.raises(ConfigError, match=r"task\.model is an option of the task 'hf'.*task\.name"):
        make_task(config.Task(model="x"), None, None)
