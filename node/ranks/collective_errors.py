"""What fails on one rank of a node fails on all of them, so that they stay in step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgpack

from ...compression.errors import (
    ConfigError,
    Incompatible,
    LedgerCorrupt,
    ReplicaDiverged,
    SwarmUnreachable,
    ThinwireError,
)
from ...optim.parts.ranks import Ranks

_KINDS: Final = {
    kind.__name__: kind
    for kind in (ConfigError, Incompatible, LedgerCorrupt, ReplicaDiverged, SwarmUnreachable, ThinwireError)
}


@contextmanager
def collective_errors(ranks: Ranks) -> Iterator[None]:
    """For work without collectives: a ThinwireError or OSError of any rank is raised on every rank. (With
    whatever else is wrong a rank ends, and its node with it.)"""
    if ranks.count == 1:
        yield
        return
    error: ThinwireError | OSError | None = None
    try:
        yield
    except (ThinwireError, OSError) as e:
        error = e
    told = b"" if error is None else msgpack.packb([_kind_of(error), str(error)])
    answers = ranks.gather(told)
    if error is not None:
        raise error
    for index, answer in enumerate(answers):
        if answer:
            kind, text = msgpack.unpackb(answer)
            raise _KINDS.get(kind, OSError)(f"rank {index}: {text}")


def _kind_of(error: ThinwireError | OSError) -> str:
    return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "OSError")
