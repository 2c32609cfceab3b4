"""Tokens by class: examples by their label, text by sections (see `classes`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...compression.errors import ConfigError
from .classes import Classes, Piece, section_names, sections
from .hf_data import Prompts, Stream, Tokenizer, Tokens, to_bytes

Both = tuple[Tokens, Tokens, Tokenizer]
"""Tokens to train on, those held out, and what made them."""


def by_label(labels: Sequence[str], both: Both) -> Classes:
    """Labels that no example has are no classes. Raises ConfigError for a single one."""
    tokens, held_out, tokenizer = both
    assert isinstance(tokens, Prompts)
    examples = [np.flatnonzero(tokens.answers == i) for i in range(len(labels))]
    there = [i for i, some in enumerate(examples) if len(some)]
    if len(there) < 2:
        raise ConfigError(
            f"all examples have the label {labels[there[0]]!r}: there are no classes to deal out"
        )

    def taken(pieces: Sequence[Piece]) -> bytes:
        chosen = [examples[there[p.number]][p.start : p.stop] for p in pieces]
        return to_bytes(tokens.take(np.concatenate(chosen)))

    names, sizes = tuple(labels[i] for i in there), tuple(len(examples[i]) for i in there)
    return Classes(names, sizes, "examples", taken, to_bytes(held_out, tokenizer))


def by_section(both: Both, n_sections: int, *, has_own: bool) -> tuple[Both, Classes]:
    """The same, but what is held out is of all sections; `has_own`: it is no part of them, and stays."""
    tokens, held_out, tokenizer = both
    assert isinstance(tokens, Stream)
    assert isinstance(held_out, Stream)
    whole = tokens.ids if has_own else np.concatenate([tokens.ids, held_out.ids])
    cut = sections(len(whole), 0 if has_own else len(held_out.ids), n_sections)
    parts = [whole[s.start : s.border] for s in cut]
    if not has_own:
        kept = np.concatenate([whole[s.border : s.stop] for s in cut])
        held_out = Stream(kept, held_out.n_bytes)
    trained = Stream(np.concatenate(parts), tokens.n_bytes)

    def taken(pieces: Sequence[Piece]) -> bytes:
        return to_bytes(Stream(np.concatenate([parts[p.number][p.start : p.stop] for p in pieces])))

    classes = Classes(
        section_names(n_sections), tuple(map(len, parts)), "tokens", taken, to_bytes(held_out, tokenizer)
    )
    return (trained, held_out, tokenizer), classes
