"""Text to train on: built-in corpora, files and folders."""

from __future__ import annotations

import codecs
import importlib
from collections.abc import Callable
from pathlib import Path

from ...compression.errors import ConfigError
from . import files


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
            return _bytes(path)
        texts = [t for p in sorted(path.rglob("*")) if p.is_file() and (t := _utf8(p)) is not None]
    except OSError as e:
        raise ConfigError(f"cannot read the text {corpus}: {e}") from e
    if not texts:
        raise ConfigError(
            f"no text at {corpus!r}: name a file, a folder of text files, "
            f"or one of {', '.join(sorted(BUILT_IN))}"
        )
    return b"\n".join(texts)


def _bytes(path: Path) -> bytes:
    """Unpacked; a byte order mark is not of the text."""
    return files.read_bytes(path).removeprefix(codecs.BOM_UTF8)


def _utf8(path: Path) -> bytes | None:
    try:
        data = _bytes(path)
        data.decode("utf-8")
    except (ConfigError, UnicodeDecodeError):
        return None
    return data
