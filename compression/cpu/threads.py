"""Sharing a compiled loop among threads without numba's own threading layers.

numba's default layer must not be entered by two threads at once, and many peers of a test are threads of one
process. Kernels release the GIL instead, and take their share of a range on a small pool.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import count
from typing import Final, TypeVar

T = TypeVar("T")

_RANGES_PER_THREAD: Final = 4


def share(run: Callable[[int, int], T], first: int, last: int, smallest: int) -> list[T]:
    """Calls run(a, b) for ranges that cover [first, last), on as many threads as torch may use here.

    No range is below `smallest` long: handing over less costs more than it saves. Results in order, of as
    many even ranges as there are. A thread that is done takes the next range, and nobody waits for one that
    did not get to run: cores may have other work to do.
    """
    import torch  # by then it is loaded; to know where kernels are kept takes none

    n_threads = min(torch.get_num_threads(), (last - first) // smallest)
    if n_threads <= 1:
        return [run(first, last)]
    n = min(_RANGES_PER_THREAD * n_threads, (last - first) // smallest)
    cuts = [first + (last - first) * i // n for i in range(n + 1)]
    results: dict[int, T] = {}
    numbers = count()  # taking the next one is one step of the interpreter

    def work() -> None:
        while (i := next(numbers)) < n:
            results[i] = run(cuts[i], cuts[i + 1])

    futures = [_pool(n_threads - 1, os.getpid()).submit(work) for _ in range(n_threads - 1)]
    try:
        work()
    finally:
        started = [f for f in futures if not f.cancel()]
        wait(started)
    for f in started:
        f.result()
    return [results[i] for i in range(n)]


@cache
def _pool(n_threads: int, pid: int) -> ThreadPoolExecutor:
    """`pid` because a forked child inherits the pool's object but none of its threads."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix=f"thinwire-{pid}")
