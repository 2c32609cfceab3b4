"""Records of a node's run: as JSON lines, in TensorBoard, in W&B; and trackers that fail."""

from __future__ import annotations

import json
import logging
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.local_nodes import DECOUPLED, config_of, run_all, swarm_of
from tests.support.prometheus import value
from thinwire.compression.errors import ConfigError
from thinwire.node.runner import Runner
from thinwire.node.tracking import trackers
from thinwire.node.tracking.jsonl import JsonLines
from thinwire.node.tracking.metrics import NodeMetrics
from thinwire.node.tracking.tensorboard import scalars
from thinwire.node.tracking.trackers import InBackground, Tracks, open_tracks, refuse_trackers

WAIT_S = 60.0


def lines(folder: Path, name: str = "track.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def failures(metrics: NodeMetrics, kind: str) -> float:
    return value(metrics.text().decode(), "thinwire_tracker_failures_total", kind=kind)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    """In the file, and in TensorBoard as its own reader sees it."""
    pytest.importorskip("tensorboard", reason="TensorBoard is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(DECOUPLED, min_peers=2, eval_every=2)
    folder, metrics = tmp_path / "node", NodeMetrics()
    folder.mkdir()
    tracks = open_tracks(["tensorboard"], folder, metrics)
    with swarm_of(tmp_path / "swarm", config) as swarm:
        runner = Runner(swarm.link("peer-0"), metrics=metrics, tracks=tracks)
        other = Runner(swarm.link("peer-1"))
        for one in (runner, other):
            one.link.open()
        result, _ = run_all([runner, other])
        status = swarm.call(lambda service, now_s: service.status(now_s))
    tracks.close()
    start, *middle, end = lines(folder)
    assert (start["kind"], start["run"], start["peer_id"]) == ("start", "run", "peer-0")
    assert start["config"]["strategy"]["name"] == "decoupled"
    assert (end["kind"], end["counted"], end["missed"]) == ("end", result.counted, result.missed)
    rounds = [record for record in middle if record["kind"] == "round"]
    assert [record["round"] for record in rounds] == list(range(1, 7))
    assert rounds[-1]["loss"] == pytest.approx(status["loss"])
    counted = [record for record in rounds if record["own"] == "counted"]
    assert sum(record["payload_bytes"] for record in counted) <= result.payload_bytes
    assert len(counted) == result.counted
    assert {"compute_s", "pack_s", "exchange_s", "apply_s", "own_loss", "tokens"} <= counted[-1].keys()
    held_out = [(r["round"], r["loss"]) for r in middle if r["kind"] == "held_out"]
    assert held_out == [tuple(entry) for entry in result.held_out]
    times = [record["time"] for record in lines(folder)]
    assert times == sorted(times)

    reader = EventAccumulator(str(folder / "tensorboard"))  # type: ignore[no-untyped-call]
    reader.Reload()  # type: ignore[no-untyped-call]
    charted = reader.Scalars("loss")  # type: ignore[no-untyped-call]
    assert [(s.step, s.value) for s in charted] == [(r["round"], pytest.approx(r["loss"])) for r in rounds]
    measured = reader.Scalars("held_out/loss")  # type: ignore[no-untyped-call]
    assert [(s.step, s.value) for s in measured] == [(round_, pytest.approx(x)) for round_, x in held_out]
    names = set(reader.Tags()["scalars"])  # type: ignore[no-untyped-call]
    assert {"seconds/compute", "seconds/round", "bytes/payload", "bytes/sent"} <= names
    for kind in ("jsonl", "tensorboard"):
        assert failures(metrics, kind) == 0


# ---------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("torn", [b'{"kind": "rou', b"x" * 200_000, b'{"a": 1}\n{"b"'], ids=len)
def test_a_line_that_a_kill_has_cut_goes(tmp_path: Path, torn: bytes) -> None:
    first = JsonLines(tmp_path)
    first.track({"round": 1, "loss": 0.5})
    first.close()
    with (tmp_path / "track.jsonl").open("ab") as file:
        file.write(torn)
    again = JsonLines(tmp_path)
    again.track({"round": 2, "loss": float("nan"), "more": {"x": float("inf")}})
    again.close()
    found = lines(tmp_path)
    assert found[0] == {"round": 1, "loss": 0.5}
    assert found[-1] == {"round": 2, "loss": None, "more": {"x": None}}
    assert len(found) == 2 + torn.count(b"\n")


def test_it_is_bounded(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path, max_bytes=1000)
    for round_ in range(500):
        tracker.track({"round": round_, "text": "x" * (round_ % 50)})
        if round_ % 97 == 0:
            tracker.close()  # as a restart does
    tracker.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"track.jsonl", "track.1.jsonl"}
    assert max(sizes.values()) <= 1000
    kept = lines(tmp_path, "track.1.jsonl") + lines(tmp_path)
    assert [record["round"] for record in kept] == list(range(500 - len(kept), 500))
    assert len(kept) > 15


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, metrics = tmp_path / "later", NodeMetrics()
    tracks = Tracks(metrics, JsonLines(folder))
    with caplog.at_level(logging.WARNING):
        for round_ in range(3):
            tracks.add("round", round_)
    assert caplog.text.count("jsonl misses records of this run, training goes on") == 1
    assert failures(metrics, "jsonl") == 3
    folder.mkdir()
    tracks.add("round", 3)
    tracks.close()
    assert [record["round"] for record in lines(folder)] == [3]


# -------------------------------------------------------------------------------------------- the others


class Broken:
    """What somebody else's package may do."""

    name = "wandb"

    def track(self, record: Mapping[str, Any]) -> None:
        raise KeyError("a bug")

    def close(self) -> None:
        raise OSError("another one")


class Stuck:
    """Waits for a network."""

    name = "wandb"

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def track(self, record: Mapping[str, Any]) -> None:
        self.go_on.wait(WAIT_S)

    def close(self) -> None:
        pass


def test_a_tracker_that_fails_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = NodeMetrics()
    tracks = Tracks(metrics, JsonLines(tmp_path), [InBackground("wandb", Broken, metrics)])
    with caplog.at_level(logging.WARNING):
        for round_ in range(5):
            tracks.add("round", round_)
        tracks.close()
    assert failures(metrics, "wandb") == 5
    assert caplog.text.count("wandb misses records") == 1
    assert "KeyError: 'a bug'" in caplog.text
    assert "wandb could not be ended: OSError: another one" in caplog.text
    assert len(lines(tmp_path)) == 5


def test_one_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "_WAITING", 10)
    monkeypatch.setattr(trackers, "_END_S", 0.05)
    metrics, stuck = NodeMetrics(), Stuck()
    tracks = Tracks(metrics, JsonLines(tmp_path), [InBackground("wandb", lambda: stuck, metrics)])
    for round_ in range(50):
        tracks.add("round", round_)
    tracks.close()
    assert len(lines(tmp_path)) == 50
    assert failures(metrics, "wandb") >= 50 - 11
    assert "are lost" in caplog.text
    stuck.go_on.set()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B without its service and without what the user has configured."""
    wandb = pytest.importorskip("wandb", reason="W&B is an extra")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(trackers, "_END_S", WAIT_S)  # however slowly it starts
    for kind in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind))
    yield tmp_path
    wandb.teardown()


def test_wandb_without_a_network(offline: Path) -> None:
    """Its run's file, read record by record."""
    metrics = NodeMetrics()
    tracks = open_tracks(["wandb"], offline, metrics)
    config = {"run": {"rounds": 2}}
    tracks.add("start", 0, run="small", run_id="ab" * 32, peer_id="12D3KooWabcdef", config=config)
    tracks.add("round", 1, loss=2.5, compute_s=0.25, own="counted")
    tracks.add("round", 2, loss=2.0, compute_s=0.5, own="missed")
    tracks.close()
    assert failures(metrics, "wandb") == 0
    pytest.importorskip("wandb").teardown()  # on a busy machine its service writes on when a run has finished
    (file,) = offline.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file.read_bytes()))
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.run_group, run.run_id) == ("thinwire", "small", "ab" * 8 + "-D3KooWabcdef")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["config"] == config
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(h["round"], h["loss"], h["seconds/compute"]) for h in history] == [(1, 2.5, 0.25), (2, 2.0, 0.5)]
    assert run.host == ""


