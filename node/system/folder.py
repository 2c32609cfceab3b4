"""Where a node keeps what survives it: identity, its copy of the ledger, snapshots; and where a run's
coordinator does."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ...compression.errors import ConfigError
from ...coordinator.protocol.files import KEY_NAMES, FolderLock

log = logging.getLogger("thinwire.cli")

IDENTITY_NAME = KEY_NAMES["node"]
"""A node's key, in its folder: who has it is that peer."""

MAX_NODES = 64
"""Nodes of one user on one machine that find a folder by themselves."""


class NodeFolder:
    """A locked folder. `path` None: the first of the user's default ones that no other node has now, so that
    a node that is started again goes on where it was.

    Raises ConfigError when the folder is in use or cannot be made.
    """

    def __init__(self, path: Path | None, environ: Mapping[str, str] = os.environ) -> None:
        if path is None:
            self.path, self._lock = _first_free(default_folder(environ))
        else:
            self.path, self._lock = path, FolderLock(path, "node")

    def close(self) -> None:
        """Gives the folder back."""
        self._lock.close()


def default_folder(environ: Mapping[str, str]) -> Path:
    """$XDG_STATE_HOME/thinwire, or what stands for it."""
    home = environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "thinwire"


def folder_of_run(
    name: str, kind: Literal["coordinator", "ray"], environ: Mapping[str, str] = os.environ
) -> Path:
    """Where the coordinator of the run `name` keeps its state unless told: in the user's state directory, as
    nodes do; or in NAME-KIND of the working directory, if an earlier thinwire has begun it there."""
    here = Path(f"{name}-{kind}")
    if (here / "ledger.db").exists():
        log.info("going on in %s, where an earlier thinwire kept this run", here.absolute())
        return here
    return default_folder(environ) / f"{name.replace(os.sep, '-')}-{kind}"


def _first_free(folder: Path) -> tuple[Path, FolderLock]:
    for i in range(MAX_NODES):
        path = folder / f"node-{i}"
        try:
            return path, FolderLock(path, "node")
        except ConfigError:
            if not path.exists():
                raise
    raise ConfigError(f"{folder} has {MAX_NODES} nodes in use: name a folder with --state")
