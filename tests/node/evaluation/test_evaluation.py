"""Evaluations beside training: real processes on exported weights; one that fails or hangs costs nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from tests.support.local_nodes import DECOUPLED, config_of, swarm_of, wait_for
from tests.support.tiny_model import save_tiny_llama
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.messages import MAX_TEXT, as_text
from thinwire.node.cli.view import evaluations_in_words
from thinwire.node.config import Eval, RunConfig, load_config, parse_config
from thinwire.node.evaluation.job import LM_EVAL, BadResult, Job, figures_of, read_result
from thinwire.node.evaluation.process import write_export
from thinwire.node.evaluation.supervising import Evaluations, Outcome, _message, refuse_function
from thinwire.node.runner import Runner
from thinwire.node.tracking.jsonl import JsonLines
from thinwire.node.tracking.metrics import NodeMetrics
from thinwire.node.tracking.trackers import Tracks

SPSA = {"name": "spsa", "lr": 1e-2, "eps": 1e-2, "probes": 2}
MODULE = """
import json, os, subprocess, sys, time

def score(folder):
    about = json.loads((folder / "config.json").read_text())
    print("noise " * 100)
    n_bytes = (folder / "model.safetensors").stat().st_size
    return {"round": about["round"], "bytes": n_bytes, "nice": os.nice(0)}

def fails(folder):
    raise ValueError("no such data set")

def hangs(folder):
    for session in (False, True):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=session)
    time.sleep(600)

def leaves(folder):
    daemon = subprocess.Popen(["sleep", "60"], start_new_session=True)
    return {"daemon": daemon.pid}

def strange(folder):
    return {"loss": float("nan")}

def dies(folder):
    os.kill(os.getpid(), 9)
"""


def config(function: str, **eval_: Any) -> RunConfig:
    plain = config_of(DECOUPLED, rounds=5, verify_every=5, snapshot_every=5, min_peers=1, eval_every=5)
    return plain.model_copy(update={"eval": Eval(function=function, every=2, **eval_)})


def idle() -> bool:
    return not any(thread.name == "evaluation" for thread in threading.enumerate())


class Trained:
    """A run of one node with evaluations, to its end."""

    def __init__(self, folder: Path, run: RunConfig, function: str) -> None:
        assert run.eval is not None
        self.metrics = NodeMetrics()
        self.folder = folder / "node"
        self.folder.mkdir()
        (self.folder / ".evaluation-of-a-killed-node").mkdir()
        tracks = Tracks(self.metrics, JsonLines(self.folder))
        evaluations = Evaluations(function, self.folder, tracks, self.metrics, None)
        with swarm_of(folder / "swarm", run) as swarm:
            runner = Runner(
                swarm.link("one"),
                metrics=self.metrics,
                evaluations=evaluations,
                on_proposing=lambda _runner: wait_for(idle),
            )
            self.result = runner.run()
            evaluations.finish(runner.prepared, lambda: False)
            evaluations.close()
            self.status = swarm.call(lambda service, now_s: service.status(now_s))
        tracks.close()

    def tracked(self) -> list[dict[str, Any]]:
        lines = (self.folder / "track.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["kind"] == "evaluation"]

    def counted(self, result: str) -> float:
        value = self.metrics.registry.get_sample_value("thinwire_evaluations_total", {"result": result})
        assert value is not None
        return value


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The user's module, in the working directory as theirs is."""
    (tmp_path / "my_scores.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return lambda name: f"my_scores:{name}"


def test_figures_come_from_the_exported_weights(module: Callable[[str], str], tmp_path: Path) -> None:
    trained = Trained(tmp_path, config(module("score")), module("score"))
    found = dict(map(tuple, trained.status["evaluations"]))
    assert list(found) == [2, 4, 5], "every second round, and the last one"
    for round_, figures in found.items():
        assert figures["round"] == round_
        assert figures["bytes"] > 1000
        assert figures["nice"] == 19, "training goes first"
    assert [entry["round"] for entry in trained.tracked()] == [2, 4, 5]
    assert trained.tracked()[-1]["eval/round"] == 5
    assert trained.tracked()[-1]["duration_s"] > 0
    assert (trained.counted("ok"), trained.counted("failed")) == (3, 0)
    assert evaluations_in_words(trained.status)[0].startswith("evaluation after round 5: round 5, bytes ")
    assert [p.name for p in trained.folder.iterdir()] == ["track.jsonl"], "nothing is left"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("fails", "ValueError: no such data set"),
        ("strange", "loss is nan"),
        ("hangs", "it took more than 1.5 s (eval.timeout_s)"),
        ("dies", "exit code -9"),
    ],
)
def test_one_that_fails_costs_nothing(
    module: Callable[[str], str], tmp_path: Path, function: str, why: str
) -> None:
    timeout_s = 1.5 if function == "hangs" else 60.0
    trained = Trained(tmp_path, config(module(function), timeout_s=timeout_s), module(function))
    assert trained.result.rounds == 5
    assert trained.result.counted == 5
    assert trained.status["evaluations"] == []
    assert trained.status["failed_evaluations"] == 3
    round_, text = trained.status["last_failed_evaluation"]
    assert round_ == 5
    assert why in text
    assert why in trained.tracked()[0]["failed"]
    assert trained.counted("failed") == 3
    assert "3 evaluations failed, the last after round 5: " in evaluations_in_words(trained.status)[0]
    left = [p for p in psutil.Process().children(recursive=True) if "time.sleep" in " ".join(p.cmdline())]
    assert left == [], "with all that it has started"
    assert [p.name for p in trained.folder.iterdir()] == ["track.jsonl"]


