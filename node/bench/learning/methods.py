"""What `thinwire bench learning` trains: a row for each method, ours and the reference, with the learning
rates and outer values that are tried for both. Every row may try as many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final, Literal

from torch import nn

from ....coordinator.protocol.figures import ddp_bytes
from ....optim.registry import complete_config, complete_new_run
from ... import config
from ...compare.split import Split
from .averaging import MakeAveraging, no_averaging
from .demo import train_demo
from .labels import labels
from .loco import Loco, train_data_parallel, train_loco
from .mezo import Lozo, train_mezo
from .swarm import Trained, train
from .text import Learnt, Text, Weights, linear

K: Final = 64
"""Of 4096 elements, that SparseLoCo sends."""

PROBES: Final = 4
POINTS: Final = 20
"""Of a curve."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How long, how many, on which model. A round is `inner_steps` of every peer."""

    task: config.Task
    n_peers: int
    n_rounds: int
    inner_steps: int
    split: Split | None = None
    """How uneven the peers' data are."""

    def text(self, task: config.Task, seed: int, base: Weights | None = None, device: str = "cpu") -> Text:
        return Text(task, seed, base, device, split=self.split, n_peers=self.n_peers)

    def __hash__(self) -> int:
        return hash(repr(self))  # a task has a table among its options

    @property
    def n_steps(self) -> int:
        return self.n_rounds * self.inner_steps


SHAPE: Final = Shape(
    config.Task(layers=1, width=64, heads=4, context=32, batch=8, held_out_bytes=16384), 4, 40, 15
)
"""84,928 parameters; 600 steps."""

LONG: Final = Shape(
    config.Task(layers=6, width=256, heads=8, context=128, batch=8, held_out_bytes=32768), 4, 100, 20
)
"""4.9 million parameters; 2,000 steps."""


@dataclass(frozen=True, slots=True)
class Try:
    """What is tuned. Methods without outer values leave those alone. `own`: what one method alone has, by
    the names of its formula."""

    lr: float
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    own: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        words = [f"lr {self.lr:g}", *(f"{name} {value:g}" for name, value in self.own)]
        outer = self.outer_lr, self.outer_momentum
        return ", ".join(words + ([f"outer {outer[0]:g}/{outer[1]:g}"] if outer != (1.0, 0.0) else []))


Learns = Literal["text", "other text", "labels"]

Train = Callable[[Any, Shape, Try], Trained]
Reference = Callable[[Any, Shape, Try], nn.Module]
"""On `Text` or `Labels`, by the method's `learns`."""


@dataclass(frozen=True, slots=True)
class Method:
    """`reference`: None, the row is one itself. `tries`: the first is what is taken without tuning.
    `learns`: text from the beginning; other text, or label words, from weights that have learnt already."""

    ours: Train
    reference: Reference | None
    tries: tuple[Try, ...]
    learns: Learns = "text"


# ------------------------------------------------------------------------------------------- baselines


def adamw(
    text: Text, shape: Shape, tried: Try, *, alone: bool, averaging: MakeAveraging = no_averaging
) -> Trained:
    n_peers, curve = 1 if alone else shape.n_peers, list[tuple[float, float]]()

    def seen(step: int, model: nn.Module) -> None:
        if step * POINTS // shape.n_steps > (step - 1) * POINTS // shape.n_steps:
            n_bytes = 0.0 if alone else step * ddp_bytes(n_peers, sum(p.numel() for p in model.parameters()))
            curve.append((n_bytes, text.loss(model)))
            model.train()

    model = train_data_parallel(
        text,
        tried.lr,
        n_peers=n_peers,
        n_steps=shape.n_steps,
        schedule=linear(shape.n_steps),
        seen=seen,
        averaging=averaging,
    )
    return Trained(model, curve[-1][0], tuple(curve))


# ------------------------------------------------------------------------------------------- decoupled


