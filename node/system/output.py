"""What commands print: tables that fit a terminal, and nothing cut or wrapped where there is none."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from .command_name import as_typed

if TYPE_CHECKING:
    from rich.console import Console

UNBOUNDED: Final = 4096
"""Characters: wider than any line of ours."""

CLOSED_PIPE: Final = 141
"""The exit code of what SIGPIPE ends, as a shell shows it."""


def to_stdout(text: object, end: str = "\n") -> None:
    """What was asked for, in JSON or words: another program may read it."""
    print(text, end=end, flush=True)  # noqa: T201 - the one place


def to_stderr(text: object, end: str = "\n") -> None:
    """For a person at the terminal: commands that it names are those of this user."""
    print(shown(as_typed(str(text))), end=end, file=sys.stderr, flush=True)  # noqa: T201 - the one place


def make_console(*, stderr: bool = False, **options: Any) -> Console:
    """Of that stream: as wide as the terminal, and of no width where there is none."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else UNBOUNDED, **options)


def shown(text: str) -> str:
    """As a terminal may have it: lines of characters, and nothing that changes how they are read. Names in
    data files, and words of others, may have anything in them."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def until_the_pipe_is_closed(run: Callable[[], int]) -> int:
    """Calls `run` and returns its exit code; whoever reads its output may have enough of it (`| head`)."""
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except BrokenPipeError:
        broken = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream.fileno())]
        if not broken:  # a connection of ours
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in broken:  # what is left in its buffer is written when Python ends
            os.dup2(nowhere, stream.fileno())
        return CLOSED_PIPE


def _is_closed(descriptor: int) -> bool:
    """Whether nobody reads the other end of this pipe."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
