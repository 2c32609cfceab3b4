"""A small disk that can be filled up: a tmpfs over a folder, where this user may mount one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """Mounted at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Nothing fits any more. What is there stays."""
        with self._filler.open("wb", buffering=0) as file:
            for n_bytes in (64 * 1024, 4096, 1):
                try:
                    while True:
                        file.write(bytes(n_bytes))
                except OSError:
                    continue

    def free(self) -> None:
        self._filler.unlink()


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Disk]:
    """Skips the test where mounting is not allowed. Whoever uses the folder has ended when this does."""
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={n_bytes},mode=0700", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)
