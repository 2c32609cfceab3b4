"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.waiting import wait_until
from tests.support.zygote import Forked, zygote

# Before torch is loaded: its threads spin while they have nothing to do, and take the cores from other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import PROTOCOL_VERSION, GenesisBody, LayoutEntry, Limits
from thinwire.coordinator.protocol.schedule import float32_bits

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("thinwire", deadline=None, print_blob=True)
hypothesis.settings.load_profile("thinwire")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[dict[str, str]], None]:
    """Compares hex strings with those committed in tests/golden/<module>.json.

    THINWIRE_WRITE_GOLDEN=1 writes them instead: only for a change of format with a new version number.
    """
    path = GOLDEN / f"{request.path.stem.removeprefix('test_')}.json"

    def compare(values: dict[str, str]) -> None:
        known = json.loads(path.read_text()) if path.exists() else {}
        if os.environ.get("THINWIRE_WRITE_GOLDEN") == "1":
            path.write_text(json.dumps({**known, **values}, indent=1, sort_keys=True) + "\n")
        else:
            assert values == {name: known.get(name) for name in values}

    return compare


@pytest.fixture(params=["torch", "numba"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with the plain torch kernels and with the numba ones (skipped where numba is missing)."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="the numba kernels are an extra")
    monkeypatch.setenv("THINWIRE_KERNELS", request.param)
    return str(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch's: where tensors are small, more would only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_core() -> Iterator[None]:
    """For nodes that are threads of this process: on one core they do not hand Python's lock from core to
    core, which costs more than the cores give."""
    before = sorted(os.sched_getaffinity(0))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {before[worker % len(before)]})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def key() -> Ed25519PrivateKey:
    """The coordinator's key; the same in every test."""
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture
def make_genesis(key: Ed25519PrivateKey) -> Callable[..., GenesisBody]:
    """Record 0 of a small run as the coordinator reads it; arguments change its config and limits."""

    def make(
        *,
        rounds: int = 10,
        min_peers: int = 2,
        eval_every: int = 1000,
        verify_every: int = 1,
        snapshot_every: int = 50,
        policy: str = "all",
        max_peers: int = 8,
        max_payload_bytes: int = 2**20,
        heartbeat_s: float = 1.0,
        evaluation: dict[str, int] | None = None,
        audits: dict[str, float] | None = None,
    ) -> GenesisBody:
        config = {
            "run": {
                "name": "test",
                "rounds": rounds,
                "min_peers": min_peers,
                "seed": 1,
                "eval_every": eval_every,
                "verify_every": verify_every,
                "snapshot_every": snapshot_every,
            },
            "policy": {"name": policy},
            "schedule": {"name": "linear", "warmup_rounds": 2, "final_factor": 0.1},
            "network": {"heartbeat_s": heartbeat_s},
            "strategy": {"name": "opaque to the coordinator"},
        }
        if evaluation is not None:
            config["eval"] = evaluation
        if audits is not None:
            config["audits"] = audits
        return GenesisBody(
            protocol=PROTOCOL_VERSION,
            config=json.dumps(config),
            layout=(LayoutEntry(name="w", shape=(4, 5), dtype="float32", init="zeros", scale=0.0),),
            base=None,
            held_out=None,
            corpus=None,
            limits=Limits(max_peers=max_peers, max_payload_bytes=max_payload_bytes, max_samples=1000),
            coordinator=peer_id_of(key.public_key()),
            lr_factor_bits=float32_bits(0.5),
            time_ms=1,
        )

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files about the whole repository (examples, packages, commands in docs) come first, and Ray's: each
    takes long, and at the end one worker would be busy with it, and the others with nothing."""
    first = {Path(__file__).parent, Path(__file__).parent / "node/on_ray"}
    items.sort(key=lambda item: item.path.parent not in first)


def pytest_configure() -> None:
    """A background job of a script is started with SIGINT ignored, one of nohup's with SIGHUP, and children
    inherit that. One that is caught they do not: they begin with what a test relies on, and pytest itself
    goes on ignoring it."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclass
class Program:
    """A running `thinwire` command; its output goes to files, so that no pipe can fill up."""

    process: subprocess.Popen[bytes] | Forked
    out: Path
    err: Path

    def stdout(self) -> str:
        return self.out.read_text()

    def stderr(self) -> str:
        return self.err.read_text()

    def first_line(self, timeout_s: float = 60.0) -> str:
        """Of its standard output, as soon as it is there: a coordinator's ticket."""
        wait_until(lambda: "\n" in self.stdout() or self.process.poll() is not None, timeout_s, self.stderr)
        assert "\n" in self.stdout(), self.stderr()
        return self.stdout().splitlines()[0]

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit code; fails with its log if it does not end."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.stderr()[-3000:]}") from None

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Until it has logged `text`."""
        wait_until(
            lambda: text in self.stderr(), timeout_s, lambda: f"no {text!r} in\n{self.stderr()[-3000:]}"
        )


Start = Callable[..., Program]


@pytest.fixture
def thinwire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts `thinwire ARGS` as a process. At the end all are killed, and none of their children may be left.

    `host`: the network namespace that it is in, `line`: given to its standard input; `afresh`: it loads
    everything itself, see `zygote`. Coordinators end with their runs, unless `--linger` says
    otherwise.
    """
    started: list[Program] = []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))  # runs of one name in several tests

    def start(*args: str, host: str | None = None, line: str | None = None, afresh: bool = False) -> Program:
        if args[:1] == ("coordinator",) and "--linger" not in args:
            args = (*args, "--linger", "0")
        stem = tmp_path / f"process-{len(started)}"
        out, err = stem.with_suffix(".out"), stem.with_suffix(".err")
        forker = None if afresh else zygote()
        if forker is not None:
            process = forker.start(args, cwd=tmp_path, env=os.environ, out=out, err=err, line=line, host=host)
            started.append(Program(process, out, err))
            return started[-1]
        with out.open("wb") as out_file, err.open("wb") as err_file:
            before = ["ip", "netns", "exec", host] if host else []
            loading = subprocess.Popen(
                [*before, sys.executable, "-m", "thinwire.node.cli.main", *args],
                stdin=subprocess.DEVNULL if line is None else subprocess.PIPE,
                stdout=out_file,
                stderr=err_file,
                cwd=tmp_path,
            )
        if line is not None and loading.stdin is not None:
            loading.stdin.write(line.encode() + b"\n")
            loading.stdin.close()
        started.append(Program(loading, out, err))
        return started[-1]

    yield start
    for program in started:
        if program.process.poll() is None:
            program.process.kill()
            program.process.wait()
    try:
        wait_until(lambda: not left_over(tmp_path), 30, lambda: f"left behind: {told(left_over(tmp_path))}")
    finally:
        kill(left_over(tmp_path))


Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs `thinwire ARGS` in this process: exit code, standard output, standard error.

    For commands that end by themselves; a process of their own costs seconds of imports."""
    from thinwire.node.cli.main import main

    def run(*args: str) -> tuple[int, str, str]:
        try:
            code = main(args)
        except SystemExit as e:
            code = int(e.code or 0)
        return (code, *capsys.readouterr())

    return run


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """What a test sets up for people to read is gone after it."""
    logger = logging.getLogger("thinwire")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def left_over(folder: Path) -> list[psutil.Process]:
    """Processes that were started in `folder`, or by something that was."""
    found = []
    for process in psutil.process_iter(["pid"]):
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and Path(process.cwd()) == folder:
                found.append(process)
    return found


def told(processes: Sequence[psutil.Process]) -> list[str]:
    """Their command lines."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline() or ["?"]))
    return found


