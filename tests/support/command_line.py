"""The command line as `thinwire` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tyro

from thinwire.node.cli import main


def parsed(args: Sequence[str]) -> Any:
    """The command that `thinwire ARGS` would run. An unknown option is a SystemExit."""
    as_in_main = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    return tyro.cli(main.Command, args=args, config=as_in_main)
