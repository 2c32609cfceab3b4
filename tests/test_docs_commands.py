"""The commands that users read in README.md and docs/, run in the order in which they need one another.

What trains or serves is started; the other commands run in this process. What another test runs already is
listed with it, and every command must be in one of the two lists.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.waiting import wait_until
from tests.test_docs import USERS, commands

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]

ELSEWHERE = {
    "make": ".ci/run",
    "demo": "tests/node/cli/test_demo.py",
    "doctor": "tests/node/doctor/test_doctor.py",
    "plan": "tests/node",
    "compare": "tests/node/compare/test_compare.py",
    "ray": "tests/node/on_ray/test_on_ray.py",
    "bench": "tests/node/bench",
    "monitor": "tests/node/cli/test_monitor.py",
    "--evaluate": "tests/node/evaluation",
    "--own": "tests/node/gossip",
    "--merged": "tests/node/tasks/test_hf_models.py",
    "--offload-idle": "tests/node/bench/test_live_bytes.py",
    "seats": "tests/coordinator/seats",
    "replace": "tests/coordinator/seats",
    "remove": "tests/coordinator/seats",
    "--seats": "tests/node/beside",
    "--replica": "tests/node/beside",
    "--coordinate": "tests/node/beside",
    "--replace": "tests/coordinator/seats",
    "--recover": "tests/coordinator/seats",
    "--restored": "tests/coordinator/seats",
    "--blobs": "tests/coordinator/seats",
    "--task": "tests/node/cli",
    "--data": "tests/node/cli",
    "--base": "tests/node/cli/test_replay.py",
    **dict.fromkeys(
        ("seats", "replace", "remove", "--seats", "--replica", "--recover", "--restored"),
        "tests/node/cli/test_seats.py",
    ),
}
"""A word of a command -> where such commands are run: on a cluster, for longer, with code of one's own."""

ALIKE = {"TICKET": "tw1-...", "deploy/runs/pydoc-gpt.toml": "run.toml", "DIR": "weights"}
"""Words that say the same."""

SMALL = {
    "THINWIRE_RUN__ROUNDS": "6",
    "THINWIRE_RUN__EVAL_EVERY": "3",
    "THINWIRE_RUN__VERIFY_EVERY": "1",
    "THINWIRE_RUN__SNAPSHOT_EVERY": "2",
    "THINWIRE_TASK__LAYERS": "1",
    "THINWIRE_TASK__WIDTH": "16",
    "THINWIRE_TASK__HEADS": "2",
    "THINWIRE_TASK__CONTEXT": "16",
    "THINWIRE_TASK__BATCH": "2",
    "THINWIRE_TASK__HELD_OUT_BYTES": "1024",
    "THINWIRE_STRATEGY__ACCUMULATE": "1",
}

Process = subprocess.Popen[bytes]


class Reader:
    """Does what a page says, in a folder of its own, and notes what it has done."""

    def __init__(self, folder: Path, here: Callable[..., tuple[int, str, str]]) -> None:
        self.folder, self._here = folder, here
        self.said = ""
        self.done: list[list[str]] = []
        self.values: dict[str, str] = {}
        self._started: list[Process] = []

    def start(self, command: str, *more: str) -> Process:
        """As a process that stays; `more`: what the place of a test needs."""
        args = [*self._args(command), *more]
        log = (self.folder / f"{len(self._started)}.log").open("wb")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "thinwire.node.cli.main", *args],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        self._started.append(process)
        assert process.stdin is not None
        with process.stdin as stdin:  # for `join -`
            stdin.write(self.values.get("tw1-...", "").encode() + b"\n")
        return process

    def run(self, command: str, *more: str) -> None:
        code, out, err = self._here(*self._args(command), *more)
        assert code == 0, f"{command}: {err}"
        self.said += out

    def logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _args(self, command: str) -> list[str]:
        _, *words = shlex.split(command)
        self.done.append([ALIKE.get(word, word) for word in words])
        return [os.path.expanduser(self.values.get(word, word)) for word in words]


