"""Founds a run in a child process, gone when the run is served: torch takes a quarter of a gigabyte."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from signal import SIGKILL
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from ...compression.errors import SwarmUnreachable, ThinwireError, named_error
from ..system.processes import PARENT_VARIABLE
from ..system.stopping import Stop
from .founder import Compared, Founded

if TYPE_CHECKING:
    from ..config import RunConfig

_PROGRAM: Final = "import gc; gc.disable(); from thinwire.node.founding.process import main; main()"
"""What a process that is gone soon loads, stays: to look for what may go took a quarter of its time."""


class Child:
    """See `Founder`. `import_path`: of the user's task. Each call has a process of its own, which ends with
    this one, and when it is stopped: SwarmUnreachable then. Where torch is loaded already there is nothing to
    save, and the work is done here."""

    def __init__(self, import_path: str | None, stop: Stop) -> None:
        self._import_path, self._stop = import_path, stop
        self.name = import_path or "built in"
        self._checked: dict[str, ThinwireError | None] = {}
        self._begun: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends a process that was begun for nothing."""
        if self._begun is not None:
            self._end(self._begun)

    def begin(self) -> None:
        """Starts the process of the next call, which loads torch while this one has other things to do."""
        if "torch" not in sys.modules:
            self._begun = self._start()

    def found(self, config: RunConfig, coordinator: str, recovery: bytes, blobs: Path) -> Founded:
        said = self._ask(
            what="found",
            config=_plain(config),
            coordinator=coordinator,
            recovery=recovery.hex(),
            blobs=str(blobs.absolute()),
        )
        from ...coordinator.protocol.messages import GenesisBody, decode_record

        return Founded(decode_record(GenesisBody, base64.b64decode(said["record"])), said["loss_unit"])

    def compare(self, config: RunConfig, recorded: str) -> Compared:
        said = self._ask(what="compare", config=_plain(config), recorded=recorded)
        return Compared(tuple(said["differences"]), said["loss_unit"])

    def check(self, table: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Takes seconds; what was asked before is known at once. From any thread."""
        if not options:
            return
        asked = {"table": dict(table), "options": dict(options)}
        known = json.dumps(asked, sort_keys=True)
        if known not in self._checked:
            try:
                self._ask(what="check", **asked)
            except ThinwireError as e:
                self._checked[known] = e
            else:
                self._checked[known] = None
        if (error := self._checked[known]) is not None:
            raise error

    def _ask(self, **job: Any) -> dict[str, Any]:
        """What the child answers. Raises what it raised, or SwarmUnreachable: it was stopped."""
        job |= {"task": self._import_path, "level": logging.getLogger("thinwire").level}
        if "torch" in sys.modules:
            from .process import answer

            return answer(job)
        process, self._begun = self._begun or self._start(), None
        try:
            out, _ = process.communicate(json.dumps(job).encode())
        finally:
            self._end(process)
        if self._stop.is_set():
            raise SwarmUnreachable("stopped")
        if not out:
            code = process.returncode
            why = "was killed (out of memory?)" if code == -SIGKILL else f"ended with code {code}"
            raise ThinwireError(f"the process that founds the run {why}: it has changed nothing")
        said: dict[str, Any] = json.loads(out)
        if "error" in said:
            raise named_error(said["error"], said["text"])
        return said

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
            start_new_session=True,  # Ctrl-C reaches this process alone
        )
        self._stop.on_stop.append(process.kill)
        if self._stop.is_set():
            process.kill()
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self._stop.on_stop.remove(process.kill)
        with process:
            process.kill()


def _plain(config: RunConfig) -> dict[str, Any]:
    """`admission` is in no record, and decides what some defaults are."""
    return {"run": config.to_json(), "admission": config.admission.model_dump(mode="json")}