@pytest.mark.parametrize("function", ["my_scores:score", LM_EVAL])
def test_a_model_of_transformers(tmp_path: Path, function: str) -> None:
    """An evaluation gets what export writes: adapters beside a tokenizer; lm-eval a whole model."""
    pytest.importorskip("datasets", reason="the hf task is an extra")
    pytest.importorskip("peft", reason="the hf task is an extra")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = tmp_path / "job", tmp_path / "model"
    save_tiny_llama(model)
    lora = {"r": 2, "alpha": 4.0}
    task = {"name": "hf", "model": str(model), "context": 16, "batch": 2, "held_out": 4, "lora": lora}
    plain = config_of(SPSA, rounds=1, verify_every=1, snapshot_every=1, min_peers=1).model_dump()
    with swarm_of(tmp_path / "swarm", RunConfig.model_validate({**plain, "task": task})) as swarm:
        runner = Runner(swarm.link("one"))
        runner.run()
        held_out = runner.genesis.held_out
        assert held_out is not None
        tokens = runner.link.fetch(held_out.digest, held_out.n_bytes)
    (folder / "export").mkdir(parents=True)
    save_file(runner.replica.weights(), folder / "weights.safetensors")
    (folder / "held-out").write_bytes(tokens)
    job = Job(runner.genesis.config, "00", 1, "00", function, (), None, "cpu", None, has_tokens=True)
    write_export(job, folder, folder / "export")
    there = {path.name for path in (folder / "export").iterdir()}
    assert {"tokenizer.json", "thinwire.json"} < there
    assert ("adapter_model.safetensors" in there) == (function != LM_EVAL)
    if function == LM_EVAL:
        tokenizer = AutoTokenizer.from_pretrained(folder / "export")
        ids = tokenizer("An assignment", return_tensors="pt")["input_ids"]
        whole = AutoModelForCausalLM.from_pretrained(folder / "export")
        with torch.no_grad():
            wanted = runner.replica.model.eval()(input_ids=ids).logits
            assert torch.allclose(whole(input_ids=ids).logits, wanted, atol=1e-4)


def test_a_node_that_leaves_ends_it(module: Callable[[str], str], tmp_path: Path) -> None:
    run = config(module("hangs"))
    evaluations = Evaluations(module("hangs"), tmp_path, Tracks(NodeMetrics()), NodeMetrics(), None)
    with swarm_of(tmp_path / "swarm", run) as swarm:
        runner = Runner(swarm.link("one"), evaluations=evaluations)
        runner.run()
        began_s = time.monotonic()
        evaluations.finish(runner.prepared, lambda: time.monotonic() > began_s + 0.5)
        evaluations.close()
    assert time.monotonic() < began_s + 60, "not as long as it takes"
    assert idle()
    assert not list(tmp_path.glob(".evaluation-*"))


