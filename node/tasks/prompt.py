"""Prompts: text with the fields of a document in braces, "{text} It was".

`{review.text}` is a field inside of another, `{answers.0}` the first of a list; any character but a brace may
be in a name, and spaces around it are left out (unless the field's own name has them). Two braces stand for
one that is text: `{{` and `}}`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ...compression.errors import ConfigError
from .documents import Document

_PIECE: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """`pieces`: texts and, as those that are True, names of fields."""

    pieces: tuple[tuple[str, bool], ...]

    @classmethod
    def of(cls, text: str) -> PromptTemplate:
        """Raises ConfigError: a brace alone, a field without a name, no field."""
        pieces = tuple(_piece(match, text) for match in _PIECE.finditer(text))
        if not any(is_field for _, is_field in pieces):
            raise ConfigError('task.prompt: no field in it; write one in braces, "{text} It was"')
        return cls(pieces)

    def filled(self, document: Document) -> str:
        """Raises ConfigError that names the document and lists its fields."""
        return "".join(_value(document, name) if is_field else name for name, is_field in self.pieces)

    def is_empty(self, document: Document) -> bool:
        """Whether no field has anything but space."""
        return not any(_value(document, name).strip() for name, is_field in self.pieces if is_field)


def _piece(match: re.Match[str], text: str) -> tuple[str, bool]:
    if match[0] in ("{{", "}}"):
        return match[0][0], False
    if match[0] in ("{", "}"):
        raise ConfigError(
            f"task.prompt: the {match[0]!r} at character {match.start() + 1} of {text!r} has no other half; "
            f"write {match[0] * 2!r} for a brace that is text"
        )
    if match[1] is not None and not match[1].strip():
        raise ConfigError(
            f"task.prompt: {match[0]!r} names no field; write '{{{{}}}}' for braces that are text"
        )
    return (match[0], False) if match[1] is None else (match[1], True)


def _value(document: Document, name: str) -> str:
    return document.text(name if name in document.fields else name.strip(), "prompt")
