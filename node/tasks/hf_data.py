"""What a model of transformers is trained on: documents to tokens, at the coordinator, so that nodes need no
tokenizer; and the bytes in which tokens travel.

Two kinds. `Stream`: all documents in one row, an end token after each, cut into windows. `Prompts`: every
example once for each label, prompt and label's words in one row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from ...compression.errors import ConfigError
from .. import config

MAX_BYTES: Final = 256 * 2**20
"""Of tokens that a coordinator hands out: 64 M tokens, 128 M of a small vocabulary."""

Row = Mapping[str, Any]

_AT_ONCE: Final = 256
_FIELD: Final = re.compile(r"\{(\w+)\}")
_TEXT_SUFFIXES: Final = ("", ".txt", ".text", ".md", ".rst", ".py")
_KINDS: Final = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".arrow": "arrow",
}
"""Of files, by what they end in -> what `datasets` calls them."""


class Tokenizer:
    """Text to token ids. Made of a model folder's files, or of what `to_json` gave: data without code."""

    def __init__(self, rules: str, end: int | None, special: Mapping[str, str]) -> None:
        from tokenizers import Tokenizer as Rules

        self._rules = Rules.from_str(rules)
        self._rules.no_truncation()
        self._rules.no_padding()
        self._end, self._special = end, dict(special)

    @classmethod
    def of(cls, folder: Path) -> Tokenizer:
        """Raises ConfigError."""
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
            raise ConfigError(
                f"{folder}: its tokenizer cannot be loaded ({_first_line(e)}); a tokenizer.json is needed"
            ) from e
        if not found.is_fast:
            raise ConfigError(f"{folder}: its tokenizer is plain Python; thinwire needs a tokenizer.json")
        special = {k: v for k, v in found.special_tokens_map.items() if isinstance(v, str)}
        return cls(found.backend_tokenizer.to_str(), found.eos_token_id, special)

    def to_json(self) -> str:
        return json.dumps({"rules": self._rules.to_str(), "end": self._end, "special": self._special})

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Raises ConfigError."""
        try:
            return cls(**json.loads(text))
        except Exception as e:  # the library raises nothing more special
            raise ConfigError(f"the run's tokenizer cannot be read: {_first_line(e)}") from e

    def save(self, folder: Path) -> None:
        """As transformers reads it."""
        from transformers import PreTrainedTokenizerFast

        PreTrainedTokenizerFast(tokenizer_object=self._rules, **self._special).save_pretrained(folder)

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Each with the beginning that the tokenizer gives, and an end token."""
        return [self._ended(found.ids) for found in self._rules.encode_batch(list(texts))]

    def prompt(self, prompt: str, words: str) -> tuple[list[int], int]:
        """Tokens of both together, and at which of them the words begin."""
        found = self._rules.encode(prompt + words)
        # A token over the border belongs to the words; special ones stand at (0, 0).
        inside = [i for i, (start, stop) in enumerate(found.offsets) if stop > max(start, len(prompt))]
        if not inside:
            raise ConfigError(f"task.labels: {words!r} makes no token")
        first, last = inside[0], inside[-1]
        unknown = self._rules.token_to_id(self._special.get("unk_token", ""))
        if unknown is not None and unknown in found.ids[first : last + 1]:
            raise ConfigError(f"task.labels: the model's tokenizer does not know {words!r}")
        return found.ids[: last + 1], first

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self._end is None or ids[-1:] == [self._end] else [*ids, self._end]


# ------------------------------------------------------------------------------------------- documents


def rows_of(options: config.Task, corpus: str, split: str) -> Iterator[Row]:
    """The documents of a text file, a folder of them, a JSONL file or a data set. Raises ConfigError."""
    from .corpora import BUILT_IN, read_text

    path = Path(corpus).expanduser()
    if corpus in BUILT_IN:
        yield {options.field: BUILT_IN[corpus]().decode()}
    elif path.suffix in (".jsonl", ".ndjson") and path.is_file():
        yield from _json_lines(path)
    elif path.is_file() and path.suffix not in _KINDS:
        yield {options.field: _text(read_text(corpus), corpus)}
    elif path.exists():
        yield from _local_set(options, path, split)
    elif path.suffix in (*_KINDS, *_TEXT_SUFFIXES[1:]) or path.is_absolute() or corpus.startswith("."):
        raise ConfigError(f"task.corpus {corpus}: no such file or folder")
    else:
        yield from _hub_set(options, corpus, split)


