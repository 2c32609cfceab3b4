"""A task of your own that is no text: a small convolutional network on handwritten digits.

    cd deploy/examples
    thinwire coordinator digits.toml --task digits:make
    thinwire join TICKET --task digits:make

The coordinator has the data (scikit-learn's digits, `pip install scikit-learn`, or an .npz file of yours, see
digits.toml) and hands it to the nodes. A task answers the questions of `thinwire.node.tasks.base.Task`;
nothing else of a run knows what is trained. Replicas are equal to the last bit, so a model has no state that
a forward pass changes: GroupNorm in place of BatchNorm.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from thinwire.compression.errors import ConfigError
from thinwire.node import config
from thinwire.node.tasks.base import Init, Rows, device_of
from thinwire.optim.api import Closure

SIDE = 8
ROW_BYTES = SIDE * SIDE + 1
"""An image, a byte for each pixel, and its label: how examples travel."""


class Net(nn.Module):
    """(N, 1, 8, 8) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )

    def forward(self, x_N1HW: Tensor) -> Tensor:
        y_NC: Tensor = self.layers(x_N1HW)
        return y_NC


class Digits:
    """See `Task`. Losses are cross entropies, in nats per image."""

    def __init__(self, options: config.Task) -> None:
        self.options = options
        self.n_samples = self.n_tokens = options.batch
        self._train: tuple[Tensor, Tensor] | None = None
        self._test: tuple[Tensor, Tensor] | None = None

    def model(self) -> nn.Module:
        return Net()

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        """Biases and shifts 0, scales 1, weights by their fan-in."""
        if name.endswith("bias"):
            return Init("zeros")
        if len(shape) == 1:
            return Init("ones")
        return Init("normal", (2 / prod(shape[1:])) ** 0.5)

    def held_out(self) -> bytes:
        return self._rows()[::5].tobytes()

    def corpus(self) -> bytes:
        rows_NB = self._rows()
        return rows_NB[np.arange(len(rows_NB)) % 5 > 0].tobytes()

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None:
        assert corpus is not None
        assert held_out is not None
        self._train, self._test = _tensors(corpus), _tensors(held_out)

    def draw(self, model: nn.Module, seed: int, rank: int = 0, ranks: int = 1) -> Closure:
        assert self._train is not None
        images, labels = self._train
        rng = np.random.Generator(np.random.Philox(key=seed))
        rows = Rows.of(self.options.batch, rank, ranks)
        picked = torch.from_numpy(rng.integers(0, len(labels), size=self.options.batch)[rows.slice])
        device = device_of(model)
        x_N1HW, y_N = images[picked].to(device), labels[picked].to(device)
        return lambda: functional.cross_entropy(model(x_N1HW).float(), y_N) * rows.weight

    def evaluate(self, model: nn.Module, rank: int = 0, ranks: int = 1) -> float:
        assert self._test is not None
        rows, device = Rows.of(len(self._test[1]), rank, ranks), device_of(model)
        x_N1HW, y_N = (t[rows.slice].to(device) for t in self._test)
        return float(functional.cross_entropy(model(x_N1HW).float(), y_N)) * rows.weight

    def _rows(self) -> np.ndarray:
        """uint8 (N, ROW_BYTES). At the coordinator."""
        images, labels = _read(self.options.corpus)
        if images.shape[1:] != (SIDE, SIDE) or images.min() < 0 or images.max() > 16 or labels.max() > 9:
            raise ConfigError(
                f"task.corpus {self.options.corpus}: images are (N, 8, 8), 0 to 16, labels 0 to 9"
            )
        flat_NP = images.reshape(len(images), -1)
        return np.concatenate([flat_NP, labels[:, None]], axis=1).astype(np.uint8)


def _read(corpus: str) -> tuple[np.ndarray, np.ndarray]:
    if corpus == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError as e:
            raise ConfigError(
                "the digits come with scikit-learn: pip install scikit-learn, or name a file of yours with "
                "--set task.corpus=FILE.npz (images, labels)"
            ) from e
        data = load_digits()
        return data.images, data.target
    try:
        with np.load(corpus, allow_pickle=False) as file:
            return file["images"], file["labels"]
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"task.corpus {corpus}: {e}") from e


def _tensors(data: bytes) -> tuple[Tensor, Tensor]:
    rows_NB = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).reshape(-1, ROW_BYTES).copy())
    images = rows_NB[:, :-1].reshape(-1, 1, SIDE, SIDE).float() / 16
    return images, rows_NB[:, -1].long()


def make(options: config.Task, data: Path | None) -> Digits:
    """What `--task digits:make` calls."""
    if data is not None:
        raise ConfigError("--data: the coordinator hands out the digits, leave it out")
    return Digits(options)
