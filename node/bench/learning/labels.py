"""Label words, as MeZO fine-tunes on them: is a short window of real text prose or code?

    |ion of the name is bound|  It is p        a window, the prompt, the first byte of "prose" or "code"

The weights to begin with have learnt all of it as text, next byte by next byte, with labels of which some
are wrong: they know the words, and half-trust them. Fine-tuning has the right ones, and the cross-entropy
between the two words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ....optim.base import Closure
from ... import config
from ...tasks.corpora import read_text
from .text import Text, Weights, linear

WINDOW: Final = 32
"""Bytes of text in an example."""

PROMPT: Final = b"\nIt is "
WORDS: Final = b"pc"
"""The first bytes of "prose" and "code", the words for the texts of `SOURCES` in that order."""

SOURCES: Final = ("pydoc", "stdlib")
CONTEXT: Final = WINDOW + len(PROMPT)

WRONG: Final = 0.3
"""Of the labels that are learnt from at first."""

FIRST_STEPS: Final = 500
FIRST_BATCH: Final = 32
FIRST_LR: Final = 3e-3

HELD_OUT_BYTES: Final = 1 << 16
"""At the end of each source."""
N_HELD_OUT: Final = 1024
"""Examples."""


@dataclass(frozen=True, slots=True)
class Examples:
    """int64 bytes of window, prompt and word, and which word is right: (B, T + 1) and (B,)."""

    bytes_BT: Tensor
    label_B: Tensor

    def to(self, device: str) -> Examples:
        return Examples(self.bytes_BT.to(device), self.label_B.to(device))


class Labels:
    """The label words, from weights that have learnt a little: `Learnt`. Batches are those of `seed`."""

    def __init__(self, task: config.Task, seed: int, base: Weights, device: str = "cpu") -> None:
        self.seed, self._batch, self._device = seed, task.batch, device
        self._begun = Text(_with_context(task), seed, base, device)
        rng = np.random.Generator(np.random.Philox(key=(1 << 127) + 1))
        self._held_out = examples(rng, N_HELD_OUT, is_held_out=True).to(device)

    def model(self) -> nn.Module:
        """A new one, with the initial values, in training mode."""
        return self._begun.model()

    def batch(self, model: nn.Module, peer: int, number: int) -> Closure:
        """A peer's batch, from 1 on: the same one whatever is trained with it."""
        rng = np.random.Generator(np.random.Philox(key=(self.seed << 40) + (peer << 32) + number))
        drawn = examples(rng, self._batch, is_held_out=False).to(self._device)
        return lambda: functional.cross_entropy(word_logits(model, drawn), drawn.label_B)

    def loss(self, model: nn.Module) -> float:
        """On the held-out examples, in nats per label. Leaves the model in evaluation mode."""
        return self.held_out(model)[0]

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> tuple[float, float]:
        """Loss, and the share of examples whose word is the likelier one."""
        logits_BW, label_B = word_logits(model.eval(), self._held_out), self._held_out.label_B
        loss = functional.cross_entropy(logits_BW, label_B)
        return float(loss), float((logits_BW.argmax(1) == label_B).float().mean())


def word_logits(model: nn.Module, drawn: Examples) -> Tensor:
    """Of the two words, behind the prompt: (B, 2)."""
    logits_BTV: Tensor = model(drawn.bytes_BT[:, :-1])
    return logits_BTV[:, -1, list(WORDS)]


def labels(task: config.Task, seed: int, device: str = "cpu") -> Labels:
    """From weights of this seed. Of the task model and batch count."""
    return Labels(task, seed, first_weights(task, seed), device)


def first_weights(task: config.Task, seed: int, n_steps: int = FIRST_STEPS) -> Weights:
    """After some steps of AdamW on windows, prompts and words alike."""
    model, schedule = Text(_with_context(task), seed).model(), linear(n_steps)
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    rng = np.random.Generator(np.random.Philox(key=(1 << 126) + seed))
    words = torch.tensor(list(WORDS))
    for step in range(1, n_steps + 1):
        drawn = examples(rng, FIRST_BATCH, is_held_out=False)
        is_wrong = torch.from_numpy(rng.random(FIRST_BATCH) < WRONG)
        drawn.bytes_BT[:, -1] = words[torch.where(is_wrong, 1 - drawn.label_B, drawn.label_B)]
        adamw.param_groups[0]["lr"] = FIRST_LR * schedule(step)
        adamw.zero_grad()
        logits = model(drawn.bytes_BT[:, :-1])
        next_BT = drawn.bytes_BT[:, 1:]
        as_text = functional.cross_entropy(logits.flatten(0, 1), next_BT.flatten())
        word = functional.cross_entropy(logits[:, -1], next_BT[:, -1])
        (as_text + word).backward()  # type: ignore[no-untyped-call]
        adamw.step()
    return model.state_dict()


def _with_context(task: config.Task) -> config.Task:
    return task.model_copy(update={"context": CONTEXT})


def examples(rng: np.random.Generator, n: int, *, is_held_out: bool) -> Examples:
    """`n` of them, of either kind with the same probability."""
    label = rng.integers(0, len(SOURCES), size=n)
    place = rng.random(n)
    rows = [
        _window(SOURCES[i], x, is_held_out) + PROMPT + WORDS[i : i + 1]
        for i, x in zip(label, place, strict=True)
    ]
    bytes_BT = torch.from_numpy(np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(n, -1).astype(np.int64))
    return Examples(bytes_BT, torch.from_numpy(label))


def _window(name: str, place: float, is_held_out: bool) -> bytes:
    """`place`: in [0, 1), of the part of the source."""
    text = source(name)
    first = len(text) - HELD_OUT_BYTES if is_held_out else 0
    stop = (len(text) if is_held_out else len(text) - HELD_OUT_BYTES) - WINDOW
    start = first + int(place * (stop - first))
    return text[start : start + WINDOW]


@cache
def source(name: str) -> bytes:
    """With a space in place of every run of white space: indentation would give code away."""
    return b" ".join(read_text(name).split())
