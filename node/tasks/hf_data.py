"""What a model of transformers is trained on: documents to tokens, at the coordinator, so that nodes need no
tokenizer; and the bytes in which tokens travel.

Two kinds. `Stream`: all documents in one row, an end token after each, cut into windows. `Prompts`: every
example once for each label, prompt and label's words in one row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from ...compression.errors import ConfigError, first_line
from ...coordinator.protocol.figures import BYTES_PER_TOKEN
from .. import config
from .documents import Document, is_chat
from .prompt import PromptTemplate

MAX_BYTES: Final = 256 * 2**20
"""Of tokens that a coordinator hands out: 64 M tokens, 128 M of a small vocabulary."""

log = logging.getLogger("thinwire.node")

_AT_ONCE: Final = 256


class Tokenizer:
    """Text to token ids. Made of a model folder's files, or of what `to_json` gave: data without code."""

    def __init__(
        self, rules: str, end: int | None, special: Mapping[str, str], *, chats: bool = False
    ) -> None:
        """`special`: what transformers' tokenizer takes besides the rules, special tokens and chat template.
        `chats`: may run the template, which is a program."""
        from tokenizers import Tokenizer as Rules

        self._rules = Rules.from_str(rules)
        self._rules.no_truncation()
        self._rules.no_padding()
        self._end, self._special, self._chats = end, dict(special), chats

    @classmethod
    def of(cls, folder: Path) -> Tokenizer:
        """Raises ConfigError."""
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
            raise ConfigError(
                f"{folder}: its tokenizer cannot be loaded ({first_line(e)}); a tokenizer.json is needed"
            ) from e
        if not found.is_fast:
            raise ConfigError(f"{folder}: its tokenizer is plain Python; thinwire needs a tokenizer.json")
        special = {k: v for k, v in found.special_tokens_map.items() if isinstance(v, str)}
        template = found.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str):
            special["chat_template"] = template
        return cls(found.backend_tokenizer.to_str(), found.eos_token_id, special, chats=True)

    def to_json(self) -> str:
        return json.dumps({"rules": self._rules.to_str(), "end": self._end, "special": self._special})

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Raises ConfigError."""
        try:
            found = json.loads(text)
            return cls(found["rules"], found["end"], found["special"])  # and never `chats`
        except Exception as e:  # the library raises nothing more special
            raise ConfigError(f"the run's tokenizer cannot be read: {first_line(e)}") from e

    def save(self, folder: Path) -> None:
        """As transformers reads it."""
        self._library.save_pretrained(folder)

    @cached_property
    def _library(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=self._rules, **self._special)

    def chat(self, messages: Sequence[Any], where: str) -> str:
        """The messages as the model's chat template writes them. Raises ConfigError that names `where`."""
        if not self._chats:
            raise ConfigError(
                f"{where}: chats are made text by the coordinator only: a chat template is a program, and "
                f"code does not come over the network. Write them with the model's tokenizer "
                f"(apply_chat_template, tokenize=False) into a field of text"
            )
        if "chat_template" not in self._special:
            raise ConfigError(f"{where}: a chat, but the model's tokenizer has no chat template")
        try:
            return str(self._library.apply_chat_template(list(messages), tokenize=False))
        except Exception as e:  # a template raises what it likes
            raise ConfigError(f"{where}: the chat template refuses it: {first_line(e)}") from e

    def documents(self, texts: Sequence[str], *, chats: bool = False) -> list[list[int]]:
        """Each with the beginning that the tokenizer gives (chats bring their own), and an end token."""
        return [
            self._ended(f.ids) for f in self._rules.encode_batch(list(texts), add_special_tokens=not chats)
        ]

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


# ------------------------------------------------------------------------------------------- tokens

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class TextSizes:
    """At the end of each document: how many tokens there are up to here, and of how many bytes of text."""

    n_tokens: npt.NDArray[np.int64]
    n_bytes: npt.NDArray[np.int64]

    def between(self, start: int, stop: int) -> float:
        """Bytes of the tokens [start, stop); inside of a document each counts the same."""
        at = np.interp([start, stop], [0, *self.n_tokens], [0, *self.n_bytes])
        return float(at[1] - at[0])