def has_splits(corpus: str) -> bool:
    """Whether `rows_of` gives other documents for another split."""
    from .corpora import BUILT_IN

    path = Path(corpus).expanduser()
    is_plain = path.is_file() and path.suffix not in _KINDS.keys() - {".jsonl", ".ndjson"}
    return corpus not in BUILT_IN and not is_plain


def field_of(row: Row, field: str, option: str) -> str:
    """Raises ConfigError that names the fields which are there."""
    value = row.get(field)
    if value is None:
        there = ", ".join(sorted(map(str, row))) or "none"
        raise ConfigError(f"task.{option}: a document has no {field!r}; its fields are {there}")
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise ConfigError(f"task.{option}: {field!r} of a document is {type(value).__name__}, no text")
    return str(value)


def _json_lines(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ConfigError(f"{path}, line {number}: not a JSON object: {line.strip()[:60]}")
                yield row
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8: {e}") from e
    except ValueError as e:
        raise ConfigError(f"{path}, line {number}: not JSON: {e}") from e
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from e


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise ConfigError(f"task.corpus {name}: not UTF-8 text: {e}") from e


def _local_set(options: config.Task, path: Path, split: str) -> Iterator[Row]:
    """Files that `datasets` reads, or else a folder of text files, each one a document."""
    import datasets

    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
            yield from found[split] if isinstance(found, datasets.DatasetDict) else found
        elif any(p.suffix in _KINDS for p in files):
            where = {"data_files": str(path)} if path.is_file() else {}
            name = _KINDS[path.suffix] if path.is_file() else str(path)
            yield from datasets.load_dataset(name, options.subset, split=split, **where)
        else:
            texts = [(p, p.read_bytes()) for p in files if p.suffix in _TEXT_SUFFIXES]
            if not texts:
                raise ConfigError(f"task.corpus {path}: no text files in it")
            yield from ({options.field: _text(data, str(p))} for p, data in texts)
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"task.corpus {path} (split {split!r}): {_first_line(e)}") from e


def _hub_set(options: config.Task, name: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        yield from datasets.load_dataset(name, options.subset, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as e:
        raise ConfigError(
            f"task.corpus {name}: no such file or folder, and as a data set it cannot be had from the hub "
            f"({_first_line(e)}). Check the name, task.subset and task.split; without a network, download it "
            f"elsewhere (hf download --repo-type dataset {name} --local-dir DIR) and give the folder"
        ) from e


# ------------------------------------------------------------------------------------------- tokens

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Stream:
    """Documents in one row of tokens."""

    ids: Ids

    def windows(self, context: int) -> int:
        """How many there are: each predicts `context` tokens."""
        return max(0, (len(self.ids) - 1) // context)

    def split(self, n_last: int, context: int) -> tuple[Stream, Stream]:
        """All but the last windows, and those. Raises ConfigError if nothing is left for the first."""
        n = n_last * context + 1
        if len(self.ids) < n + context + 1:
            raise ConfigError(
                f"the documents have {len(self.ids)} tokens: too few to hold out {n_last} sequences "
                f"(task.held_out) of {context} and train on the rest"
            )
        return Stream(self.ids[:-n]), Stream(self.ids[-n:])

    def first(self, n: int, context: int) -> Stream:
        return Stream(self.ids[: n * context + 1])

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"ids": self.ids}


@dataclass(frozen=True, slots=True)
class Prompts:
    """Examples x labels as rows of tokens, one after the other: row (e, c) is number e * C + c.

    `ends`: where each row ends in `ids`; `words`: where in its row the label's words begin; `answers`: the
    right label of each example.
    """

    ids: Ids
    ends: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]
    answers: npt.NDArray[np.int64]

    @property
    def n_labels(self) -> int:
        return len(self.ends) // len(self.answers)

    def row(self, example: int, label: int) -> tuple[Ids, int]:
        """Its tokens, and at which of them the words begin."""
        i = example * self.n_labels + label
        return self.ids[self.ends[i - 1] if i else 0 : self.ends[i]], int(self.words[i])

    def split(self, n_last: int, context: int) -> tuple[Prompts, Prompts]:
        n = len(self.answers)
        if n <= n_last:
            raise ConfigError(
                f"{n} examples: too few to hold out {n_last} (task.held_out) and train on the rest"
            )
        return self._slice(0, n - n_last), self._slice(n - n_last, n)

    def first(self, n: int, context: int) -> Prompts:
        return self._slice(0, min(n, len(self.answers)))

    def _slice(self, start: int, stop: int) -> Prompts:
        c = self.n_labels
        begin = self.ends[start * c - 1] if start else 0
        ends = self.ends[start * c : stop * c]
        words, answers = self.words[start * c : stop * c], self.answers[start:stop]
        return Prompts(self.ids[begin : ends[-1]], ends - begin, words, answers)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"ids": self.ids, "ends": self.ends, "words": self.words, "answers": self.answers}


