"""What a learning rate means, and what new runs do where their file says nothing: the rules, in one place.

Learning rates, with `lr_scale = "rule"` ("none" is what older runs have):

    decoupled, sign   lr / root(share)   share: of a parameter's elements that a round moves, about
    spsa              lr n               n: the probes of the round, of every peer up to `probes`; with
                                         shared_noise the directions, up to `probes`
    the rest          lr                 diloco's is its inner optimizer's; without sign lr is in the momentum

So a rate that suits a compressor which moves every element suits one that moves a thirty-second of them, and
the rate of a single peer suits a swarm of eight. Weight decay goes by lr itself: it acts on every element.

New runs, by their compressor (docs/strategies.md has what was measured):

    diloco, where peers select their own coefficients (topk, dct_topk): SparseLoCo as published, the mean
        over the senders of a coefficient, outer_lr 1, no outer momentum, feedback_decay 0.95
    diloco with another one, or with none named (dense, 4 bits), or with control: outer_lr 0.7,
        outer_momentum 0.6
    decoupled, base adamw: the mean over the senders, and, as the momentum is its first moment, adam_beta1 0,
        adam_beta2 0.95
    any with dct_topk: its indices in Rice codes (compression/registry.py)
    decoupled: beta_warmup 1, with which beta 0.999 suits short runs as it suits long ones
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, Literal

from ..compression.base import Compressor, Part
from ..compression.exact import root
from ..compression.registry import COMPRESSORS, DEFAULT_COMPRESSOR, compressor_of_new_run

LrScale = Literal["rule", "none"]

Options = Mapping[str, Any]
"""Of a strategy, complete, as a run's file has it."""

Values = Mapping[str, Any]
"""Option -> value in new runs, or a function of the options that says it: `Facts.in_runs`."""

SENDER_FLOOR: Final = 0.25
"""Of new runs; see parts/sender_mean.py."""

BETA_WARMUP: Final = 1.0
"""Of new runs."""

FEW_ROUNDS: Final = 50
"""In fewer outer rounds momentum costs more than it brings."""


# ------------------------------------------------------------------------------------------- learning rates


@lru_cache(maxsize=4096)
def sign_factor(compressor: Compressor, part: Part, n_packs: int) -> float:
    """What a step by signs is to be taken times: in Python floats with + - * / only."""
    share = compressor.moved_share(part.entire, n_packs)
    return 1.0 / root(share) if share > 0.0 else 1.0


# ------------------------------------------------------------------------------------------- new runs


def selects_its_own(options: Options) -> bool:
    """Whether each peer selects the coefficients that it sends."""
    return COMPRESSORS[options["compressor"]["name"]].selects_its_own


def _is_sparse(options: Options) -> bool:
    """Whether a round's mean has only what was selected. With control it has what was sent before, too."""
    return selects_its_own(options) and options.get("control", "none") == "none"


def _by_compressor(own: object, alike: object) -> Callable[[Options], Any]:
    """One value where each peer selects its own coefficients, another one where all send the same."""
    return lambda options: own if _is_sparse(options) else alike


def _mean(options: Options) -> str:
    return "senders" if _is_sparse(options) and options["aggregate"] == "mean" else "all"


def _sender_floor(options: Options) -> float:
    return SENDER_FLOOR if options["mean"] == "senders" else 0.0


def _of_adamw(with_momentum: float, otherwise: float) -> Callable[[Options], float]:
    def value(options: Options) -> float:
        """What is no number is refused later, in words."""
        has_momentum = isinstance(options["beta"], int | float) and options["beta"] > 0
        return with_momentum if options["base"] == "adamw" and has_momentum else otherwise

    return value


SPSA_RUNS: Final[Values] = {
    "clip": 4.0,
    "max_probes": lambda options: options["probes"],
    "lr_scale": lambda options: "rule" if options["scale"] == "mean" else "none",
}

DECOUPLED_RUNS: Final[Values] = {
    "compressor": compressor_of_new_run(DEFAULT_COMPRESSOR),
    "mean": lambda options: _mean(options) if options["base"] == "adamw" else "all",
    "sender_floor": _sender_floor,
    "lr_scale": "rule",
    "beta_warmup": BETA_WARMUP,
    "adam_beta1": _of_adamw(0.0, 0.9),
    "adam_beta2": _of_adamw(0.95, 0.999),
}

DILOCO_RUNS: Final[Values] = {
    "compressor": {"name": "dense", "bits": 4, "group_size": 128},
    "mean": _mean,
    "sender_floor": _sender_floor,
    "outer_lr": _by_compressor(1.0, 0.7),
    "outer_momentum": _by_compressor(0.0, 0.6),
    "feedback_decay": _by_compressor(0.95, 1.0),
}


def warning_of(options: Options, rounds: int) -> str | None:
    """What the owner of a run of so many rounds should know of its options; None: nothing."""
    mu = options.get("outer_momentum", 0.0)
    if mu == 0.0 or rounds >= FEW_ROUNDS:
        return None
    return (
        f"strategy.outer_momentum = {mu:g} in {rounds} rounds: momentum takes every change about "
        f"{1 / (1 - mu):.1f} times, much of it rounds later, and in fewer than {FEW_ROUNDS} rounds that "
        f"costs more than it brings. outer_momentum = 0, outer_lr = 1 (the plain mean) learn more then"
    )
