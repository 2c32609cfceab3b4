"""What lies in deploy/examples runs, as its first lines say."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file

from tests.support.paths import ROOT
from tests.support.run_notebook import cells
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.node import config
from thinwire.node.cli import main
from thinwire.node.config import load_config
from thinwire.node.genesis import make_genesis
from thinwire.node.links.local import local_swarm
from thinwire.node.runner import Runner
from thinwire.node.system.processes import PARENT_VARIABLE
from thinwire.node.tasks.registry import make_task
from thinwire.node.tasks.text import TextTask

EXAMPLES = ROOT / "deploy/examples"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


def run(folder: Path, *arguments: str | Path, timeout_s: float = 100) -> str:
    """What a Python program says that ends well, in this folder."""
    env = {**os.environ, PARENT_VARIABLE: str(os.getpid()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --------------------------------------------------------------------------------------------------- digits


def bars(path: Path, n: int = 400) -> Path:
    """As the digits are, for machines without them: the label is the row or column that is bright."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 10, n)
    images = rng.integers(0, 6, (n, 8, 8)).astype(float)
    for image, label in zip(images, labels, strict=True):
        if label < 5:
            image[label] = 16
        else:
            image[:, label - 5] = 16
    np.savez(path, images=images, labels=labels)
    return path


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, **task: Any) -> list[tuple[int, float]]:
    """The held-out losses of two nodes."""
    keys = {f"task.{key}": value for key, value in task.items()}
    keys |= {"run.rounds": 60, "run.eval_every": 60, "strategy.lr": 1e-2}
    nodes = ended(folder, monkeypatch, EXAMPLES / "digits.toml", "digits:make", keys)
    return sorted(loss for node in nodes if node.result is not None for loss in node.result.held_out)


def ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run_file: Path, task: str, keys: dict[str, Any]
) -> list[Runner]:
    """Two nodes with the example's run file, over links of this process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    run = load_config(run_file, {**keys, "policy.name": "all"}, environ={})
    task_there = make_task(run.task, task, None)
    genesis = make_genesis(run, task_there, peer_id_of(KEY.public_key()), 1)
    with local_swarm(folder, genesis.body, KEY, blobs=genesis.blobs) as swarm:
        nodes = [Runner(swarm.link(name), import_path=task) for name in "ab"]
        threads = [threading.Thread(target=node.run) for node in nodes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        results = [node.result for node in nodes]
    assert all(result is not None for result in results)
    found = [result for result in results if result is not None]
    assert {result.rounds for result in found} == {keys["run.rounds"]}
    assert found[0].fingerprint == found[1].fingerprint
    return nodes


def test_digits_is_learnt_from_a_file_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = trained(tmp_path, monkeypatch, corpus=str(bars(tmp_path / "bars.npz")))
    assert [round for round, _ in losses] == [0, 60]
    assert losses[0][1] > 2.2
    assert losses[-1][1] < 0.3


def test_digits_of_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: the digits come with it")
    assert trained(tmp_path, monkeypatch)[-1][1] < 0.5


def test_digits_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn, or name a file of yours"):
        make_task(config.Task(name="custom", corpus="digits"), "digits:make", None).held_out()
    bad = tmp_path / "bad.npz"
    np.savez(bad, pictures=np.zeros(3))
    with pytest.raises(ConfigError, match="images"):
        make_task(config.Task(name="custom", corpus=str(bad)), "digits:make", None).held_out()


# ----------------------------------------------------------------------------------------------- arithmetic


def test_nodes_learn_to_add_from_what_both_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"run.rounds": 40, "run.eval_every": 40, "strategy.lr": 1e-2, "strategy.samples": 16}
    nodes = ended(tmp_path, monkeypatch, ROOT / "deploy/runs/sapo.toml", "arithmetic:make", keys)
    for node in nodes:
        strategy, first = node.replica.strategy, dict(node.result.held_out if node.result else ()).get(0)
        assert strategy.counters["foreign"] > 20
        wrong = node.prepared.work.evaluate_own()
        assert wrong is not None
        assert wrong < 0.97
        assert first is None or first > 0.97


# -------------------------------------------------------------------------------------------------- experts


def expert(folder: Path, text: bytes) -> None:
    """An export, as `thinwire export` writes it, of a model that has learned a little of the text."""
    (folder.parent / f"{folder.name}.txt").write_bytes(text)
    options = config.Task(layers=1, width=16, heads=2, context=16, batch=16, held_out_bytes=1024)
    task = TextTask(options, None)
    task.load(text, None)
    torch.manual_seed(1)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for step in range(25):
        optimizer.zero_grad()
        task.draw(model, step)().backward()
        optimizer.step()
    folder.mkdir()
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"config": {"task": options.model_dump()}}))


def test_experts_that_know_nothing_of_one_another_are_routed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    kinds = ["words", "sums"]
    expert(tmp_path / "words", b"the cat sat on the mat and the dog ate that hat " * 60)
    expert(tmp_path / "sums", b"12+7=19;3+44=47;5+5=10;81+9=90;" * 90)
    texts = [f"{kind}.txt" for kind in kinds]
    arguments = ["--experts", *kinds, "--texts", *texts, "--held-out", *texts, "--dense", "words"]
    monkeypatch.setattr(sys, "argv", ["experts.py", *arguments])
    import_module("experts").main()
    said = capsys.readouterr().out
    found = {what: float(value) for what, _, value in (line.partition(": ") for line in said.splitlines())}
    assert found["the router is right"] > 0.99
    assert found["routed experts"] < found["each kind's own expert"] + 0.02
    assert found["routed experts"] < found["any expert"] - 0.5
    assert found["routed experts"] < found["one model of all kinds"] - 0.5
    assert load_file(tmp_path / "router.safetensors")["weight"].shape == (2, 256)


# -------------------------------------------------------------------------------------------- the optimum


def test_the_optimum_is_found_by_nodes_of_which_each_has_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four nodes of this process; the last round merges, and says how far that is from the optimum."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    keys = {"run.rounds": 80, "run.eval_every": 80}
    run = load_config(EXAMPLES / "optimum.toml", keys, environ={})
    genesis = make_genesis(run, make_task(run.task, "optimum:make", None), peer_id_of(KEY.public_key()), 1)
    nodes = []
    with local_swarm(tmp_path, genesis.body, KEY, blobs=genesis.blobs) as swarm:
        for part in range(4):
            monkeypatch.setenv("PART", str(part))
            task = make_task(run.task, "optimum:make", None)
            nodes.append(Runner(swarm.link(f"peer-{part}"), task=task))
        threads = [threading.Thread(target=node.run) for node in nodes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    results = [node.result for node in nodes if node.result is not None]
    assert len({result.fingerprint for result in results}) == 1
    assert len(results) == 4
    losses = dict(loss for result in results for loss in result.held_out)
    assert losses[80] < 0.1 * losses[0]
    monkeypatch.setenv("PART", "4")
    with pytest.raises(ConfigError, match="from 0 to 3"):
        make_task(run.task, "optimum:make", None)


# ----------------------------------------------------------------------------------------------- the others


@pytest.mark.swarm
def test_the_notebook(tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="nbclient and ipykernel are not installed")
    said = run(tmp_path, ROOT / "tests/support/run_notebook.py", EXAMPLES / "swarm.ipynb")
    accuracies = [float(found) for found in re.findall(r"accuracy (\d\.\d+)", said)]
    assert len(accuracies) == 5
    assert accuracies[-1] == accuracies[-2] > 0.7
    assert "the ticket: tw1-" in said
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = json.loads((EXAMPLES / "swarm.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    for cell in notebook["cells"]:
        assert cell["cell_type"] in {"markdown", "code"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.swarm
def test_a_strategy_under_torchrun(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = run(tmp_path, *torchrun, EXAMPLES / "torchrun_group.py", "--steps", "60")
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", said)]
    assert losses[-1] < losses[0] / 2
    assert "2 ranks, equal to the last bit" in said


@pytest.mark.swarm
def test_lora_on_a_model_folder(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is in the extra [hf]")
    said = run(tmp_path, EXAMPLES / "lora.py", "--rounds", "10", "--host", "127.0.0.1")
    assert "the adapter after round 10 is in lora-adapter" in said
    adapter = load_file(tmp_path / "lora-adapter/adapter_model.safetensors")
    outputs = [weight for name, weight in adapter.items() if "lora_B" in name]  # zeros in the beginning
    assert len(outputs) == 14
    assert all(bool(weight.any()) for weight in outputs)


# ----------------------------------------------------------------------------------------------- their words


def first_lines(path: Path) -> str:
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(path.read_text())) or ""
    if path.suffix == ".ipynb":
        return cells(path, "markdown")[0][1]
    return path.read_text()


def test_each_says_how_to_run_it_and_stands_in_the_list() -> None:
    listed = re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text())
    here = [path for path in EXAMPLES.iterdir() if path.is_file() and path.name != "README.md"]
    assert sorted(listed) == sorted(path.name for path in here)
    assert all(path.stem in first_lines(path) for path in here)
    assert len((EXAMPLES / "README.md").read_text().splitlines()) < 40


@pytest.mark.parametrize("name", ["digits.py", "digits.toml"])
def test_their_commands_are_understood(name: str) -> None:
    """An option that is not known is a SystemExit."""
    lines = [line.strip("# ") for line in first_lines(EXAMPLES / name).splitlines()]
    commands = [line.split("   ")[0] for line in lines if line.startswith("thinwire ")]
    assert len(commands) >= 2
    as_in_main = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    for command in commands:
        tyro.cli(main.Command, args=shlex.split(command)[1:], config=as_in_main)
