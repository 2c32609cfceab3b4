"""Files of text: what a name ends in, what they are packed with, and how their characters are written."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from ...compression.errors import ConfigError

MAX_LINE_CHARS: Final = 64 * 2**20
"""Of one document: a packed file of a few bytes can hold more than any memory."""

MAX_UNPACKED: Final = 4 * 2**30
"""Bytes, or characters, of a packed file that is read in one piece."""

_UNPACKED_BY: Final[dict[str, Callable[..., Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_STRANGE: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
}
_MARKS: Final = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def kind_of(path: Path) -> str:
    """`a.JSONL.gz` -> `.jsonl`: what the file holds, whatever it is packed with."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in (*_UNPACKED_BY, ".zst", ".zip"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_bytes(path: Path) -> bytes:
    """All of the file, unpacked. Raises ConfigError: not there, cut off, packed in another way."""
    with reading(path), _unpacked(path) as file:
        data: bytes = _whole(file, path)
    refuse_strange(path, data[:8])
    return data


def read_text(path: Path) -> str:
    """The same as characters: a byte order mark is none of them, every line ends in one newline."""
    with opened(path) as text:
        whole: str = _whole(text, path)
        return whole


def _whole(file: IO[Any], path: Path) -> Any:
    """All of it; what a packed file unpacks to is bounded. Raises ConfigError."""
    if path.suffix.lower() not in _UNPACKED_BY:
        return file.read()
    data = file.read(MAX_UNPACKED + 1)
    if len(data) > MAX_UNPACKED:
        raise ConfigError(
            f"{path}: unpacks to more than {MAX_UNPACKED >> 30} GiB: unpack it, if it is meant so"
        )
    return data


@contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """The file's characters, unpacked. `newline`: as in `open`. What goes wrong while it is read becomes a
    ConfigError that names the file."""
    with reading(path), _unpacked(path) as file:
        buffered = io.BufferedReader(file) if not isinstance(file, io.BufferedReader) else file
        start = buffered.peek(8)[:8]
        refuse_strange(path, start)
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
        with io.TextIOWrapper(buffered, encoding=encoding, newline=newline) as text:
            yield text


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises ConfigError for what reading a file may raise."""
    try:
        yield
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 text: {e}. Save it as UTF-8") from e
    except (EOFError, zlib.error, lzma.LZMAError) as e:
        raise ConfigError(f"{path}: cannot be unpacked, is it whole? {e}") from e
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}") from e


def refuse_strange(path: Path, start: bytes) -> None:
    """Raises ConfigError if the first bytes are of a file that is packed or in columns, whatever its name."""
    for magic, name in _STRANGE.items():
        if start.startswith(magic):
            raise ConfigError(
                f"{path}: this is {name}, no text. Unpacked here is what ends in "
                f"{', '.join(_UNPACKED_BY)}; .parquet and .arrow are read by the task 'hf'"
            )


def _unpacked(path: Path) -> Any:
    return _UNPACKED_BY.get(path.suffix.lower(), open)(path, "rb")
