"""Rows of `thinwire bench learning` that are trained by name alone: what the literature of 2025 and 2026 adds
to a method, for the same payloads and tokens. docs/strategies.md says what came of it.

    NAME-snoo, NAME-gpa   SNOO and GPA (see `averaging`): of every step of one peer alone; of the rounds of
                          decoupled and, GPA, of diloco and muloco, by all replicas alike; SNOO of each peer's
                          inner steps there, as outer steps are SNOO's already
    lozo, lozo-labels     MeZO's directions of low rank (see `mezo`)
    subspace              the momentum along as many random directions as `decoupled` sends bytes
    decoupled-overlap     overlap = 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, Final

from .averaging import Gpa, MakeAveraging, Snoo
from .loco import Loco, train_loco
from .methods import (
    DENSE,
    METHODS,
    PROBES,
    SIGN_RATES,
    Method,
    Shape,
    Try,
    adamw,
    decoupled,
    loco,
    mezo,
    trained,
)
from .mezo import Lozo
from .swarm import Trained
from .text import Learnt, Text, linear

K: Final = 5
"""Steps between two of SNOO's."""

DIRECTIONS: Final = 876
"""With 29 bytes of framing and 2 of a scale as many bytes as `decoupled` has with `SHAPE`, 907."""

# ------------------------------------------------------------------------------------------- averaging


def _averaged(train: Callable[..., Trained], text: Text, shape: Shape, tried: Try, **options: Any) -> Trained:
    return train(text, shape, tried, averaging=_averaging_of(tried), **options)


def _averaging_of(tried: Try) -> MakeAveraging:
    """By what the try has: SNOO's or GPA's values."""
    own: dict[str, Any] = dict(tried.own)
    if "mu" in own:
        return partial(Snoo, every=K, lr=own["rate"], momentum=own["mu"])
    return partial(Gpa, **own)


def _local_snoo(text: Text, shape: Shape, tried: Try, **options: Any) -> Trained:
    """The reference's peers, payloads whole: to be compared with the reference."""
    method = Loco(
        lr=tried.lr,
        outer_lr=tried.outer_lr,
        outer_momentum=tried.outer_momentum,
        inner_steps=shape.inner_steps,
        **options,
    )
    schedule = linear(shape.n_rounds)
    model = train_loco(
        text,
        method,
        n_peers=shape.n_peers,
        n_rounds=shape.n_rounds,
        schedule=schedule,
        averaging=_averaging_of(tried),
    )
    n_bytes = 4.0 * shape.n_rounds * sum(p.numel() for p in model.parameters())
    return Trained(model, n_bytes, ((n_bytes, text.loss(model)),))


# ------------------------------------------------------------------------------------------- low rank


def _lozo(text: Learnt, shape: Shape, tried: Try) -> Trained:
    lozo = Lozo(**{name: int(value) for name, value in tried.own})
    model = mezo(text, shape, tried, lozo)
    n_bytes = 4.0 * PROBES * shape.n_rounds
    return Trained(model, n_bytes, ((n_bytes, text.loss(model)),))


# ------------------------------------------------------------------------------------------- subspace


def _subspace(text: Text, shape: Shape, tried: Try) -> Trained:
    strategy = {"name": "subspace", "lr": tried.lr, "dimension": DIRECTIONS}
    return trained(text, strategy, shape.n_peers, shape.n_steps)


# ------------------------------------------------------------------------------------------- the rows


def _tries(
    rates: Sequence[float], own: Sequence[Mapping[str, float]], outer: tuple[float, float] = (1.0, 0.0)
) -> tuple[Try, ...]:
    return tuple(Try(lr, *outer, tuple(values.items())) for lr, values in product(rates, own))


_SNOO: Final = ({"rate": 0.7, "mu": 0.3}, {"rate": 0.7, "mu": 0.6}, {"rate": 0.7, "mu": 0.9})
_STEPS: Final = ({"mu_x": 0.9, "mu_y": 0.7}, {"mu_x": 0.974, "mu_y": 0.7}, {"mu_x": 0.974, "mu_y": 0.9})
_ROUNDS: Final = (
    {"mu_x": 0.6, "mu_y": 0.6, "rate": 1.0},
    {"mu_x": 0.6, "mu_y": 0.8, "rate": 1.75},
    {"mu_x": 0.8, "mu_y": 0.8, "rate": 1.75},
)


_LOW: Final = ({"rank": 2, "interval": 10}, {"rank": 2, "interval": 40})

TRIED: Final[dict[str, Method]] = {
    "decoupled-overlap": Method(partial(decoupled, overlap=1), None, SIGN_RATES),
    "alone-snoo": Method(partial(_averaged, adamw, alone=True), None, _tries((2e-3, 4e-3), _SNOO)),
    "alone-gpa": Method(partial(_averaged, adamw, alone=True), None, _tries((2e-3, 4e-3), _STEPS)),
    "decoupled-snoo": Method(partial(_averaged, decoupled), None, _tries((2e-3, 5e-3), _SNOO)),
    "decoupled-gpa": Method(partial(_averaged, decoupled), None, _tries((5e-3, 1e-2), _STEPS)),
    "diloco-snoo": Method(_local_snoo, None, _tries((2e-3, 4e-3), _SNOO)),
    "diloco-gpa": Method(partial(_averaged, loco, **DENSE), None, _tries((4e-3, 1e-2), _ROUNDS)),
    "muloco-snoo": Method(
        partial(_local_snoo, muon=True), None, _tries((4e-3, 1e-2), _SNOO, outer=(0.7, 0.6))
    ),
    "muloco-gpa": Method(
        partial(_averaged, loco, **DENSE, inner="muon"), None, _tries((4e-3, 1e-2), _ROUNDS)
    ),
    "subspace": Method(_subspace, None, tuple(map(Try, (1e-2, 2e-3, 3e-3, 6e-3, 1.5e-2, 2e-2)))),
    "lozo": Method(_lozo, None, _tries((3e-3, 1e-2, 2e-2), _LOW), "other text"),
    "lozo-labels": Method(_lozo, None, _tries((1e-3, 2e-3, 4e-3), _LOW), "labels"),
}

ROWS: Final = {**METHODS, **TRIED}
