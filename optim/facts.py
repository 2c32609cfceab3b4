"""What others need to know of a strategy before one is built: its options, its batches, its self-test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .options import Options


@dataclass(frozen=True, slots=True)
class KnownUpdate:
    """A case of the self-test: what two rounds of two offers, whose bits are fixed, make of a small replica.

    `options`: of the strategy, as in a run's file. `answer`: unsigned 64-bit `parameter_sum` of all that is
    replicated. `is_slow`: takes about a second; a node does not wait for it when it starts.
    """

    options: Mapping[str, Any]
    answer: int
    is_slow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """`Strategy.facts`; names of options are those of the `options` dataclass."""

    options: type[Options]

    batches: tuple[str, ...] = ()
    """Options whose product is the number of batches that a peer draws in a round; none: one batch."""

    batches_per_step: tuple[str, ...] = ()
    """Those of them that data-parallel training has, too: batches between two exchanges of gradients."""

    fitted: str | None = None
    """The one of `batches` that a comparison fits to its length where nobody says what it is to be."""

    seconds: str | None = None
    """The option that, unless it is 0, leaves it to the clock how many batches a round has."""

    changeable: tuple[str, ...] = ("lr", "weight_decay")
    """Options that a run may change between two rounds: they act in a round only; neither payloads nor state
    depend on them."""

    in_runs: Mapping[str, Any] = field(default_factory=dict)
    """Options that new runs have at other values than the defaults: those are what older ledgers mean. A
    value may be a function of the options, complete, with the values of those before it."""

    only_with: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Options that record 0 has, with those that belong to them, only where they are not at their default:
    runs that make no use of them are what they were before there were any."""

    small_model: Mapping[str, Any] = field(default_factory=dict)
    """Options for a small model and a short run: the defaults are the papers', for large and long ones."""

    compressor: Mapping[str, Any] | None = None
    """The table of its compressor by default; None: the one of all strategies."""

    is_audited: bool = True
    """Whether a peer's work can be done again by another: new runs have audits."""

    bytes_per_parameter: Callable[[Mapping[str, Any]], float] = lambda _options: 8.0
    """What a node holds for each float32 parameter in a round at the least, beside activations, by the
    options in record 0: parameters and gradients, unless a strategy says otherwise."""

    idle_bytes: float = 0.0
    """So many of them can wait on the disk meanwhile (`join --offload-idle`)."""

    known_updates: Mapping[str, KnownUpdate] = field(default_factory=dict)
    """The self-test's cases of its `apply`, by the names that people are told; one at least."""
