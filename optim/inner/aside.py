"""Tensors that wait where training needs no memory: of a GPU in the machine's, of a CPU in a file without a
name, which is gone with the process."""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ...compression.errors import DiskError


class Aside:
    """By key, bit for bit. `folder`: of the file; None: the system's for temporary ones."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._offsets: dict[str, int] = {}
        self._end = 0
        self._waiting: dict[str, Tensor | None] = {}
        """On the host; None: in the file."""

    def __contains__(self, key: str) -> bool:
        return key in self._waiting

    def put(self, key: str, x: Tensor) -> None:
        """Copies it; a key always has tensors of one size. Raises DiskError where the disk has no room."""
        if x.device.type != "cpu":
            self._waiting[key] = x.to("cpu", copy=True)
            return
        values = x.detach().contiguous().view(-1).numpy()
        if key not in self._offsets:
            self._offsets[key] = self._end
            self._end += values.nbytes
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.seek(self._offsets[key])
            self._file.write(values.data)
            self._file.flush()
        except OSError as e:
            if self._file is not None:
                with contextlib.suppress(OSError):  # else it tries once more when the process ends
                    self._file.close()
            folder = self._folder or tempfile.gettempdir()
            raise DiskError(
                f"--offload-idle: {folder} cannot be written: {e.strerror}. Make room there (df -h "
                f"{folder}), or leave that option out; then the same command goes on"
            ) from e
        self._waiting[key] = None

    def take(self, key: str, like: Tensor) -> Tensor:
        """A new tensor of `like`'s shape and device, once."""
        kept, found = self._waiting.pop(key), torch.empty(like.shape, dtype=like.dtype, device=like.device)
        if kept is not None:
            return found.copy_(kept)
        assert self._file is not None
        values = found.view(-1).numpy().data.cast("B")
        self._file.seek(self._offsets[key])
        if self._file.readinto(values) != len(values):  # type: ignore[attr-defined]
            raise OSError(f"{self._folder}: the file of what waits is shorter than it was")
        return found