def decoupled(
    text: Text, shape: Shape, tried: Try, averaging: MakeAveraging = no_averaging, **options: Any
) -> Trained:
    strategy = {"name": "decoupled", "lr": tried.lr, "beta": 0.999, **options}
    return trained(text, strategy, shape.n_peers, shape.n_steps, averaging)


def _before(
    text: Text, shape: Shape, tried: Try, averaging: MakeAveraging = no_averaging, **strategy: Any
) -> Trained:
    """By what a run means whose record 0 says no more: the defaults from before new runs had others."""
    n_rounds = shape.n_steps if strategy["name"] == "decoupled" else shape.n_rounds
    return train(
        text,
        complete_config({"lr": tried.lr, **strategy}),
        n_peers=shape.n_peers,
        n_rounds=n_rounds,
        schedule=linear(n_rounds),
        n_points=POINTS,
        averaging=averaging,
    )


def _diloco_before(text: Text, shape: Shape, tried: Try) -> Trained:
    return _before(text, shape, tried, name="diloco", weight_decay=0.0, inner_steps=shape.inner_steps)


def _demo(text: Text, shape: Shape, tried: Try) -> nn.Module:
    return train_demo(
        text, lr=tried.lr, n_peers=shape.n_peers, n_steps=shape.n_steps, schedule=linear(shape.n_steps)
    )


# ------------------------------------------------------------------------------------------- diloco


def loco(
    text: Text, shape: Shape, tried: Try, averaging: MakeAveraging = no_averaging, **options: Any
) -> Trained:
    strategy = {
        "name": "diloco",
        "lr": tried.lr,
        "weight_decay": 0.0,
        "inner_steps": shape.inner_steps,
        "outer_lr": tried.outer_lr,
        "outer_momentum": tried.outer_momentum,
        **options,
    }
    return trained(text, strategy, shape.n_peers, shape.n_rounds, averaging)


def _loco_reference(text: Text, shape: Shape, tried: Try, **options: Any) -> nn.Module:
    method = Loco(
        lr=tried.lr,
        outer_lr=tried.outer_lr,
        outer_momentum=tried.outer_momentum,
        inner_steps=shape.inner_steps,
        **options,
    )
    return train_loco(
        text, method, n_peers=shape.n_peers, n_rounds=shape.n_rounds, schedule=linear(shape.n_rounds)
    )


DENSE: Final[dict[str, Any]] = {"compressor": {"name": "dense", "bits": 4, "group_size": 128}}
SPARSE: Final[dict[str, Any]] = {
    "compressor": {"name": "topk", "k": K, "bits": 2, "indices": "rice"},
    "feedback_decay": 0.95,
}

# ------------------------------------------------------------------------------------------- spsa


def _spsa(text: Learnt, shape: Shape, tried: Try, *, alone: bool) -> Trained:
    # Without the rule a rate is one of the mean over all probes, as MeZO's.
    strategy = {"name": "spsa", "lr": tried.lr, "lr_scale": "none", "eps": 1e-3, "probes": PROBES}
    return trained(text, strategy, 1 if alone else shape.n_peers, shape.n_rounds)


def mezo(text: Learnt, shape: Shape, tried: Try, lozo: Lozo | None = None) -> nn.Module:
    """See `train_mezo`."""
    return train_mezo(
        text,
        lr=tried.lr,
        n_peers=shape.n_peers,
        n_rounds=shape.n_rounds,
        n_probes=PROBES,
        schedule=linear(shape.n_rounds),
        lozo=lozo,
    )


def text_of(learns: Learns, shape: Shape, seed: int, device: str = "cpu") -> Learnt:
    if learns == "labels":
        return labels(shape.task, seed, device)
    return (
        shape.text(shape.task, seed, device=device) if learns == "text" else pretrained(shape, seed, device)
    )


def pretrained(shape: Shape, seed: int, device: str = "cpu") -> Text:
    """Another text than that which its initial weights have learnt in 60 steps, as in the demo."""
    first = shape.text(shape.task, seed, device=device)
    base: Weights = train_data_parallel(
        first, 3e-3, n_peers=shape.n_peers, n_steps=60, schedule=linear(60)
    ).state_dict()
    return shape.text(shape.task.model_copy(update={"corpus": "stdlib"}), seed, base, device)


