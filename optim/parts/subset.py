"""Which parameters a strategy trains, by name; the rest are frozen, and no part of the replicated state."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from ...compression.errors import ConfigError
from ..base import NamedParameters, canonical_name, named_of


def selected(named_parameters: NamedParameters, patterns: str) -> NamedParameters:
    """What matches one of the patterns, which commas separate: "*.bias,head.*", or as part of a name: "lora".

    Groups stay groups; those without a match are left out. Raises ConfigError when nothing matches.
    """
    if not isinstance(patterns, str):
        raise ConfigError(f'params = {patterns!r}: write patterns for names, "lora" or "*.bias,head.*"')
    if patterns == "*":
        return named_parameters
    words = [w.strip() for w in patterns.split(",") if w.strip()]
    entries: list[Any] = list(named_parameters)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    kept, names = [], []
    for group in groups:
        named = [(canonical_name(name), p) for name, p in named_of(group)]
        names += [name for name, _ in named]
        if matching := [(name, p) for name, p in named if _matches(name, words)]:
            options = {k: v for k, v in group.items() if k != "param_names"}
            kept.append({**options, "params": matching})
    if not kept:
        there_are = f"there are {', '.join(names[:3])}" if names else "there are none"
        raise ConfigError(f"params = {patterns!r} matches no parameter: {there_are}")
    return kept


def _matches(name: str, words: Sequence[str]) -> bool:
    return any(fnmatchcase(name, w) if set(w) & set("*?[") else w in name for w in words)
