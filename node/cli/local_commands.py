"""The commands around a run, which need no swarm. What they do is loaded when they run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from ...compression.errors import ConfigError

NoPairs = tyro.conf.FlagCreatePairsOff


def print_version() -> None:
    """The release, what it understands, and the machine's parts that matter."""
    from importlib.metadata import PackageNotFoundError, version

    from ...coordinator.protocol.messages import PROTOCOL_VERSION

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    python = ".".join(map(str, sys.version_info[:3]))
    parts = f"protocol {PROTOCOL_VERSION}, Python {python}, torch {of('torch')}"
    print(f"thinwire {of('thinwire')} ({parts})")  # noqa: T201 - data goes to stdout


@dataclass
class Config:
    """What a run file may say."""

    reference: Annotated[bool, NoPairs] = False
    """Every key with its type, default, range and meaning, as a page in Markdown."""

    def run(self) -> int:
        from ..run_files.reference import reference

        if not self.reference:
            raise ConfigError("write it as thinwire config --reference; thinwire init writes a run file")
        print(reference(), end="")  # noqa: T201 - data goes to stdout
        return 0