def test_a_daemon_that_it_leaves_holds_up_nothing(module: Callable[[str], str], tmp_path: Path) -> None:
    """It has left the session, and holds the pipe of the output."""
    folder, run = tmp_path / "job", config(module("leaves"))
    assert run.eval is not None
    folder.mkdir()
    save_file({}, folder / "weights.safetensors")
    Job(run.to_json(), "00", 1, "00", module("leaves"), (), None, "cpu", None, has_tokens=False).write(folder)
    evaluations = Evaluations(module("leaves"), tmp_path, Tracks(NodeMetrics()), NodeMetrics(), None)
    failed: list[str | None] = []
    thread = threading.Thread(target=lambda: failed.append(evaluations._run(folder, run.eval)), daemon=True)
    thread.start()
    wait_for((folder / "result.json").exists)
    thread.join(timeout=40)
    daemon = psutil.Process(int(read_result(folder)["daemon"]))
    try:
        assert failed == [None]
        assert daemon.is_running()
        assert evaluations._process is None, "its number is not signalled again"
    finally:
        daemon.kill()


def test_words_without_utf8_are_told_all_the_same() -> None:
    """A name of a file may be such, and a string of JSON."""
    assert as_text("x\ud800" + "y" * MAX_TEXT) == "x?" + "y" * (MAX_TEXT - 2)
    said = _message(Outcome(2, {}, "cannot read a\udcff", 1.0))
    assert said.failed == "cannot read a?"


def test_weights_that_cannot_be_written_cost_nothing(module: Callable[[str], str], tmp_path: Path) -> None:
    folder, metrics = tmp_path / "gone", NodeMetrics()
    evaluations = Evaluations(module("score"), folder, Tracks(metrics), metrics, None)
    with swarm_of(tmp_path / "swarm", config(module("score"))) as swarm:
        runner = Runner(swarm.link("one"), evaluations=evaluations)
        assert runner.run().counted == 5
        status = swarm.call(lambda service, now_s: service.status(now_s))
    evaluations.close()
    assert status["failed_evaluations"] == 2
    assert status["last_failed_evaluation"][1].startswith("the weights cannot be had: [Errno 2] No such file")


def test_only_what_the_nodes_user_names_is_called(module: Callable[[str], str], tmp_path: Path) -> None:
    for run, function, message in (
        (config(module("score")), "os:abort", "If you trust that, say --evaluate my_scores:score"),
        (config_of(DECOUPLED), module("score"), "the run has no \\[eval\\]"),
    ):
        evaluations = Evaluations(function, tmp_path, Tracks(NodeMetrics()), NodeMetrics(), None)
        with swarm_of(tmp_path / function.replace(":", "-"), run) as swarm:
            runner = Runner(swarm.link("one"), evaluations=evaluations)
            with pytest.raises(ConfigError, match=message):
                runner.run()


def test_what_is_not_there_is_refused(module: Callable[[str], str]) -> None:
    refuse_function(module("score"))
    for function, message in (
        ("nowhere.at_all:f", "there is no module nowhere.at_all here"),
        ("my_scores", "package.module:function"),
    ):
        with pytest.raises(ConfigError, match=message):
            refuse_function(function)


def test_the_harness_is_named_with_its_command() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed here")
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        refuse_function("lm-eval")


def test_the_table_in_a_run_file(tmp_path: Path) -> None:
    """Runs without it have the record 0 that they had."""
    assert '"eval"' not in load_config(None, environ={}).to_json()
    path = tmp_path / "run.toml"
    path.write_text('[eval]\nfunction = "a.b:c"\nevery = 7\n')
    config = load_config(path, environ={})
    assert parse_config(config.to_json()) == config
    assert config.eval == Eval(function="a.b:c", every=7)
    for text, message in (
        ('function = "a.b"', "eval.function"),
        ('function = "lm-eval"', "lm-eval needs tasks"),
        ('function = "a:b"\ntasks = ["x"]', "a function takes none"),
        ('function = "lm-eval"\ntasks = ["x"]', "lm-eval takes models of transformers"),
        ('function = "a:b"\nevry = 3', "did you mean 'every'"),
    ):
        path.write_text(f"[eval]\n{text}\n")
        with pytest.raises(ConfigError, match=message):
            load_config(path, environ={})


@pytest.mark.parametrize(
    "value", [None, {}, [1], {"a": "x"}, {"a": None}, {"": 1}, {"\x1b": 1}, {1: 1}, {"a": 1e999}]
)
def test_only_finite_numbers_by_name_are_taken(value: object) -> None:
    with pytest.raises(BadResult):
        figures_of(value)
    assert figures_of({"a": True, "b/c": 2}) == {"a": 1.0, "b/c": 2.0}
