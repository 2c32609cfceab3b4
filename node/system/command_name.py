"""How the user calls this program: a hint names a command that exists, also where nothing is activated."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

COMMAND_VARIABLE: Final = "THINWIRE_COMMAND"

_HINT: Final = re.compile(
    r"(?<![\w/.-])thinwire(?= (?:bench|compare|completion|config|coordinator|demo|doctor|export|generate"
    r"|identity|init|invite|join|ledger|monitor|plan|ray|replay|run|runs|status)\b)"
)


def command_name(argv0: str, which: Callable[[str], str | None] = shutil.which) -> str:
    """`thinwire` if a shell finds it, else the path that it was started by (.venv/bin/thinwire)."""
    if which("thinwire") is None and Path(argv0).name == "thinwire" and Path(argv0).exists():
        return argv0
    return "thinwire"


@cache
def _ours() -> str:
    return os.environ.get(COMMAND_VARIABLE) or command_name(sys.argv[0])


def name_for_children() -> dict[str, str]:
    """A variable of the environment, so that our own child processes name it as the user has."""
    return {COMMAND_VARIABLE: _ours()}


def as_typed(text: str, name: str | None = None) -> str:
    """The text with every `thinwire COMMAND` as this user has to type it."""
    name = _ours() if name is None else name
    return text if name == "thinwire" else _HINT.sub(lambda _: name, text)
