"""The command line. Heavy modules load inside the commands, so that --help is quick.

Exit codes: 0 ok, 1 failed, 2 usage, 3 swarm unreachable, 4 incompatible, 130 and 143 on signals.
Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, get_args

import tyro

from ...compression.errors import ConfigError, ThinwireError, nearest
from ...coordinator.protocol.files import disk_error
from ..bench.arguments import Bench
from ..system.logs import PREFIX_VARIABLE, log_to_stderr
from ..system.output import to_stderr, until_the_pipe_is_closed
from ..system.processes import end_with_parent
from .admission_commands import Identity, Invite
from .arguments import with_whole_tickets
from .local_commands import Completion, Config, Generate, Init, Plan, Runs, print_version
from .swarm_commands import Coordinator, Demo, Join, Ray
from .tool_commands import Compare, Doctor, Export, Ledger, Monitor, Replay, Run, Status

Command = Annotated[
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Init, tyro.conf.subcommand("init")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Coordinator, tyro.conf.subcommand("coordinator")]
    | Annotated[Join, tyro.conf.subcommand("join")]
    | Annotated[Invite, tyro.conf.subcommand("invite")]
    | Annotated[Identity, tyro.conf.subcommand("identity")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Ledger, tyro.conf.subcommand("ledger")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Runs, tyro.conf.subcommand("runs")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Monitor, tyro.conf.subcommand("monitor")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Ray, tyro.conf.subcommand("ray")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Config, tyro.conf.subcommand("config")]
    | Annotated[Completion, tyro.conf.subcommand("completion")],
    None,
]


def _commands() -> dict[str, Any]:
    """Their classes, by name."""
    return {kind.__metadata__[0].name: kind.__origin__ for kind in get_args(get_args(Command)[0])}


def _in_brief() -> Any:
    """`Command` for the list of all commands: of what each says of itself the first paragraph."""
    annotated: Any = Annotated  # of types that are known only now
    brief: Any = None
    for name, command in _commands().items():
        first = " ".join((command.__doc__ or "").partition("\n\n")[0].split())
        named = annotated[command, tyro.conf.subcommand(name, description=first)]
        brief = named if brief is None else brief | named
    return brief


_COMPUTING = frozenset({"verify", "snapshots"})
"""Threads that may still be inside of a kernel when all else is over."""


def entry() -> NoReturn:
    """The program. Ends at once where a thread still computes: an interpreter that is torn down around it
    crashes now and then (SIGSEGV, SIGABRT), after everything was done."""
    signal.signal(signal.SIGTERM, _leave)
    code = main()
    if any(thread.daemon and thread.name in _COMPUTING for thread in threading.enumerate()):
        os._exit(code)  # `main` has flushed what was printed
    gc.freeze()  # to look through all that torch has made once more, before it goes, takes 0.6 s
    sys.exit(code)


def _leave(number: int, _frame: object) -> NoReturn:
    """Of commands that do not stop in a way of their own: folders and processes are cleared away."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """The `thinwire` command. Returns the exit code."""
    return until_the_pipe_is_closed(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    try:
        return _obey(argv)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, sqlite3.Error) as e:
        if (told := disk_error(e)) is None:
            raise
        to_stderr(f"thinwire: {told}")
        return told.exit_code


def _obey(argv: Sequence[str]) -> int:
    # Before torch is loaded, whose threads else spin while they have nothing to do: where a machine does
    # anything besides, a step of a small model took ten times the CPU time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Loading torch makes a million objects that stay; to look through them again and again for what may go
    # took a sixth of a node's start.
    gc.set_threshold(50_000, 20, 100)
    if list(argv) in (["--version"], ["-V"]):
        print_version()
        return 0
    command = _read(with_whole_tickets(argv))
    if command is None:
        return ConfigError.exit_code
    end_with_parent()
    tells_itself = isinstance(command, Bench | Compare | Demo | Doctor | Status)  # shown, not logged
    chatty = logging.DEBUG if getattr(command, "verbose", False) else logging.INFO
    prefix = os.environ.pop(PREFIX_VARIABLE, "")
    log_to_stderr(logging.WARNING if tells_itself else chatty, prefix)
    try:
        code: int = command.run_with(Command) if isinstance(command, Completion) else command.run()
    except ThinwireError as e:
        to_stderr(f"{prefix}thinwire: {e}")
        return e.exit_code
    return code


def _read(words: list[str]) -> Any:
    """The command that they are, with its options; None: there is none of that name, which has been said."""
    known, name = _commands(), words[0] if words else ""
    config = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    if name in known:  # alone: what is wrong with its options is told by those that it has
        return tyro.cli(known[name], prog=f"thinwire {name}", args=words[1:], config=config)
    if name and not name.startswith("-"):
        to_stderr(f"thinwire: there is no command {name!r}: {nearest(name, known)}")
        return None
    return tyro.cli(
        _in_brief(),
        prog="thinwire",
        description="Train one model on many machines joined by thin, unreliable links. --version says which "
        "thinwire this is, thinwire COMMAND --help what a command does and takes.",
        args=words,
        config=config,
    )


if __name__ == "__main__":
    entry()
