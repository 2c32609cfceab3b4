"""What strategies are claimed to learn, as runs that give held-out losses, and what must hold between those.

Claims are about losses of the same number of batches at one learning rate per family. (Each variant with the
rate that suits it best is another question: without the DCT, a sign update moves few elements per round, and
a rate ten times as high makes up for that on a model as small as this.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import numpy as np
import pytest

from thinwire.node import config
from thinwire.node.bench.learning.loco import train_data_parallel
from thinwire.node.bench.learning.swarm import train
from thinwire.node.bench.learning.text import Text, linear
from thinwire.optim import spsa
from thinwire.optim.parts import byte_code

Losses = dict[str, float]
Better = tuple[str, str, float]
"""The first run's loss is below the second's by more than that many nats per byte."""

TOY: Final = config.Task(layers=1, width=80, heads=4, context=32, batch=4, held_out_bytes=8192)
"""121,520 parameters."""
N_WORKERS: Final = 4


def broken(losses: Mapping[str, float], claims: Sequence[Better]) -> list[str]:
    """The claims that do not hold, in words."""
    return [
        f"{better} {losses[better]:.3f} is not better than {worse} {losses[worse]:.3f} by {margin}"
        for better, worse, margin in claims
        if not losses[better] + margin < losses[worse]
    ]


# ------------------------------------------------------------------------------------------- decoupled

DEMO: Final[dict[str, dict[str, Any]]] = {
    "k 32": {"compressor": {"name": "dct_topk", "k": 32, "bits": 8}},
    "k 32, 1 bit": {"compressor": {"name": "dct_topk", "k": 32, "bits": 1}},
    "k 8": {"compressor": {"name": "dct_topk", "k": 8, "bits": 8}},
    "k 1": {"compressor": {"name": "dct_topk", "k": 1, "bits": 8}},
    "k 8 without DCT": {"compressor": {"name": "topk", "k": 8, "bits": 8}},
    "k 8 without subtraction": {"compressor": {"name": "dct_topk", "k": 8, "bits": 8}, "alpha": 0.0},
}

DECOUPLED_CLAIMS: Final[list[Better]] = [
    ("AdamW", "k 32", 0.02),
    ("AdamW", "k 8", 0.1),
    ("k 32", "k 8", 0.1),
    ("k 8", "k 1", 0.1),
    ("k 8", "k 8 without DCT", 0.3),
    ("k 8", "k 8 without subtraction", 0.1),
]


def decoupled_losses(seed: int, n_rounds: int) -> Losses:
    """AdamW, DeMo, and DeMo without its parts."""
    text, schedule = Text(TOY, seed), linear(n_rounds)
    adamw = train_data_parallel(text, 2e-3, n_peers=N_WORKERS, n_steps=n_rounds, schedule=schedule)
    losses = {"AdamW": text.loss(adamw)}
    for name, options in DEMO.items():
        strategy = {"name": "decoupled", "lr": 3e-3, "beta": 0.999, **options}
        trained = train(text, strategy, n_peers=N_WORKERS, n_rounds=n_rounds, schedule=schedule)
        losses[name] = text.loss(trained.model)
    return losses


# ------------------------------------------------------------------------------------------- fine-tuning

SMALL: Final = config.Task(layers=1, width=16, heads=2, context=32, batch=4, held_out_bytes=8192)
"""The demo's char-LM with 12,016 parameters instead of 668,800."""
DEMO_MODEL: Final = config.Task(held_out_bytes=8192)
"""The demo's own."""


def one_byte(lr: float) -> dict[str, dict[str, Any]]:
    """The larger the model the lower the rate; the demo has 3e-3."""
    return {name: {"name": "spsa", "lr": lr, "eps": 1e-3, "probes": 4} for name in ("byte", "float")}


ONE_BIT: Final[dict[str, dict[str, Any]]] = {
    name: {
        "name": "decoupled",
        "lr": 3e-3,
        "beta": 0.95,
        "compressor": {"name": "dct_topk", "k": 32, "bits": bits},
    }
    for name, bits in (("8 bits", 8), ("1 bit", 1))
}


def share_of_the_fall(falls: Sequence[Mapping[str, float]]) -> float:
    """What a byte per probe keeps of the fall in loss with float scalars, the mean of several seeds."""
    return sum(fall["byte"] for fall in falls) / sum(fall["float"] for fall in falls)


class FineTuning:
    """As the demo does it: a short pretraining on one text, then other text."""

    def __init__(self, options: config.Task, seed: int, n_rounds: int) -> None:
        base = train_data_parallel(
            Text(options, seed), 3e-3, n_peers=N_WORKERS, n_steps=n_rounds, schedule=linear(n_rounds)
        )
        self.text = Text(options.model_copy(update={"corpus": "stdlib"}), seed, base.state_dict())

    def losses(self, runs: Mapping[str, Mapping[str, Any]], n_peers: int, n_rounds: int) -> Losses:
        """Of the base as "before", and after each run. An SPSA run called "float" sends float scalars."""
        losses = {"before": self.text.loss(self.text.model())}
        for name, strategy in runs.items():
            with float_scalars() if name == "float" else nullcontext():
                trained = train(self.text, strategy, n_peers=n_peers, n_rounds=n_rounds)
            losses[name] = self.text.loss(trained.model)
        return losses


CODES: Final = [code for code in range(256) if code not in (byte_code.NOTHING, byte_code.NEGATIVE)]


class FloatScalars:
    """In the place of `byte_code`: a byte is the number of a float32 value in a table that the replicas of
    this process share. All else stays what it is, payloads and checks included."""

    NOTHING = byte_code.NOTHING
    NEGATIVE = byte_code.NEGATIVE

    def __init__(self) -> None:
        self.n_encoded = 0
        self.values: dict[int, float] = {}

    def encode(self, g: float, word: int) -> int:
        """A code is used again after 254 probes: more than there are in a round."""
        if byte_code.encode(g, word) == byte_code.NOTHING:
            return byte_code.NOTHING
        code = CODES[self.n_encoded % len(CODES)]
        self.n_encoded += 1
        self.values[code] = float(np.float32(g))
        return code

    def decode(self, code: int) -> float:
        return self.values[code]


@contextmanager
def float_scalars() -> Iterator[None]:
    scalars = FloatScalars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spsa, "byte_code", scalars)
        yield
    assert scalars.n_encoded > 0