def trained(
    text: Learnt,
    strategy: Mapping[str, Any],
    n_peers: int,
    n_rounds: int,
    averaging: MakeAveraging = no_averaging,
) -> Trained:
    """By what a new run is that says so much."""
    return train(
        text,
        complete_new_run(strategy),
        n_peers=n_peers,
        n_rounds=n_rounds,
        schedule=linear(n_rounds),
        n_points=POINTS,
        averaging=averaging,
    )


# ------------------------------------------------------------------------------------------- the rows

_RATES: Final = tuple(map(Try, (2e-3, 5e-4, 1e-3, 4e-3, 6e-3, 1e-2)))
SIGN_RATES: Final = tuple(map(Try, (5e-3, 2e-3, 1e-2, 1.5e-2, 2e-2, 4e-2)))
_PROBE_RATES: Final = tuple(map(Try, (1e-2, 3e-3, 5e-3, 2e-2, 3e-2, 5e-2)))
_LABEL_RATES: Final = tuple(map(Try, (5e-3, 1e-3, 2e-3, 3e-3, 8e-3, 1.2e-2)))
_OUTER: Final = ((0.7, 0.6), (1.0, 0.0), (0.7, 0.9))
_OUTER_TRIES: Final = tuple(Try(lr, *outer) for lr, outer in product((4e-3, 1e-2), _OUTER))
_BEFORE_TRIES: Final = tuple(Try(lr, 0.7, 0.9) for lr in (4e-3, 5e-4, 1e-3, 2e-3, 6e-3, 1e-2))
_SPARSE_TRIES: Final = tuple(
    Try(lr, *outer) for lr, outer in product((4e-3, 1e-2), ((1.0, 0.0), (2.0, 0.0), (0.7, 0.6)))
)

METHODS: Final[dict[str, Method]] = {
    "alone": Method(partial(adamw, alone=True), None, _RATES),
    "ddp": Method(partial(adamw, alone=False), None, _RATES),
    "decoupled": Method(decoupled, _demo, SIGN_RATES),
    "decoupled-before": Method(partial(_before, name="decoupled"), None, SIGN_RATES),
    "diloco": Method(partial(loco, **DENSE), _loco_reference, _OUTER_TRIES),
    "diloco-before": Method(_diloco_before, None, _BEFORE_TRIES),
    "muloco": Method(partial(loco, **DENSE, inner="muon"), partial(_loco_reference, muon=True), _OUTER_TRIES),
    "sparseloco-all": Method(
        partial(loco, **SPARSE, mean="all"), partial(_loco_reference, k=K), _SPARSE_TRIES
    ),
    "sparseloco": Method(
        partial(loco, **SPARSE), partial(_loco_reference, k=K, mean="senders"), _SPARSE_TRIES
    ),
    "spsa-alone": Method(partial(_spsa, alone=True), None, _PROBE_RATES, "other text"),
    "spsa": Method(partial(_spsa, alone=False), mezo, _PROBE_RATES, "other text"),
    "spsa-labels": Method(partial(_spsa, alone=False), mezo, _LABEL_RATES, "labels"),
}
IN_LONG: Final = ("ddp", "decoupled", "muloco")

BETTER: Final = (
    ("decoupled", "alone"),
    ("diloco", "alone"),
    ("muloco", "alone"),
    ("muloco", "ddp"),
    ("muloco", "diloco"),
    ("sparseloco", "alone"),
    ("sparseloco", "sparseloco-all"),
    ("spsa", "spsa-alone"),
)
"""The first ends at a lower held-out loss than the second, in the mean of the seeds."""

HALF: Final = (("decoupled", "decoupled-before"), ("diloco", "diloco-before"))
"""The first needs at most half of the second's bytes to the loss that bytes are counted to."""
