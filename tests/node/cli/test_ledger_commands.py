"""`thinwire ledger`, `replay` and `export` against a swarm of real processes, and offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.small_run import TASK
from thinwire.coordinator.protocol.ledger_file import check
from thinwire.node.config import parse_config
from thinwire.node.tasks.registry import make_task

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]

RUN = f"""
[run]
name = "small"
rounds = 100000
min_peers = 2
verify_every = 2
snapshot_every = 100000
{TASK}[strategy]
name = "decoupled"
compressor = {{ name = "dense" }}
[network]
heartbeat_s = 0.5
"""


def test_ledger_replay_and_export_of_a_live_run(thinwire: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    ticket = thinwire("coordinator", "run.toml", "--host", "127.0.0.1").first_line()
    nodes = [thinwire("join", ticket, "--threads", "1") for _ in range(2)]
    nodes[0].wait_for("round 8/", 100)

    saved = thinwire("ledger", ticket, "-o", "run.ledger")
    exported = thinwire("export", "-", "-o", "weights", line=ticket)
    assert saved.wait(100) == 0, saved.stderr()
    assert exported.wait(100) == 0, exported.stderr()
    assert saved.stdout() == exported.stdout() == ""
    summary = check(tmp_path / "run.ledger")
    assert summary.rounds >= 8
    assert summary.n_blobs >= 8, "dense payloads do not fit into commits"
    about = json.loads((tmp_path / "weights" / "config.json").read_text())
    assert about["run_id"] == summary.run_id.hex()
    assert about["round"] >= 8
    model = make_task(parse_config(json.dumps(about["config"])).task, None, None).model()
    model.load_state_dict(load_file(tmp_path / "weights" / "model.safetensors"))
    seen = json.loads(_output(thinwire("status", ticket, "--json")))
    assert [p["state"] for p in seen["peers"]] == ["training"] * 2, "readers are no peers"
    assert seen["mismatches"] == 0

    for node in nodes:  # the rest needs no swarm, and the machine for itself
        node.process.kill()

    offline = thinwire("ledger", "--check", "run.ledger")
    assert offline.wait() == 0
    assert f"{summary.rounds} rounds" in offline.stderr()
    result = json.loads(_output(thinwire("replay", "run.ledger", "-o", "end.safetensors", "--json")))
    assert result["rounds"] == summary.rounds
    assert result["verified"] >= 6
    assert result["differing"] == 0
    assert result["ledger_bytes"] == summary.n_bytes
    assert result["model_bytes"] == (tmp_path / "end.safetensors").stat().st_size

    data = (tmp_path / "run.ledger").read_bytes()
    (tmp_path / "cut.ledger").write_bytes(data[: len(data) // 2])
    for args in (("ledger", "--check", "cut.ledger"), ("replay", "cut.ledger", "-o", "end.safetensors")):
        program = thinwire(*args)
        assert program.wait() == 1
        assert "thinwire: cut.ledger: record " in program.stderr()
        assert "cut off" in program.stderr()
        assert "Traceback" not in program.stderr()
    assert load_file(tmp_path / "end.safetensors"), "what was there is whole still"


def test_wrong_usage(here: Callable[..., tuple[int, str, str]]) -> None:
    for args, message in (
        (("ledger",), "thinwire ledger TICKET -o FILE"),
        (("ledger", "tw1-x", "--check", "x"), "neither a ticket nor -o"),
        (("ledger", "tw1-x", "-o", "x"), "ticket"),
        (("replay", "none"), "none: No such file"),
    ):
        code, _, err = here(*args)
        assert code == 2
        assert message in err


def _output(program: Any) -> str:
    assert program.wait(100) == 0, program.stderr()
    return str(program.stdout())
