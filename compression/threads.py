"""Sharing a compiled loop among threads without numba's own threading layers.

numba's default layer must not be entered by two threads at once, and many peers of a test are threads of one
process. Kernels release the GIL instead, and take their share of a range on a small pool.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")


def share(run: Callable[[int, int], T], first: int, last: int, smallest: int) -> list[T]:
    """Calls run(a, b) for ranges that cover [first, last), on as many threads as torch may use here.

    No range is below `smallest` long: handing over less costs more than it saves. Results in order.
    """
    n = min(torch.get_num_threads(), (last - first) // smallest)
    if n <= 1:
        return [run(first, last)]
    cuts = [first + (last - first) * i // n for i in range(n + 1)]
    mine, *theirs = pairwise(cuts)
    futures = [_pool(n - 1, os.getpid()).submit(run, a, b) for a, b in theirs]
    return [run(*mine), *(f.result() for f in futures)]


@cache
def _pool(n_threads: int, pid: int) -> ThreadPoolExecutor:
    """`pid` because a forked child inherits the pool's object but none of its threads."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix=f"thinwire-{pid}")
