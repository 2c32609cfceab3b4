"""What fails on one rank of a node fails on all of them, so that they stay in step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgpack

from ...compression.errors import ThinwireError, error_name, named_error
from ...optim.parts.ranks import Ranks

_OS_ERROR: Final = "OSError"


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
    told = b"" if error is None else msgpack.packb([_name(error), str(error)])
    answers = ranks.gather(told)
    if error is not None:
        raise error
    for index, answer in enumerate(answers):
        if answer:
            name, text = msgpack.unpackb(answer)
            raise _error(name, f"rank {index}: {text}")


def _name(error: ThinwireError | OSError) -> str:
    return error_name(error) if isinstance(error, ThinwireError) else _OS_ERROR


def _error(name: str, text: str) -> ThinwireError | OSError:
    return OSError(text) if name == _OS_ERROR else named_error(name, text)
