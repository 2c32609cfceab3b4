"""Text to train on: built-in corpora, files and folders."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from ...compression.errors import ConfigError


def _pydoc_text() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def _stdlib_text() -> bytes:
    folder = Path(importlib.import_module("json").__file__ or "").parent.parent
    return b"\n".join(p.read_bytes() for p in sorted(folder.glob("*.py")))


BUILT_IN: dict[str, Callable[[], bytes]] = {"pydoc": _pydoc_text, "stdlib": _stdlib_text}


def read_text(corpus: str) -> bytes:
    """A built-in corpus by name, a file, or all text files of a folder in name order. Raises ConfigError."""
    if corpus in BUILT_IN:
        return BUILT_IN[corpus]()
    path = Path(corpus)
    try:
        if path.is_file():
            return path.read_bytes()
        texts = [t for p in sorted(path.rglob("*")) if p.is_file() and (t := _utf8(p)) is not None]
    except OSError as e:
        raise ConfigError(f"cannot read the text {corpus}: {e}") from e
    if not texts:
        raise ConfigError(
            f"no text at {corpus!r}: name a file, a folder of text files, "
            f"or one of {', '.join(sorted(BUILT_IN))}"
        )
    return b"\n".join(texts)


def _utf8(path: Path) -> bytes | None:
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return data