@dataclass(frozen=True, slots=True)
class Stream:
    """Documents in one row of tokens. `n_bytes`: of their text; `sizes`: of what can still be split."""

    ids: Ids
    n_bytes: float | None = None
    sizes: TextSizes | None = None

    @property
    def bytes_per_token(self) -> float | None:
        return None if self.n_bytes is None else self.n_bytes / len(self.ids)

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
        border = len(self.ids) - n
        return self._slice(0, border), self._slice(border, len(self.ids))

    def first(self, n: int, context: int) -> Stream:
        return self._slice(0, min(len(self.ids), n * context + 1))

    def _slice(self, start: int, stop: int) -> Stream:
        n_bytes = None if self.sizes is None else self.sizes.between(start, stop)
        return Stream(self.ids[start:stop], n_bytes)

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
        """All but the last examples, and those. Raises ConfigError if nothing is left for the first."""
        n = len(self.answers)
        if n <= n_last:
            raise ConfigError(
                f"{n} examples: too few to hold out {n_last} (task.held_out) and train on the rest"
            )
        return self.take(np.arange(n - n_last)), self.take(np.arange(n - n_last, n))

    def shuffled(self, seed: int) -> Prompts:
        """The examples in an order that is a function of the seed and their number."""
        rng = np.random.Generator(np.random.Philox(key=seed))
        return self.take(rng.permutation(len(self.answers)))

    def first(self, n: int, context: int) -> Prompts:
        return self.take(np.arange(min(n, len(self.answers))))

    def take(self, examples: npt.NDArray[np.integer[Any]]) -> Prompts:
        """These, in this order."""
        rows = (examples[:, None] * self.n_labels + np.arange(self.n_labels)).ravel()
        begins = np.concatenate([np.zeros(1, dtype=np.int64), self.ends[:-1]])
        ids = np.concatenate([self.ids[begins[row] : self.ends[row]] for row in rows])
        ends = np.cumsum(self.ends[rows] - begins[rows])
        return Prompts(ids, ends, self.words[rows], self.answers[examples])

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"ids": self.ids, "ends": self.ends, "words": self.words, "answers": self.answers}


Tokens = Stream | Prompts


def tokenised(
    options: config.Task, tokenizer: Tokenizer, documents: Iterable[Document], vocabulary: int
) -> Tokens:
    """Raises ConfigError: fields, labels, a tokenizer of another model, nothing there, too much."""
    make = _stream if options.prompt is None else _prompts
    found = make(options, tokenizer, documents)
    if len(found.ids) and int(found.ids.max()) >= vocabulary:
        raise ConfigError(
            f"token {int(found.ids.max())} is not in the model's vocabulary of {vocabulary}: "
            f"is the tokenizer that of another model?"
        )
    return found


def held_out_of(options: config.Task, tokens: Tokens) -> tuple[Tokens, Tokens]:
    """What is trained on, and what is held out: of text the end; of examples some that are drawn, the same
    for every run, as files of them are often sorted by label."""
    if isinstance(tokens, Prompts) and options.held_out_from != "end":
        tokens = tokens.shuffled(seed=0)
    return tokens.split(options.held_out, options.context)


def say_missing_labels(options: config.Task, tokens: Tokens, held_out: Tokens) -> None:
    """Logs a warning for labels that nobody trains, or that no held-out example has."""
    if not isinstance(tokens, Prompts) or not isinstance(held_out, Prompts):
        return
    for some, what in ((held_out, "held out"), (tokens, "to train on")):
        n_each = np.bincount(some.answers, minlength=len(options.labels))
        if missing := [label for label, n in zip(options.labels, n_each, strict=True) if not n]:
            log.warning(
                "none of the %d examples %s has the label %s: the loss says nothing about it. Are the data "
                'sorted by label (the default is task.held_out_from = "shuffled"), or task.held_out small?',
                len(some.answers), what, " nor ".join(map(repr, missing)),
            )  # fmt: skip


class _Empty:
    """Counts documents without text, which are left out."""

    def __init__(self) -> None:
        self._n, self._n_all, self._first = 0, 0, ""

    def is_empty(self, document: Document, empty: bool) -> bool:
        self._n_all += 1
        if empty and not self._n:
            self._first = document.where
        self._n += empty
        return empty

    def say(self) -> None:
        if self._n:
            log.warning(
                "%d of %d documents are empty and left out; the first: %s", self._n, self._n_all, self._first
            )