@pytest.fixture
def reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Callable[..., tuple[int, str, str]]
) -> Iterator[Reader]:
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    found = Reader(tmp_path, here)
    yield found
    found.end()


def test_every_command(reader: Reader) -> None:
    reader.run("thinwire init slow.toml --kind slow")
    reader.run("thinwire init", "--kind", "bytes")
    state = _train(reader)
    for command in (
        "thinwire export tw1-... -o weights",
        "thinwire status tw1-...",
        "thinwire ledger tw1-... -o run.ledger",
        "thinwire ledger --check run.ledger",
        "thinwire replay run.ledger -o model.safetensors",
        'thinwire generate weights --prompt "The import statement" --tokens 200',
        "thinwire export ~/.local/state/thinwire/node-0 -o weights",
        "thinwire export STATE -o weights",
        "thinwire status STATE",
        "thinwire ledger STATE -o run.ledger",
        "thinwire replay STATE",
        "thinwire run STATE extend --rounds 100",
        "thinwire run STATE set strategy.lr=0.001",
        "thinwire run STATE set strategy.bound=1.5",
        "thinwire run STATE pause",
        "thinwire run STATE resume",
        "thinwire run STATE stop",
        "thinwire runs",
        "thinwire invite STATE --name lab-7",
        "thinwire invite STATE --name course --uses 30 --expires 7d",
        "thinwire identity",
    ):
        reader.run(command)
    reader.values["12D3Koo..."] = reader.said.split()[-1]
    for command in (
        "thinwire run STATE ban 12D3Koo...",
        "thinwire run STATE unban 12D3Koo...",
        "thinwire run STATE rotate-token",
        "thinwire run STATE open",
    ):
        reader.run(command)
    state.send_signal(signal.SIGINT)
    assert state.wait(30) == 0, reader.logs()
    again = reader.start("thinwire coordinator --state STATE")
    wait_until(lambda: "is over already" in reader.logs() or again.poll() is not None, 60, reader.logs)
    again.send_signal(signal.SIGINT)
    assert again.wait(30) == 0, reader.logs()
    reader.run("thinwire runs --clean", "--yes")
    for command in ("thinwire config --reference", "thinwire completion bash"):
        reader.run(command)
    assert "strategy.lr" in reader.said
    assert [words for words in _to_be_run() if not any(set(words) <= set(done) for done in reader.done)] == []


def _train(reader: Reader) -> Process:
    """A run to its end; returns the coordinator, which goes on serving."""
    here = ("--host", "127.0.0.1")
    reader.values = {"FILE": "ticket", "@FILE": "@ticket", "STATE": "state", "DIR": "node"}
    coordinator = reader.start("thinwire coordinator run.toml --ticket-file FILE", "--state", "state", *here)
    ticket = reader.folder / "ticket"
    wait_until(lambda: ticket.exists() or coordinator.poll() is not None, 60, reader.logs)
    reader.values |= dict.fromkeys(("tw1-...", "TICKET"), ticket.read_text().strip())
    watch = reader.start("thinwire status tw1-... --watch")
    nodes = [
        reader.start(command, "--device", "cpu", "--threads", "1", *here)
        for command in (
            "thinwire join @FILE",
            "thinwire join -",
            "thinwire join tw1-... --save model.safetensors",
            "thinwire join tw1-... --state DIR",
        )
    ]
    for process in (*nodes, watch):
        assert process.wait(120) == 0, reader.logs()
    assert coordinator.poll() is None
    return coordinator


def _to_be_run() -> list[list[str]]:
    """Commands with their arguments, of all pages; what stands alone is only named there."""
    found = [words[1:] for name in USERS for words in commands(name) if words[0] == "thinwire"]
    here = [words for words in found if not any(word in ELSEWHERE for word in words)]
    return [[ALIKE.get(word, word) for word in words] for words in here if len(words) > 1]


def test_what_is_run_elsewhere_is_there() -> None:
    assert all((ROOT / path).exists() for path in ELSEWHERE.values())