def kill(processes: Sequence[psutil.Process]) -> None:
    """What a failed test has left, other tests shall not fall over."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


@pytest.fixture(autouse=True, scope="session")
def _no_state_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nodes without a --state of their own must not go on where the user's have stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def own_temp_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder for this test and its processes alone, with a name short enough for sockets.

    Fails the test if a file, a folder or a process is left in the end.
    """
    folder = Path(tempfile.mkdtemp(prefix="tw-"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    deadline_s = time.monotonic() + 30
    while (left := _left_in(folder)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    kill([one for one in left if isinstance(one, psutil.Process)])
    shutil.rmtree(folder)
    assert not left


def _left_in(folder: Path) -> list[Path | psutil.Process]:
    """Files and folders but for the cache that torch's compiler makes when it is loaded, and processes."""
    files = [path for path in folder.iterdir() if not path.name.startswith("torchinductor_")]
    return [*files, *_running_children()]


def _running_children() -> list[psutil.Process]:
    forker = zygote()
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            of_this_process = (forker is not None and child.pid == forker.pid) or _helps_multiprocessing(
                child
            )
            if child.status() != psutil.STATUS_ZOMBIE and not of_this_process:
                found.append(child)
    return found


def _helps_multiprocessing(process: psutil.Process) -> bool:
    """What Python keeps, once there was a pool of processes, until this one ends."""
    said = " ".join(process.cmdline())
    helps = any(f"from multiprocessing.{name} import" in said for name in ("forkserver", "resource_tracker"))
    return helps and process.ppid() == os.getpid()