Tokens = Stream | Prompts


def tokenised(options: config.Task, tokenizer: Tokenizer, rows: Iterable[Row], vocabulary: int) -> Tokens:
    """Raises ConfigError: fields, labels, a tokenizer of another model, nothing there, too much."""
    found = (
        _stream(options, tokenizer, rows) if options.prompt is None else _prompts(options, tokenizer, rows)
    )
    if len(found.ids) and int(found.ids.max()) >= vocabulary:
        raise ConfigError(
            f"token {int(found.ids.max())} is not in the model's vocabulary of {vocabulary}: "
            f"is the tokenizer that of another model?"
        )
    return found


def _stream(options: config.Task, tokenizer: Tokenizer, rows: Iterable[Row]) -> Stream:
    ids = _Growing()
    texts = (field_of(row, options.field, "field") for row in rows)
    while some := list(islice(texts, _AT_ONCE)):
        for document in tokenizer.documents(some):
            ids.add(document)
    return Stream(ids.array())


def _prompts(options: config.Task, tokenizer: Tokenizer, rows: Iterable[Row]) -> Prompts:
    assert options.prompt is not None
    labels = list(options.labels)
    ids = _Growing()
    ends, words, answers = [], [], []
    for row in rows:
        answer = field_of(row, options.label_field, "label_field")
        if answer not in options.labels:
            raise ConfigError(f"task.labels: a document has label {answer!r}; there are {', '.join(labels)}")
        prompt = _filled(options.prompt, row)
        for label in labels:
            row_ids, first = tokenizer.prompt(prompt, options.labels[label])
            dropped = max(0, len(row_ids) - options.context - 1)
            if first == 0:
                raise ConfigError("task.prompt: there must be something before the label's words")
            if first - dropped < 1:
                raise ConfigError(f"task.labels: {options.labels[label]!r} does not fit into task.context")
            ids.add(row_ids[dropped:])
            ends.append(ids.n)
            words.append(first - dropped)
        answers.append(labels.index(answer))
    if not answers:
        raise ConfigError("there are no examples to train on")
    as_int64 = [np.array(numbers, dtype=np.int64) for numbers in (ends, words, answers)]
    return Prompts(ids.array(), *as_int64)


def _filled(prompt: str, row: Row) -> str:
    return _FIELD.sub(lambda match: field_of(row, match[1], "prompt"), prompt)


class _Growing:
    """Token ids, as many as may be handed out."""

    def __init__(self) -> None:
        self._parts: list[npt.NDArray[np.uint32]] = []
        self.n = 0

    def add(self, ids: list[int]) -> None:
        self._parts.append(np.array(ids, dtype=np.uint32))
        self.n += len(ids)
        if self.n * 4 > MAX_BYTES:
            raise ConfigError(
                f"more than {MAX_BYTES // 4:,} tokens, which a coordinator does not hand out: take a part "
                f'of the data, e.g. task.split = "train[:100000]", or name a smaller file and give nodes '
                f"their own with --data"
            )

    def array(self) -> Ids:
        if not self._parts:
            raise ConfigError("there are no documents to train on")
        ids = np.concatenate(self._parts)
        return ids.astype(np.uint16) if int(ids.max(initial=0)) < 2**16 else ids


# ------------------------------------------------------------------------------------------- as bytes


def to_bytes(tokens: Tokens, tokenizer: Tokenizer | None = None) -> bytes:
    """A safetensors file; the held-out tokens bring the tokenizer along, for nodes with data of their own."""
    arrays = dict(tokens.arrays())
    if tokenizer is not None:
        arrays["tokenizer"] = np.frombuffer(tokenizer.to_json().encode(), dtype=np.uint8)
    return save_arrays(arrays)


def from_bytes(data: bytes) -> tuple[Tokens, str | None]:
    """The tokens, and the tokenizer's JSON if it is there. Raises ConfigError for anything else."""
    try:
        arrays = load_arrays(data)
        text = arrays.pop("tokenizer").tobytes().decode() if "tokenizer" in arrays else None
        return (Prompts(**arrays) if "ends" in arrays else Stream(**arrays)), text
    except (SafetensorError, TypeError, KeyError, ValueError) as e:
        raise ConfigError(f"the run's tokens cannot be read: {e}") from e


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]
