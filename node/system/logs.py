"""What thinwire logs, on standard error."""

from __future__ import annotations

import logging
import sys


def log_to_stderr(level: int, prefix: str = "") -> None:
    """What thinwire logs, for people to read."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("thinwire")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
