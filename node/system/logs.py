"""What thinwire logs, on standard error."""

from __future__ import annotations

import logging
import sys

from .command_name import as_typed
from .output import shown

PREFIX_VARIABLE = "THINWIRE_LOG_PREFIX"
"""Of a child's environment: what its lines begin with, so that they are told apart from its parent's."""


class _Hinting(logging.Formatter):
    """Commands that a line names are those of this user; nothing in it moves the cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(as_typed(super().format(record)))


def log_to_stderr(level: int, prefix: str = "") -> None:
    """What thinwire logs, for people to read."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Hinting(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("thinwire")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
