"""What differential privacy a peer's noise gives: by dp-accounting, an extra (`thinwire[privacy]`)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from ...compression.errors import ConfigError, nearest
from ..options import Number

_BOUNDS: Final = {"clip": Number(above=0), "noise": Number(above=0), "delta": Number(above=0, below=1)}


def epsilon(noise: float, n_rounds: int, delta: float) -> float:
    """Of a peer against everybody else, after so many rounds, for data that are replaced as a whole. `noise`:
    of a round, against the length that its steps are cut to. Raises ConfigError."""
    accountant = _package("rdp").RdpAccountant()
    accountant.compose(_package("dp_event").GaussianDpEvent(noise / 2), n_rounds)  # two lengths apart
    return float(accountant.get_epsilon(delta))


def check_privacy(privacy: object) -> None:
    """Raises ConfigError."""
    if not isinstance(privacy, Mapping):
        raise ConfigError("privacy: a table, e.g. { clip = 1.0, noise = 4.0, delta = 1e-5 }")
    for key in privacy.keys() - _BOUNDS.keys():
        raise ConfigError(f"privacy has no {key!r}: {nearest(key, _BOUNDS)}")
    for key, rule in _BOUNDS.items() if privacy else ():
        if (must := rule.refusal(privacy.get(key), {})) is not None:
            raise ConfigError(f"privacy.{key} = {privacy.get(key)!r}: {must}")


def require_accountant() -> None:
    """Raises ConfigError: the package is not there."""
    _package("rdp")


def in_words(privacy: Mapping[str, Any]) -> str:
    """What it comes to. Raises ConfigError: the package is not there."""
    noise, delta = float(privacy["noise"]), float(privacy["delta"])
    each = [f"{epsilon(noise, n, delta):.3g} after {n:,}" for n in (100, 1000, 10_000)]
    return f"privacy: epsilon {', '.join(each)} rounds (delta {delta:g}), of a peer's data as a whole"


def _package(name: str) -> Any:
    try:
        return import_module(f"dp_accounting.{name}")
    except ImportError as e:
        raise ConfigError(
            f"privacy needs the package dp-accounting on every node ({e}): pip install 'thinwire[privacy]'"
        ) from e