def _stream(options: config.Task, tokenizer: Tokenizer, documents: Iterable[Document]) -> Stream:
    ids, empty = _Growing(), _Empty()
    ends, sizes = [], []
    all_texts = (_text_of(options, tokenizer, d) for d in documents)
    texts = (text for text in all_texts if not empty.is_empty(text[0], not text[1].strip()))
    for is_chat_, group in groupby(texts, key=lambda text: text[2]):
        while some := [text for _, text, _ in islice(group, _AT_ONCE)]:
            for text, document in zip(some, tokenizer.documents(some, chats=is_chat_), strict=True):
                ids.add(document)
                ends.append(ids.n)
                sizes.append(len(text.encode()))
    empty.say()
    whole = ids.array()
    totals = TextSizes(np.array(ends, dtype=np.int64), np.cumsum(sizes, dtype=np.int64))
    return Stream(whole, float(totals.n_bytes[-1]), totals)


def _text_of(options: config.Task, tokenizer: Tokenizer, document: Document) -> tuple[Document, str, bool]:
    """A document's text, and whether it is a chat."""
    value: Any = document.fields.get(options.field)
    if is_chat(value):
        return document, tokenizer.chat(value, document.where), True
    return document, document.text(options.field, "field"), False


def _prompts(options: config.Task, tokenizer: Tokenizer, documents: Iterable[Document]) -> Prompts:
    assert options.prompt is not None
    template, empty = PromptTemplate.of(options.prompt), _Empty()
    rows = _PromptRows(options, tokenizer)
    for document in documents:
        answer = document.text(options.label_field, "label_field")
        if answer not in options.labels:
            raise ConfigError(
                f"task.labels: {document.where} has label {answer!r}; there are {', '.join(options.labels)}"
            )
        prompt = template.filled(document)
        if not empty.is_empty(document, template.is_empty(document)):
            rows.add(prompt, answer)
    empty.say()
    return rows.prompts()


class _PromptRows:
    """Examples on their way to `Prompts`."""

    def __init__(self, options: config.Task, tokenizer: Tokenizer) -> None:
        self._options, self._tokenizer = options, tokenizer
        self._labels = list(options.labels)
        self._ids = _Growing()
        self._ends: list[int] = []
        self._words: list[int] = []
        self._answers: list[int] = []
        self._n_cut = 0

    def add(self, prompt: str, answer: str) -> None:
        """Raises ConfigError: a label's words do not fit, or nothing is before them."""
        is_cut = [self._add_row(prompt, words) for words in self._options.labels.values()]
        self._n_cut += any(is_cut)
        self._answers.append(self._labels.index(answer))

    def prompts(self) -> Prompts:
        if not self._answers:
            raise ConfigError("there are no examples to train on")
        if self._n_cut:
            log.warning(
                "%d of %d prompts are longer than task.context = %d and lost their beginning",
                self._n_cut, len(self._answers), self._options.context,
            )  # fmt: skip
        as_int64 = [np.array(n, dtype=np.int64) for n in (self._ends, self._words, self._answers)]
        return Prompts(self._ids.array(), *as_int64)

    def _add_row(self, prompt: str, words: str) -> bool:
        """Whether its beginning was cut off."""
        row_ids, first = self._tokenizer.prompt(prompt, words)
        dropped = max(0, len(row_ids) - self._options.context - 1)
        if first == 0:
            raise ConfigError("task.prompt: there must be something before the label's words")
        if first - dropped < 1:
            raise ConfigError(f"task.labels: {words!r} does not fit into task.context")
        self._ids.add(row_ids[dropped:])
        self._ends.append(self._ids.n)
        self._words.append(first - dropped)
        return dropped > 0


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
    if tokenizer is None:
        return save_arrays(arrays)
    arrays["tokenizer"] = np.frombuffer(tokenizer.to_json().encode(), dtype=np.uint8)
    size = tokens.bytes_per_token if isinstance(tokens, Stream) else None
    return save_arrays(arrays, None if size is None else {BYTES_PER_TOKEN: f"{size:.4f}"})


def from_bytes(data: bytes) -> tuple[Tokens, str | None]:
    """The tokens, and the tokenizer's JSON if it is there. Raises ConfigError for anything else."""
    try:
        arrays = load_arrays(data)
        text = arrays.pop("tokenizer").tobytes().decode() if "tokenizer" in arrays else None
        return (Prompts(**arrays) if "ends" in arrays else _stream_of(**arrays)), text
    except (SafetensorError, TypeError, KeyError, ValueError) as e:
        raise ConfigError(f"the run's tokens cannot be read: {e}") from e


def _stream_of(ids: Ids) -> Stream:
    return Stream(ids)
