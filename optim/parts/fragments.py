"""Streaming DiLoCo's fragments (arXiv 2501.18512): which parameters are synchronised together.

A unit is a layer ("blocks.3" of "blocks.3.attention.weight") or else a module ("embed" of "embed.weight").
Units are dealt out in turn, in the order of their names with numbers as numbers: layers of one fragment are
strided.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...compression.errors import ConfigError


def fragments_of(names: Sequence[str], n_fragments: int) -> dict[str, int]:
    """Parameter name -> its fragment. Raises ConfigError when there are fewer units than fragments."""
    if n_fragments == 1:
        return dict.fromkeys(names, 0)
    units = sorted({unit_of(name) for name in names}, key=_natural)
    if len(units) < n_fragments:
        raise ConfigError(f"fragments = {n_fragments}: the model has {len(units)} layers and other modules")
    number = {unit: i % n_fragments for i, unit in enumerate(units)}
    return {name: number[unit_of(name)] for name in names}


def unit_of(name: str) -> str:
    """Up to the first number between dots; without one, the module that the parameter is of."""
    numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", name)
    return numbered[0] if numbered else name.rpartition(".")[0] or name


def _natural(unit: str) -> list[tuple[int, int, str]]:
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in unit.split(".")]
