"""Tasks: what is trained. A task names a model, its exact initial values, its batches and its evaluation.

`text` is built in, `hf` (a model of transformers, see `hf_task`) an extra. A task of the user's own is given
by import path on the user's own command line (`--task package.module:function`), never by the network.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from thinwire.compression.errors import ConfigError
from thinwire.node import config
from thinwire.node.gpt import ByteGPT
from thinwire.optim.base import Closure


@dataclass(frozen=True, slots=True)
class Init:
    """How a parameter starts: zeros, ones, or exact normal noise times `scale`; torch's own differ by CPU."""

    rule: Literal["zeros", "ones", "normal"]
    scale: float = 0.0


class Task(Protocol):
    """What a run trains. All methods but `model` are called with the model that `model` made."""

    n_samples: int
    """Samples in one batch that `draw` gives."""
    n_tokens: int
    """Tokens (`text`: bytes) in the batch that `draw` gave last."""

    def model(self) -> nn.Module:
        """The model with parameters of any value; called on the meta device too."""
        ...

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        """The rule for one parameter."""
        ...

    def held_out(self) -> bytes | None:
        """What `evaluate` is given on every node; the coordinator's goes to all. None: no evaluation."""
        ...

    def corpus(self) -> bytes | None:
        """Training data that the coordinator hands to nodes which bring none; None: they have it already."""
        ...

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None:
        """Before the first `draw`: what `corpus` and `held_out` gave at the coordinator."""
        ...

    def draw(self, model: nn.Module, seed: int, rank: int = 0, ranks: int = 1) -> Closure:
        """The batch of this unsigned 64-bit seed as a closure that returns its mean loss (float32, 0-d).

        On a node of several ranks each has some of its rows (see `Rows`), and the mean of what their closures
        return is the batch's mean loss. Every rank's closure calls the model as often as the others'.
        """
        ...

    def evaluate(self, model: nn.Module, rank: int = 0, ranks: int = 1) -> float:
        """Mean held-out loss, of several ranks the mean of what they return, after as many calls of the model
        on each; the caller has set eval mode and no_grad."""
        ...


