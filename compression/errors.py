"""Errors, named by what the caller does next, and how one process tells another of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final, Literal

BadReason = Literal[
    "truncated",  # fewer bytes than the lengths promise
    "oversized",  # more bytes, entries or elements than the run's limits allow
    "magic",  # not a thinwire payload
    "version",  # a payload of another protocol version
    "round",  # made for another round
    "layout",  # made for another model or strategy
    "header",  # header that does not parse, or claims what nobody expects
    "checksum",  # bytes changed on the way
    "shape",  # lengths that do not fit the parameter
    "range",  # a value outside of what the format allows
    "nan",  # NaN or infinity
    "zstd",  # a zstandard frame that does not hold what is expected
    "index",  # index past the end, repeated or out of order
]


class ThinwireError(Exception):
    """Base of all errors that thinwire raises on purpose; `exit_code` is what a command returns for it."""

    exit_code = 1


class ConfigError(ThinwireError):
    """The user's input is wrong: mend it and start again."""

    exit_code = 2


class SwarmUnreachable(ThinwireError):
    """Nobody answers: retry with backoff, then give up."""

    exit_code = 3


class Incompatible(ThinwireError):
    """Model, strategy or protocol differ from the run's: this node cannot take part."""

    exit_code = 4


class BadPayload(ThinwireError):
    """A payload that must not be used: leave it out and count `reason`."""

    def __init__(self, reason: BadReason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason: BadReason = reason


class ReplicaDiverged(ThinwireError):
    """This replica is not what the ledger says: heal it from a snapshot and the ledger."""


class LedgerCorrupt(ThinwireError):
    """The ledger is not a chain of signed commits any more: refuse to go on."""


class DiskError(ThinwireError):
    """A disk is full, read-only or broken: see to it, then the same command goes on."""


_BY_NAME: Final[dict[str, type[ThinwireError]]] = {
    kind.__name__: kind
    for kind in (ConfigError, SwarmUnreachable, Incompatible, ReplicaDiverged, LedgerCorrupt)
}


def error_name(error: BaseException) -> str:
    """What another process is told of the kind of an error: the class above that it belongs to.

    "ThinwireError" for every other one.
    """
    return next((name for name, kind in _BY_NAME.items() if isinstance(error, kind)), ThinwireError.__name__)


def named_error(name: str, text: str) -> ThinwireError:
    """The error that another process has told of by `error_name`; the caller raises it."""
    return _BY_NAME.get(name, ThinwireError)(text)


def first_line(error: BaseException) -> str:
    """What a library says of an error; where it says nothing, the error's kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(value: object, known: Iterable[str]) -> str:
    """What to write instead of an unknown name, for the words of a ConfigError."""
    known = sorted(known)
    close = get_close_matches(str(value), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"one of {', '.join(known)}"
