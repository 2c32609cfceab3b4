"""Errors keep their kind when one process tells another of them."""

from __future__ import annotations

import pytest

from thinwire.compression.errors import (
    BadPayload,
    ConfigError,
    Incompatible,
    LedgerCorrupt,
    ReplicaDiverged,
    SwarmUnreachable,
    ThinwireError,
    error_name,
    named_error,
)


class Nearer(SwarmUnreachable):
    """A kind that the other process may not know."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((kind("why"), kind) for kind in (ConfigError, Incompatible, LedgerCorrupt, ReplicaDiverged)),
        (Nearer("why"), SwarmUnreachable),
        (BadPayload("nan", "why"), ThinwireError),
        (OSError("why"), ThinwireError),
    ],
)
def test_the_other_process_raises_the_nearest_kind(error: Exception, kind: type[ThinwireError]) -> None:
    told = named_error(error_name(error), str(error))
    assert type(told) is kind
    assert str(told) == str(error)


def test_a_name_that_nobody_knows() -> None:
    assert type(named_error("KeyError", "why")) is ThinwireError
