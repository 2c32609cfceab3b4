"""Evaluations beside the training of a node: a process each, one at a time, which may fail, hang or die."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import psutil

from ...compression.errors import ConfigError, ThinwireError
from ...coordinator.protocol.figures import figures_in_words, human_seconds, printable
from ...coordinator.protocol.messages import Evaluation, Figure, as_text
from .job import LM_EVAL, TOKENS, WEIGHTS, BadResult, Job, read_result

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import Eval
    from ..preparing import PreparedRun
    from ..tracking.metrics import NodeMetrics
    from ..tracking.trackers import Tracks

log = logging.getLogger("thinwire.node")

PREFIX: Final = ".evaluation-"
_TAIL_LINES: Final = 20
_TOLD_CHARS: Final = 300
_TAIL_S: Final = 2.0
"""Longer than the rest of a pipe takes."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one evaluation: figures by name, or why there are none."""

    round: int
    figures: Mapping[str, float]
    failed: str | None
    seconds: float


class Evaluations:
    """Of one node in one run. All methods are for the node's thread; what takes time is in another one.

    `function`: what the node's user has named, which must be what the run asks for: code never comes over the
    network. `folder`: where weights are written for the time of an evaluation.
    """

    def __init__(
        self, function: str, folder: Path, tracks: Tracks, metrics: NodeMetrics, import_path: str | None
    ) -> None:
        self._function, self._folder, self._import_path = function, folder, import_path
        self._tracks, self._metrics = tracks, metrics
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._last_round = 0
        for left in folder.glob(f"{PREFIX}*"):  # of a node that was killed
            shutil.rmtree(left, ignore_errors=True)

    def check(self, run: PreparedRun) -> None:
        """Raises ConfigError: the run asks for none, for another function, or it cannot be had here."""
        wanted = run.config.eval
        if wanted is None:
            raise ConfigError(f"--evaluate {self._function}: the run has no [eval] in its configuration")
        if wanted.function != self._function:
            raise ConfigError(
                f"--evaluate {self._function}: the run asks for {wanted.function!r}. If you trust that, say "
                f"--evaluate {wanted.function}"
            )
        refuse_function(self._function)

    def look(self, run: PreparedRun) -> None:
        """Once in a round, with the replica at its end: tells what has ended, and begins what is due."""
        self._collect(run)
        wanted, round_ = run.config.eval, run.replica.round
        assert wanted is not None
        if round_ == self._last_round or round_ % wanted.every:
            return
        if self._thread is not None:
            self._last_round = round_
            self._metrics.evaluated("skipped")
            log.warning("round %d is not evaluated: the evaluation before it still runs", round_)
            return
        self._begin(run, wanted)

    def finish(self, run: PreparedRun, stopped: Callable[[], bool]) -> None:
        """After the last round: waits for what runs, and evaluates what the run has come to."""
        wanted = run.config.eval
        assert wanted is not None
        self._wait(run, stopped)
        if not stopped() and run.replica.round != self._last_round:
            log.info("evaluating the last round's weights")
            self._begin(run, wanted)
            self._wait(run, stopped)

    def close(self) -> None:
        """Ends what runs, at once, and leaves nothing behind."""
        self._is_closed = True
        self._kill()
        if self._thread is not None:
            self._thread.join(timeout=10)

    # -------------------------------------------------------------------------------- the node's thread

    def _begin(self, run: PreparedRun, wanted: Eval) -> None:
        self._last_round = run.replica.round
        folder = self._folder / f"{PREFIX}{self._last_round}"
        try:
            folder.mkdir()
            write = self._prepare(run, wanted, folder)
        # The disk, the memory of a copy, the coordinator that is asked for the tokenizer.
        except (OSError, RuntimeError, ThinwireError) as e:
            shutil.rmtree(folder, ignore_errors=True)
            self._outcomes.put(Outcome(self._last_round, {}, f"the weights cannot be had: {e}", 0.0))
            self._collect(run)
            return
        self._thread = threading.Thread(
            target=self._supervise,
            args=(folder, self._last_round, wanted, write),
            name="evaluation",
            daemon=True,
        )
        self._thread.start()

    def _prepare(self, run: PreparedRun, wanted: Eval, folder: Path) -> Callable[[], None]:
        """Copies what training would change; the rest, which takes longer, is in what it returns."""
        from ...optim.parts.ranks import is_sharded
        from ..tasks.base import Pretrained

        body, replica = run.genesis, run.replica
        has_tokens = isinstance(run.work.task, Pretrained) and body.held_out is not None
        tokens = b""
        if has_tokens and body.held_out is not None:
            tokens = run.link.fetch(body.held_out.digest, body.held_out.n_bytes)
        job = Job(
            config=body.config,
            run_id=replica.run_id.hex(),
            round=replica.round,
            fingerprint=replica.fingerprint().hex(),
            function=self._function,
            tasks=wanted.tasks,
            limit=wanted.limit,
            device=wanted.device,
            import_path=self._import_path,
            has_tokens=has_tokens,
        )
        tensors: dict[str, Tensor] | None = None
        if any(is_sharded(p) for p in replica.model.parameters()):  # together with other ranks, so now
            replica.save_weights(folder / WEIGHTS)
        else:
            tensors = {name: t.clone() for name, t in replica.weights().items()}

        def write() -> None:
            from safetensors.torch import save_file

            if tensors is not None:
                save_file(tensors, folder / WEIGHTS)
            if has_tokens:
                (folder / TOKENS).write_bytes(tokens)
            job.write(folder)

        return write

    def _collect(self, run: PreparedRun) -> None:
        """Tells of the evaluations that have ended, in the log, to the trackers and to the coordinator."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        while not self._outcomes.empty():
            outcome = self._outcomes.get()
            if outcome.failed is None:
                took, shown = human_seconds(outcome.seconds), figures_in_words(outcome.figures)
                log.info("round %d: evaluation after %s: %s", outcome.round, took, shown)
            else:
                log.warning("round %d: the evaluation failed: %s", outcome.round, outcome.failed)
            self._metrics.evaluated("ok" if outcome.failed is None else "failed")
            figures = {f"eval/{name}": value for name, value in outcome.figures.items()}
            failed = {} if outcome.failed is None else {"failed": outcome.failed}
            self._tracks.add("evaluation", outcome.round, duration_s=outcome.seconds, **failed, **figures)
            run.link.report(_message(outcome))

    def _wait(self, run: PreparedRun, stopped: Callable[[], bool]) -> None:
        while self._thread is not None and self._thread.is_alive() and not stopped():
            self._thread.join(timeout=0.2)
        self._collect(run)

    # ------------------------------------------------------------------------------- the other thread

    def _supervise(self, folder: Path, round_: int, wanted: Eval, write: Callable[[], None]) -> None:
        began_s = time.monotonic()
        figures: Mapping[str, float] = {}
        failed: str | None = None
        try:
            write()
            failed = self._run(folder, wanted)
            if failed is None:
                figures = read_result(folder)
        except BadResult as e:
            failed = str(e)
        except Exception as e:  # noqa: BLE001 - whatever it was, the node trains on, and counts it
            failed = f"{type(e).__name__}: {e}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._outcomes.put(Outcome(round_, figures, failed, time.monotonic() - began_s))

    def _run(self, folder: Path, wanted: Eval) -> str | None:
        """None: it has ended well; else why not. Raises OSError."""
        environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if wanted.device == "cpu":
            environ["CUDA_VISIBLE_DEVICES"] = ""
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "thinwire.node.evaluation.process", str(folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
        tail = _Tail(process.stdout)
        try:
            code = process.wait(0 if self._is_closed else wanted.timeout_s)
        except subprocess.TimeoutExpired:
            return f"it took more than {wanted.timeout_s:g} s (eval.timeout_s)"
        finally:
            self._kill()
            self._process = None  # its number may be another's from now on
            tail.close()
        return None if code == 0 else tail.last_line() or f"it ended with exit code {code}"

    def _kill(self) -> None:
        """With all that it has started; of a process that has ended already, what is in its session."""
        process = self._process
        if process is None:
            return
        elsewhere = _descendants(process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in elsewhere:
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.wait()


class _Tail:
    """The last lines of what a process prints, however much it is."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        assert pipe is not None
        self._pipe = pipe
        self._lines: deque[bytes] = deque(maxlen=_TAIL_LINES)
        self._thread = threading.Thread(target=self._read, name="evaluation-output", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._pipe, contextlib.suppress(OSError):
            while line := self._pipe.readline(10_000):
                self._lines.append(line)

    def last_line(self) -> str:
        lines = [line.decode(errors="replace").strip() for line in tuple(self._lines)]
        last = next((line for line in reversed(lines) if line), "")
        return printable(last, _TOLD_CHARS)

    def close(self) -> None:
        """What is in the pipe has been read. A daemon that the process has left is not gone, and may hold the
        pipe: closing it would wait for the thread that reads, which ends with that daemon."""
        self._thread.join(timeout=_TAIL_S)


def _descendants(pid: int) -> list[psutil.Process]:
    """Also those that have a session of their own. Empty: the process is gone."""
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
    return found


def refuse_function(function: str) -> None:
    """Raises ConfigError for a function that cannot be had on this machine."""
    from importlib.util import find_spec

    if function == LM_EVAL:
        from .harness import require

        require()
        return
    module, colon, attribute = function.partition(":")
    if not colon or not attribute:
        raise ConfigError(f"--evaluate {function}: write it as package.module:function, or lm-eval")
    sys.path.insert(0, "")  # as `python -m` does, and with it the process of an evaluation
    try:
        is_there = find_spec(module) is not None
    except (ImportError, ValueError):
        is_there = False
    finally:
        sys.path.remove("")
    if not is_there:
        raise ConfigError(f"--evaluate {function}: there is no module {module} here")


def _message(outcome: Outcome) -> Evaluation:
    figures = tuple(Figure(name=name, value=value) for name, value in outcome.figures.items())
    failed = None if outcome.failed is None else as_text(outcome.failed)
    return Evaluation(round=outcome.round, figures=figures, failed=failed)