@runtime_checkable
class Pretrained(Protocol):
    """What a task has besides whose model brings weights, so that a run needs no `run.base`."""

    def public(self, options: config.Task) -> config.Task:
        """The options for record 0: all that a node needs to build the model, no path of this machine. Those
        that come from a record 0 stay what they are."""
        ...

    def base(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights by parameter name; what is not among them begins by its rule. At the coordinator."""
        ...

    def base_in(self, folder: Path, model: nn.Module) -> dict[str, Tensor]:
        """The same from a folder of this machine's user, wherever the run began."""
        ...

    def export(self, model: nn.Module, held_out: bytes, folder: Path) -> None:
        """The model as its library reads it."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """A rank's rows [first, stop) of a batch, and the factor by which the mean over them counts, so that the
    mean over the ranks is that of the batch. A rank without a row computes one that counts 0."""

    first: int
    stop: int
    weight: float

    @classmethod
    def of(cls, n: int, rank: int, ranks: int) -> Rows:
        """As even as can be. `n`: rows of the batch, at least one."""
        first, stop = n * rank // ranks, n * (rank + 1) // ranks
        if first == stop:
            return cls(0, 1, 0.0)
        return cls(first, stop, (stop - first) * ranks / n)

    @property
    def slice(self) -> slice:
        return slice(self.first, self.stop)


class TextTask:
    """Next-byte prediction on text; losses in nats per byte."""

    MAX_CORPUS_BYTES = 64 * 2**20

    def __init__(self, options: config.Task, data: Path | None) -> None:
        if options.width % options.heads:
            raise ConfigError(f"task.width {options.width} is not a multiple of task.heads {options.heads}")
        self.options = options
        self.data = data
        self.n_samples = options.batch
        self.n_tokens = options.batch * options.context
        self._text: Tensor | None = None
        self._held_out: Tensor | None = None

    def model(self) -> nn.Module:
        o = self.options
        return ByteGPT(o.layers, o.width, o.heads, o.context)

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        if name.endswith("bias"):
            return Init("zeros")
        if "norm" in name:
            return Init("ones")
        # GPT-2: what enters the residual stream starts smaller, the deeper the model.
        depth_factor = (
            (2 * self.options.layers) ** -0.5 if name.endswith(("proj.weight", "down.weight")) else 1.0
        )
        return Init("normal", 0.02 * depth_factor)

    def held_out(self) -> bytes:
        return self._split()[1]

    def corpus(self) -> bytes | None:
        return None if self._is_built_in() else self._split()[0]

    def _is_built_in(self) -> bool:
        return self.data is None and self.options.corpus in BUILT_IN

    def _split(self) -> tuple[bytes, bytes]:
        text = read_text(self.options.corpus if self.data is None else str(self.data))
        n = self.options.held_out_bytes
        if len(text) < n + 10 * self.options.context:
            raise ConfigError(
                f"the text has {len(text)} bytes: too few to hold out {n} "
                f"(task.held_out_bytes) and train on the rest"
            )
        if len(text) > self.MAX_CORPUS_BYTES and not self._is_built_in():
            raise ConfigError(
                f"the text has {len(text)} bytes, more than the {self.MAX_CORPUS_BYTES} that a "
                f"coordinator hands out; name a smaller one in the run and give each node its own with --data"
            )
        return text[:-n], text[-n:]

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None:
        if self.data is not None:
            corpus = read_text(str(self.data))
        elif corpus is None:
            corpus = read_text(self.options.corpus)
        corpus = corpus.removesuffix(held_out or b"")
        if len(corpus) < 10 * self.options.context:
            raise ConfigError(
                f"only {len(corpus)} bytes of text to train on: at least {10 * self.options.context} needed"
            )
        self._text = torch.from_numpy(np.frombuffer(corpus, dtype=np.uint8).copy())
        if held_out is not None:
            self._held_out = torch.from_numpy(np.frombuffer(held_out, dtype=np.uint8).copy())

    def draw(self, model: nn.Module, seed: int, rank: int = 0, ranks: int = 1) -> Closure:
        assert self._text is not None, "load() comes before draw()"
        o = self.options
        rng = np.random.Generator(np.random.Philox(key=seed))
        starts = rng.integers(0, len(self._text) - o.context, size=o.batch)
        rows = Rows.of(o.batch, rank, ranks)
        offsets = torch.from_numpy(starts[rows.slice])[:, None] + torch.arange(o.context + 1)
        window_BT = self._text[offsets].long().to(device_of(model))
        return lambda: _next_byte_loss(model, window_BT) * rows.weight

    def evaluate(self, model: nn.Module, rank: int = 0, ranks: int = 1) -> float:
        assert self._held_out is not None, "load() comes before evaluate()"
        t = self.options.context
        n_windows = (len(self._held_out) - 1) // t
        device = device_of(model)
        total = 0.0
        for first in range(0, n_windows, 64):
            n = min(64, n_windows - first)
            rows = Rows.of(n, rank, ranks)
            starts = torch.arange(first + rows.first, first + rows.stop) * t
            window_BT = self._held_out[starts[:, None] + torch.arange(t + 1)].long().to(device)
            total += float(_next_byte_loss(model, window_BT)) * n * rows.weight
        return total / n_windows


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes; its parameters may be kept elsewhere (see `mesh.sharded_model`)."""
    device: torch.device | None = getattr(model, "thinwire_device", None)
    return next(model.parameters()).device if device is None else device


def _next_byte_loss(model: nn.Module, window_BT: Tensor) -> Tensor:
    logits = model(window_BT[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), window_BT[:, 1:].flatten())


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


def make_task(options: config.Task, import_path: str | None, data: Path | None) -> Task:
    """The task of a run: the built-in one, or `import_path` from the user's own command line.

    That is module:callable, called as `make(options, data)` for a Task. Raises ConfigError.
    """
    if import_path is None:
        _refuse_strange(options)
        if options.name == "hf":
            from thinwire.node.hf_task import HfTask

            return HfTask(options, data)
        if options.name == "custom":
            raise ConfigError(
                "this run trains a custom task, and code never comes over the network: "
                "install the task's package here and name it with --task package.module:function"
            )
        return TextTask(options, data)
    module_name, _, attribute = import_path.partition(":")
    if not attribute:
        raise ConfigError(f"--task {import_path}: write it as package.module:function")
    sys.path.insert(0, "")  # as `python -m` does: a module in the working directory is found
    try:
        make = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"--task {import_path}: {e}") from e
    finally:
        sys.path.remove("")
    task: Task = make(options, data)
    return task


_OF_TEXT: Final = frozenset({"held_out_bytes", "layers", "width", "heads"})
_OF_ALL: Final = frozenset({"name", "corpus", "context", "batch"})


def _refuse_strange(options: config.Task) -> None:
    """Raises ConfigError for an option that another task has: it would do nothing."""
    own = {"text": _OF_ALL | _OF_TEXT, "hf": config.Task.model_fields.keys() - _OF_TEXT}.get(options.name)
    if own is None:
        return
    for name, known in config.Task.model_fields.items():
        if name not in own and getattr(options, name) != known.default:
            other = "text" if name in _OF_TEXT else "hf"
            raise ConfigError(
                f"task.{name} is an option of the task {other!r}, and this run trains {options.name!r}: "
                f'leave it out, or set task.name = "{other}"'
            )
