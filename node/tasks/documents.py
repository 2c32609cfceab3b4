"""Documents: the rows of text files, JSON Lines, JSON, CSV, Parquet and Arrow files, folders and data sets.

JSON and CSV are read here, so that a string stays the string that the file has and an error names file and
line, the same in one file, in a folder and packed; `datasets` reads what is in columns already.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

from ...compression.errors import ConfigError, first_line
from ...coordinator.protocol.figures import counted
from .. import config
from . import files
from .corpora import BUILT_IN

log = logging.getLogger("thinwire.node")

_LINES: Final = (".jsonl", ".ndjson")
_TABLES: Final = {".csv": ",", ".tsv": "\t"}
_COLUMNS: Final = {".parquet": "parquet", ".arrow": "arrow"}
_DATA: Final = (*_LINES, ".json", *_TABLES, *_COLUMNS)
_TEXTS: Final = ("", ".txt", ".text", ".md", ".rst", ".py")
_MAX_JSON_CHARS: Final = 2**30
_MAX_SHOWN_CHARS: Final = 500
_ABSENT: Final = object()


@dataclass(frozen=True, slots=True)
class Document:
    """The fields of a row. `file`: where it was read; `at`: "line 7"."""

    fields: Mapping[str, Any]
    file: str
    at: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}, {self.at}" if self.at else self.file

    def text(self, field: str, option: str) -> str:
        """A field as text. `field`: its name, or a path into what is nested, "review.text", "answers.0".
        Raises ConfigError, which names the place, and the fields that are there."""
        value = self.value(field, option)
        if isinstance(value, bool):
            return "true" if value else "false"
        if not isinstance(value, str | int | float):
            raise ConfigError(f"task.{option}: {field!r} of {self.where} is {type(value).__name__}, no text")
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ConfigError(f"task.{option}: {field!r} of {self.where} is no text: {e}") from e
        return text

    def value(self, field: str, option: str) -> Any:
        """The same as the file has it; never null."""
        try:
            value = _within(self.fields, field)
        except KeyError:
            there = _few_chars(", ".join(sorted(_paths(self.fields))) or "none")
            hint = _chat_hint(self.fields, option)
            raise ConfigError(
                f"task.{option}: {self.where} has no {field!r}; its fields are {there}{hint}"
            ) from None
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise ConfigError(
                f"task.{option}: {field!r} of {self.where} is null: fill it, or leave the row out"
            )
        return value


def _within(value: Any, path: str) -> Any:
    """The value at a path; a field whose own name has points goes first. Raises KeyError."""
    if (found := _directly_in(value, path)) is not _ABSENT:
        return found
    for point in (match.start() for match in re.finditer(r"\.", path)):
        inner = _directly_in(value, path[:point])
        if isinstance(inner, Mapping | list):
            with suppress(KeyError):
                return _within(inner, path[point + 1 :])
    raise KeyError(path)


def _directly_in(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(name, _ABSENT)
    if isinstance(value, list) and name.isdecimal() and len(name) < 10 and int(name) < len(value):
        return value[int(name)]
    return _ABSENT


def _paths(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _few_chars(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]} ..."


def _chat_hint(fields: Mapping[str, Any], option: str) -> str:
    chats = [name for name, value in fields.items() if is_chat(value)]
    return f'. It is a chat: set task.field = "{chats[0]}"' if chats and option == "field" else ""


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages, as chat templates take it."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


# ---------------------------------------------------------------------------------------------- what to read


def documents_of(options: config.Task, corpus: str, split: str) -> Iterator[Document]:
    """Those of a built-in corpus, a file, a folder or a data set. Raises ConfigError."""
    path = Path(corpus).expanduser()
    if corpus in BUILT_IN:
        yield Document({options.field: BUILT_IN[corpus]().decode()}, corpus)
    elif path.is_file() and files.kind_of(path) not in _DATA:
        yield Document({options.field: files.read_text(path)}, str(path))
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _saved_set(path, split)
    elif path.exists():
        yield from _part(_files_by_split(options, path), split, options.field, path)
    elif path.is_absolute() or corpus.startswith(".") or files.kind_of(path) in (*_DATA, *_TEXTS[1:]):
        raise ConfigError(f"task.corpus {corpus}: no such file or folder")
    else:
        yield from _hub_set(options, corpus, split)


def has_split(corpus: str, split: str) -> bool:
    """False where it is clear without a look: text is in one piece, a file is "train" and its slices."""
    path = Path(corpus).expanduser()
    if corpus in BUILT_IN:
        return False
    return not path.is_file() or (files.kind_of(path) in _DATA and names_of(split) == {"train"})


def overlap(split: str, other: str) -> bool:
    """Whether both surely have some of the same documents: one slice in both, or one in a whole split."""
    ours, theirs = (set(spec.replace(" ", "").split("+")) for spec in (split, other))
    return bool(ours & theirs or ours & names_of(other) or theirs & names_of(split))


def names_of(split: str) -> set[str]:
    """Of the splits in it: of "train[:90%]+test" train and test."""
    return {part.partition("[")[0].strip() for part in split.split("+")}


def _part(splits: Mapping[str, list[Path]], split: str, field: str, corpus: Path) -> Iterator[Document]:
    """`split`: "train", "train[:100]", "train[10%:]+test", as `datasets` writes them."""
    from datasets import ReadInstruction

    names = names_of(split)
    if missing := sorted(names - splits.keys()):
        raise ConfigError(f"task.corpus {corpus}: no split {missing[0]!r} in it, but {', '.join(splits)}")
    if split in splits:
        yield from _rows(splits[split], field)
        return
    sizes = {name: sum(1 for _ in _rows(splits[name], field)) for name in names}
    try:
        pieces = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (AssertionError, ValueError) as e:
        raise ConfigError(f"task.split {split!r}: {first_line(e)}") from e
    for piece in pieces:
        yield from islice(_rows(splits[piece.splitname], field), piece.from_, piece.to)


def _files_by_split(options: config.Task, path: Path) -> dict[str, list[Path]]:
    """A single file is all "train"; of a folder `datasets` says which file belongs to which split."""
    if path.is_file():
        return {"train": [path]}
    found = {name: sorted(some) for name, some in _guessed_splits(options, path).items()}
    data = {name: kept for name, some in found.items() if (kept := [p for p in some if _is(p, _DATA)])}
    if data:
        _say_left_out(path, data)
        return data
    texts = sorted(p for p in path.rglob("*") if p.is_file() and _is(p, _TEXTS))
    if not texts:
        raise ConfigError(f"task.corpus {path}: no text files in it, nor any that end in {', '.join(_DATA)}")
    return {"train": texts}


def _guessed_splits(options: config.Task, path: Path) -> dict[str, list[Path]]:
    from datasets import load_dataset_builder
    from datasets.data_files import DataFilesDict, get_data_patterns

    try:
        if options.subset is not None or _has_configs(path / "README.md"):
            found = load_dataset_builder(str(path), options.subset).config.data_files
        else:
            found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"task.corpus {path}: {first_line(e)}") from e
    return {str(name): [Path(p) for p in some] for name, some in (found or {}).items()}


def _has_configs(card: Path) -> bool:
    return card.is_file() and "\nconfigs:" in files.read_text(card)


def _say_left_out(folder: Path, data: Mapping[str, Iterable[Path]]) -> None:
    used = {p for some in data.values() for p in some}
    others = [p.name for p in sorted(folder.rglob("*")) if p.is_file() and p not in used]
    log.info("task.corpus %s: %s of data", folder, counted(len(used), "file"))
    if others := [name for name in others if not name.startswith(".") and name != "README.md"]:
        log.warning("task.corpus %s: left out as no data, or of no split: %s", folder, _few(others))


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is(path: Path, kinds: Iterable[str]) -> bool:
    return files.kind_of(path) in kinds


# ------------------------------------------------------------------------------------------------- one file


def _rows(paths: Iterable[Path], field: str) -> Iterator[Document]:
    for path in paths:
        kind = files.kind_of(path)
        if kind in _LINES or kind == ".json":
            yield from json_rows(path)
        elif kind in _TABLES:
            yield from _table(path, _TABLES[kind])
        elif kind in _COLUMNS:
            yield from _columns(path, _COLUMNS[kind])
        else:
            yield Document({field: files.read_text(path)}, str(path))


def json_rows(path: Path) -> Iterator[Document]:
    """JSON Lines, and what ends in .json: these, a list of objects, or one object over several lines."""
    if files.kind_of(path) == ".json" and not _begins_with_a_line(path):
        yield from _whole_json(path)
        return
    with files.opened(path) as text:
        for number, line in enumerate(_bounded_lines(text, path), 1):
            if line.strip():
                yield Document(_object(line, path, f"line {number}"), str(path), f"line {number}")


def _begins_with_a_line(path: Path) -> bool:
    with files.opened(path) as text:
        first = next((line for line in _bounded_lines(text, path) if line.strip()), "")
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _whole_json(path: Path) -> Iterator[Document]:
    with files.opened(path) as text:
        whole = text.read(_MAX_JSON_CHARS + 1)
    if len(whole) > _MAX_JSON_CHARS:
        raise ConfigError(f"{path}: more than a gigabyte of JSON in one piece: write JSON Lines (.jsonl)")
    found = _parsed(whole, path, "")
    for number, row in enumerate(found if isinstance(found, list) else [found], 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, item {number}: not a JSON object: {str(row)[:60]}")
        yield Document(row, str(path), f"item {number}")


def _object(line: str, path: Path, at: str) -> dict[str, Any]:
    row = _parsed(line, path, at)
    if not isinstance(row, dict):
        raise ConfigError(f"{path}, {at}: not a JSON object: {line.strip()[:60]}")
    return row


def _parsed(text: str, path: Path, at: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda _: None)  # NaN, which is no JSON, is no value
    except (ValueError, RecursionError) as e:
        place = f"{path}, {at}" if at else str(path)
        raise ConfigError(f"{place}: not JSON: {e}") from e


def _bounded_lines(text: IO[str], path: Path) -> Iterator[str]:
    while line := text.readline(files.MAX_LINE_CHARS):
        if len(line) == files.MAX_LINE_CHARS and not line.endswith("\n"):
            raise ConfigError(f"{path}: a line of more than {files.MAX_LINE_CHARS:,} characters")
        yield line


def _table(path: Path, delimiter: str) -> Iterator[Document]:
    csv.field_size_limit(files.MAX_LINE_CHARS)  # of the process; the library's own is 128 kB
    with files.opened(path, newline="") as text:
        rows = csv.reader(_bounded_lines(text, path), delimiter=delimiter, strict=True)
        header: list[str] = []
        try:
            for row in rows:
                if not header:
                    header = _header(row, path)
                elif row:
                    yield Document(
                        _record(header, row, path, rows.line_num), str(path), f"line {rows.line_num}"
                    )
        except csv.Error as e:
            raise ConfigError(f"{path}, line {rows.line_num}: no CSV: {e}") from e


def _header(row: list[str], path: Path) -> list[str]:
    if len(set(row)) < len(row):
        raise ConfigError(f"{path}: two columns have the same name: {', '.join(row)}")
    return row


def _record(header: list[str], row: list[str], path: Path, line: int) -> dict[str, str]:
    if len(row) != len(header):
        raise ConfigError(
            f"{path}, line {line}: {len(row)} values, but the header has {len(header)} columns "
            f"({', '.join(header)}): is a quote or a comma missing?"
        )
    return dict(zip(header, row, strict=True))


# ------------------------------------------------------------------------------------- what `datasets` reads


def _columns(path: Path, kind: str) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield Document(row, str(path), f"row {number}")
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as e:
        raise ConfigError(f"{path}: cannot be read as {kind}: {first_line(e)}") from e


def _saved_set(path: Path, split: str) -> Iterator[Document]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
        rows = found[split] if isinstance(found, datasets.DatasetDict) else found
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as e:
        raise ConfigError(f"task.corpus {path} (split {split!r}): {first_line(e)}") from e
    yield from (Document(row, f"{path} ({split})", f"row {number}") for number, row in enumerate(rows, 1))


def _hub_set(options: config.Task, name: str, split: str) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(name, options.subset, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as e:
        raise ConfigError(
            f"task.corpus {name}: no such file or folder, and as a data set it cannot be had from the hub "
            f"({first_line(e)}). Check the name, task.subset and task.split; without a network, download it "
            f"elsewhere (hf download --repo-type dataset {name} --local-dir DIR) and give the folder"
        ) from e
    yield from (Document(row, f"{name} ({split})", f"row {number}") for number, row in enumerate(rows, 1))
