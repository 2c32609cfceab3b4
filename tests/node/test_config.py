"""The run file: precedence, and refusals that say what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT
from thinwire.compression.errors import ConfigError
from thinwire.node.config import load_config, parse_config
from thinwire.node.tasks.registry import make_task
from thinwire.optim.registry import build_strategy, of_new_run, refuse_unlikely


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_precedence_is_command_line_then_environment_then_file_then_default(tmp_path: Path) -> None:
    path = write(tmp_path, "[run]\nname = 'file'\nrounds = 7\nseed = 3\n")
    environ = {"THINWIRE_RUN__ROUNDS": "8", "THINWIRE_RUN__SEED": "4", "THINWIRE_KERNELS": "torch"}
    config = load_config(path, {"run.seed": 5}, environ)
    assert (config.run.name, config.run.rounds, config.run.seed) == ("file", 8, 5)
    assert config.run.min_peers == 2


def test_the_configuration_survives_record_0(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "[strategy]\nname = 'spsa'\nprobes = 3\n"), environ={})
    assert parse_config(config.to_json()) == config
    assert "batch_samples" not in config.to_json(), "as before there was any"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nround = 5\n", "unknown key 'run.round'; did you mean 'rounds'?"),
        ("[task]\nlearning = 5\n", "unknown key 'task.learning'; one of adapter, architecture"),
        ("[tasks]\n", "unknown key 'tasks'; did you mean 'task'?"),
        ("[run]\nrounds = 0\n", "run.rounds: Input should be greater than or equal to 1"),
        ("[policy]\nname = 'soon'\n", "policy.name: Input should be 'deadline', 'all', 'fastest' or 'async'"),
        ("[schedule]\nname = 'batch'\n", 'schedule.batch_samples: name = "batch" needs batch_samples'),
        ("[run\n", "cannot be read as TOML"),
        ("run = 3\n[policy]\n", "run: "),
    ],
)
def test_bad_files_are_refused_with_the_key_and_the_nearest_name(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=r".") as e:
        load_config(write(tmp_path, text), environ={})
    assert message in str(e.value)


def test_a_missing_file_names_an_example(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file.*pydoc-gpt\.toml"):
        load_config(tmp_path / "none.toml", environ={})


def test_every_example_run_is_valid() -> None:
    runs = sorted((ROOT / "deploy" / "runs").glob("*.toml"))
    assert runs
    for run in runs:
        config = load_config(run, environ={})
        build_strategy(of_new_run(config.strategy), torch.nn.Linear(8, 8).named_parameters())
        if config.task.name == "text":
            with torch.device("meta"):
                make_task(config.task, None, None).model()


def test_who_said_it_is_blamed(tmp_path: Path) -> None:
    path = write(tmp_path, "[run]\nrounds = 0\n")
    with pytest.raises(ConfigError) as e:
        load_config(path, {"run.seed": "one", "task.nam": 3}, {"THINWIRE_RUN__MIN_PEERS": "none"})
    parts = str(e.value).split("; ")
    assert parts[0].startswith(f"{path}: run.rounds: ")
    assert parts[1].startswith("the environment's THINWIRE_RUN__MIN_PEERS=none: run.min_peers: ")
    assert parts[2].startswith("--set run.seed=one: run.seed: ")
    assert parts[3].startswith("--set task.nam=3: unknown key 'task.nam'")
    with pytest.raises(ConfigError, match=r"^--set run.name.x=1: name is a value, not a section$"):
        load_config(write(tmp_path, "[run]\nname = 'a'\n"), {"run.name.x": 1}, {})


def test_options_without_a_name_are_those_of_the_default_strategy(tmp_path: Path) -> None:
    path = write(tmp_path, "[run]\nrounds = 5\n")
    assert load_config(path, {"strategy.lr": 0.01}, {}).strategy == {"name": "decoupled", "lr": 0.01}
    path = write(tmp_path, "[strategy]\nname = 'spsa'\nlr = 1\n")
    assert load_config(path, {"strategy.lr": 0.01}, {}).strategy == {"name": "spsa", "lr": 0.01}


def test_an_empty_run_file_is_none(tmp_path: Path) -> None:
    for text in ("", "# nothing yet\n"):
        with pytest.raises(ConfigError, match=r"run.toml: says nothing; thinwire init"):
            load_config(write(tmp_path, text), {}, {})


def test_a_learning_rate_that_nobody_means() -> None:
    for lr in (1e9, -1.0):
        with pytest.raises(ConfigError, match=r"strategy.lr = .*: between 0 and 100"):
            refuse_unlikely({"name": "decoupled", "lr": lr})
    refuse_unlikely({"name": "decoupled"})


PEER = "12D3KooWHr6ph4PyMCy8uMq9Rd43YaUY1tMTc9oLVmXyeBeUUqZt"


def test_who_may_come_in_is_checked_and_is_not_in_record_0() -> None:
    listed = load_config(None, {"admission.mode": "listed", "admission.peers": [PEER]}, {})
    assert (listed.admission.mode, listed.admission.peers) == ("listed", (PEER,))
    assert listed.to_json() == load_config(None, {}, {}).to_json()
    assert parse_config(listed.to_json()).admission.mode == "open"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('mode = "closed"', "admission.mode: Input should be 'open', 'invited' or 'listed'"),
        ('mode = "listed"', 'admission.peers: mode = "listed" lets in these only: name one'),
        ('peers = ["lab-7"]', "admission.peers: 'lab-7' is not the peer id"),
        ('modes = "open"', "unknown key 'admission.modes'; did you mean 'mode'?"),
    ],
)
def test_a_wrong_admission_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        load_config(write(tmp_path, f"[admission]\n{text}\n"), environ={})
    assert message in str(e.value)


def test_what_the_coordinator_keeps_is_checked_and_is_not_in_record_0() -> None:
    kept = load_config(None, {"run.keep": "20GB"}, {})
    assert kept.run.keep == "20GB"
    assert load_config(None, {"run.keep": 5000}, {}).run.keep == "5000"
    assert kept.to_json() == load_config(None, {}, {}).to_json()
    with pytest.raises(ConfigError, match='keep = "everything": write "all", "snapshots" or a size'):
        load_config(None, {"run.keep": "everything"}, {})


def test_a_file_of_edges_goes_into_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "graph").write_text("# a path\n0 1\n1 2  # its end\n\n")
    text = f"[strategy]\nname = 'gossip'\ntopology_file = '{tmp_path / 'graph'}'\n"
    config = load_config(write(tmp_path, text), environ={})
    assert config.strategy == {"name": "gossip", "topology": "file", "edges": [[0, 1], [1, 2]]}
    assert parse_config(config.to_json()) == config
    build_strategy(config.strategy, [("x", torch.nn.Parameter(torch.zeros(4)))])


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        ("0 1\n1\n", "line 2: '1', but an edge is two"),
        ("0 one\n", "line 1: '0 one'"),
        ("0 1\n1 0\n", "0 1 is there twice"),
        ("0 99999999999\n", "no pair"),
        ("# nothing\n", "needs edges"),
        ("".join(f"0 {i}\n" for i in range(1, 4098)), "line 4097: more than 4096"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_of_edges_is_refused(tmp_path: Path, graph: str | None, why: str) -> None:
    path = tmp_path / "graph"
    if graph is not None:
        path.write_text(graph)
    with pytest.raises(ConfigError, match=re.escape(why)) as e:
        load_config(None, {"strategy.name": "gossip", "strategy.topology_file": str(path)}, environ={})
    assert "strategy.topology_file" in str(e.value)
