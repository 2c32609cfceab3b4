"""How much memory tensors take, and took at most: what an allocator would tell, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active: `peak_bytes`, the most that the memory behind tensors came to, after any operation that
    made some.

    Counted are tensors that are given at the start, and what operations make; memory that several tensors
    share counts once. What one operation needs inside of itself is not seen.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak_bytes = 0
        self._see(tensors)

    def bytes(self) -> int:
        """Right now."""
        refs = list(self._storages.values())  # looking may end one
        live = [storage for ref in refs if (storage := ref()) is not None]
        return sum(storage.nbytes() for storage in live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._see(t for t in tree_iter(out) if isinstance(t, Tensor))
        return out

    def _see(self, tensors: Iterable[Tensor]) -> None:
        is_news = False
        for t in tensors:
            local = getattr(t, "_local_tensor", t)  # of a DTensor
            if local.device.type == "meta":
                continue
            storage = local.untyped_storage()
            if id(storage) not in self._storages:
                self._storages[id(storage)] = weakref.ref(storage, self._forget(id(storage)))
                is_news = True
        if is_news:  # looking through all of them takes longer than most operations
            self.peak_bytes = max(self.peak_bytes, self.bytes())

    def _forget(self, key: int) -> Any:
        return lambda _ref: self._storages.pop(key, None)