def wandb_records(data: bytes) -> Iterator[Any]:
    """Of an offline run that fits into one block: checksum, length and kind before each."""
    from wandb.proto import wandb_internal_pb2

    at = 7
    while at < len(data):
        _, n_bytes, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1
        yield wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + n_bytes])
        at += 7 + n_bytes


def test_wandb_that_was_never_started_is_a_failure(offline: Path) -> None:
    metrics = NodeMetrics()
    tracks = open_tracks(["wandb"], offline, metrics)
    tracks.add("round", 1, loss=2.5)
    tracks.close()
    assert failures(metrics, "wandb") == 1


def test_names_of_charts() -> None:
    record = {"time": 1.0, "kind": "round", "round": 3, "loss": 2.0, "own": "counted", "apply_s": 0.5}
    assert scalars({**record, "sent_bytes": 7, "own_loss": None}) == {
        "loss": 2.0,
        "seconds/apply": 0.5,
        "bytes/sent": 7,
    }
    assert scalars({"time": 1.0, "kind": "held_out", "round": 3, "loss": 2.0}) == {"held_out/loss": 2.0}


def test_what_cannot_be_tracked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="known are tensorboard, wandb"):
        refuse_trackers(["paper"])  # type: ignore[list-item]
    monkeypatch.setattr(trackers, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install 'thinwire\[wandb\]'"):
        refuse_trackers(["wandb"])
    refuse_trackers([])
