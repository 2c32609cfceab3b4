"""The task `text`: next-byte prediction by a small GPT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...compression.errors import ConfigError
from ...optim.base import Closure
from .. import config
from . import fedpara
from .base import Init, Rows, device_of
from .classes import Classes, Piece, section_names, sections
from .corpora import BUILT_IN, read_text
from .gpt import ByteGPT

EVALUATED_BYTES: Final = 1024
"""In one forward pass, where a batch has fewer: more take memory that training does not, and more time on a
CPU, whose cache has no room for them."""


class TextTask:
    """Next-byte prediction on text."""

    loss_unit = "nats/byte"

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
        self._divided: tuple[bytes, bytes] | None = None

    def model(self) -> nn.Module:
        o = self.options
        return ByteGPT(o.layers, o.width, o.heads, o.context, o.fedpara)

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        if name.endswith("bias"):
            return Init("zeros")
        if "norm" in name:
            return Init("ones")
        # GPT-2: what enters the residual stream starts smaller, the deeper the model.
        layer, _, last = name.rpartition(".")
        scale = 0.02 * ((2 * self.options.layers) ** -0.5 if layer.endswith(("proj", "down")) else 1.0)
        return Init("normal", fedpara.initial_scale(scale, shape[1]) if last in fedpara.FACTORS else scale)

    def held_out(self) -> bytes:
        return self._split()[1]

    def corpus(self) -> bytes | None:
        return None if self._is_built_in() else self._split()[0]

    def _is_built_in(self) -> bool:
        return self.data is None and self.options.corpus in BUILT_IN

    def _split(self) -> tuple[bytes, bytes]:
        """What is trained on, and what is held out."""
        if self._divided is not None:
            return self._divided
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

    def divide(self, n_sections: int) -> Classes:
        whole = b"".join(self._split())
        cut = sections(len(whole), self.options.held_out_bytes, n_sections)
        parts = [whole[s.start : s.border] for s in cut]
        held_out = b"".join(whole[s.border : s.stop] for s in cut)
        self._divided = b"".join(parts), held_out

        def taken(pieces: Sequence[Piece]) -> bytes:
            return b"".join(parts[p.number][p.start : p.stop] for p in pieces)

        return Classes(section_names(n_sections), tuple(map(len, parts)), "bytes", taken, held_out)

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
        at_once = max(self.options.batch, EVALUATED_BYTES // t)
        total = 0.0
        for first in range(0, n_windows, at_once):
            n = min(at_once, n_windows - first)
            rows = Rows.of(n, rank, ranks)
            starts = torch.arange(first + rows.first, first + rows.stop) * t
            window_BT = self._held_out[starts[:, None] + torch.arange(t + 1)].long().to(device)
            total += float(_next_byte_loss(model, window_BT)) * n * rows.weight
        return total / n_windows


def _next_byte_loss(model: nn.Module, window_BT: Tensor) -> Tensor:
    logits = model(window_BT[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), window_BT[:, 1:].flatten())
