"""Checks of options: each names the option, what it was given and what it may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from math import isfinite
from typing import Any

from ..compression.errors import ConfigError


def real(
    options: Mapping[str, Any],
    name: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raises ConfigError unless options[name] is a finite number within the bounds."""
    value = options[name]
    bounds = [(at_least, ">="), (above, ">"), (at_most, "<="), (below, "<")]
    words = " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None)
    good = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    good = good and (at_least is None or value >= at_least)
    good = good and (above is None or value > above)
    good = good and (at_most is None or value <= at_most)
    good = good and (below is None or value < below)
    if not good:
        raise ConfigError(f"{name} = {value!r}: must be a number {words}".rstrip())


def whole(options: Mapping[str, Any], name: str, *, at_least: int, at_most: int) -> None:
    """Raises ConfigError unless options[name] is an integer in [at_least, at_most]."""
    value = options[name]
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= at_most:
        raise ConfigError(f"{name} = {value!r}: must be a whole number from {at_least} to {at_most}")


def truth(options: Mapping[str, Any], name: str) -> None:
    """Raises ConfigError unless options[name] is true or false."""
    if not isinstance(options[name], bool):
        raise ConfigError(f"{name} = {options[name]!r}: must be true or false")


def choice(options: Mapping[str, Any], name: str, known: Iterable[str]) -> None:
    """Raises ConfigError unless options[name] is one of `known`."""
    value, known = options[name], list(known)
    if value not in known:
        raise ConfigError(f"{name} = {value!r}: {nearest(value, known)}")


def nearest(value: object, known: Iterable[str]) -> str:
    """What to write instead of an unknown name."""
    known = sorted(known)
    close = get_close_matches(str(value), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"one of {', '.join(known)}"
