"""The options of gossip: what goes together, and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from ...compression.base import Compressor
from ...compression.errors import ConfigError
from ..inner.optimizers import check_inner
from ..options import Number, Whole
from ..robust.options import BoundedOptions
from .accounting import check_privacy
from .edges import check_edges
from .merging import END, check_merge_every
from .topology import FIXED, Topology

INNER: Final[dict[str, Any]] = {"name": "AdamW", "betas": [0.9, 0.95]}

EIGHT_BITS: Final = {"name": "dense", "bits": 8}

IN_PAIRS: Final = ("a2cid2", "dadao")
"""Mixings that take one edge at a time."""


@dataclass(frozen=True, kw_only=True)
class GossipOptions(BoundedOptions):
    """Of a run's `[strategy]`, and keyword arguments of `Gossip`."""

    compressor: Compressor
    """Of what goes to neighbours. "choco" takes any, the others the dense one. Merges are dense: in the
    same format, or with 16 bits."""

    lr: Annotated[float, Number(at_least=0)] = 4e-4
    """The inner optimizer's; schedules act on it."""

    weight_decay: Annotated[float, Number(at_least=0)] = 0.1
    """The inner optimizer's."""

    inner: str | Mapping[str, Any] = field(default_factory=lambda: dict(INNER))
    """One of torch's optimizers and its options, but for lr and weight_decay, which stand above, or "lion" or
    "schedulefree" (extras of these names). "muon": Muon for matrices of numbered blocks, AdamW for the
    rest."""

    inner_steps: Annotated[int, Whole(1, 2**16)] = 30
    """H, of one micro-batch each, in a round."""

    max_grad_norm: Annotated[float, Number(at_least=0)] = 1.0
    """L2 norm of an inner step's gradient; 0: no limit."""

    mixing: Literal["plain", "a2cid2", "choco", "dadao"] = "plain"
    """How models mix: with the neighbours' weighted mean, with momentum and one partner in a round, by
    changes that any compressor packs, or, for strongly convex losses, by way of duals, to the optimum."""

    topology: Topology = "random"
    """Who exchanges with whom: a ring, 2^k steps along it in turns, random partners, all, or `edges`."""

    edges: tuple[tuple[int, ...], ...] = ()
    """Of topology "file": pairs of peers by the numbers that they came in with, [[0, 1], [1, 2]]."""

    topology_file: str = ""
    """A file of edges, two numbers a line, which becomes `edges` in record 0 when the run is founded."""

    degree: Annotated[int, Whole(1, 64)] = 1
    """Partners in a round of the "random" topology."""

    gamma: Annotated[float, Number(above=0, at_most=1)] = 0.4
    """With "choco": the step towards the neighbours; less for compressors that lose more."""

    mu: Annotated[float, Number(at_least=0)] = 0.0
    """With "dadao": how strongly convex every peer's loss is, at least; it decides on the rates."""

    smoothness: Annotated[float, Number(at_least=0)] = 0.0
    """With "dadao": how smooth, the largest curvature."""

    merge_every: int | str = 10
    """Rounds between two merges; "end": one at 99.7% of the run. After the last round there is one anyway."""

    participation: Annotated[float, Number(above=0, at_most=1)] = 1.0
    """How likely a peer takes part in a merge that is not the last one."""

    takes: Literal["s2s", "s2a"] = "s2s"
    """Who goes on from a merge in which some took part: those alone, or all."""

    privacy: Mapping[str, Any] = field(default_factory=dict)
    """Noise on what a peer learns, against everybody else: { clip = 1.0, noise = 4.0, delta = 1e-5 }. `clip`:
    L2, what local steps move in a round, at most; `noise`: as many times that; `delta`: of the account."""

    clip_neighbours: Annotated[float, Number(at_least=1)] = 1.25
    """No neighbour's difference pulls for more than this many times the median of the neighbours'."""

    patience_s: Annotated[float, Number(at_least=0, at_most=600)] = 5.0
    """For neighbours whose models are under way when the next round begins, at most."""

    weights: Literal["samples", "equal", "work"] = "samples"
    """In merges peers count alike, or by the samples of that round or of all rounds ("work") since the merge
    that they went on from, up to twice their median (without `bound`: `clip` times)."""

    clip: Annotated[float, Number(at_least=1)] = 10.0
    """Without `bound`: no offer's L1 norm or samples count for more than this many times their median in the
    round."""

    @classmethod
    def check(cls, entries: Mapping[str, Any]) -> None:
        super().check(entries)
        check_inner(entries["inner"], entries["weight_decay"])
        check_merge_every(entries["merge_every"])
        _check_graph(entries)
        if entries["mixing"] == "choco" and entries["topology"] not in FIXED:
            raise ConfigError(
                f'mixing = "choco" with topology = "{entries["topology"]}": neighbours know each other\'s '
                f"models, and a new one costs a whole one: use topology = {' or '.join(sorted(FIXED))}"
            )
        if entries["degree"] > 1 and (entries["topology"] != "random" or entries["mixing"] in IN_PAIRS):
            raise ConfigError(
                f'degree = {entries["degree"]}: of topology = "random", without a2cid2 and dadao, which take '
                "one partner at a time"
            )
        _check_convexity(entries)
        check_privacy(entries["privacy"])
        if entries["privacy"] and entries["mixing"] == "dadao":
            raise ConfigError('privacy with mixing = "dadao": what it sends is no model: take another one')


def _check_convexity(entries: Mapping[str, Any]) -> None:
    """Raises ConfigError."""
    mu, smoothness = entries["mu"], entries["smoothness"]
    if entries["mixing"] != "dadao":
        if mu or smoothness:
            raise ConfigError('mu and smoothness are of mixing = "dadao"')
        return
    if not 0 < mu <= smoothness:
        raise ConfigError(
            f'mixing = "dadao" with mu = {mu:g}, smoothness = {smoothness:g}: it needs the convexity of the '
            "losses, 0 < mu <= smoothness"
        )
    if entries["inner_steps"] != 1 or entries["merge_every"] != END:
        raise ConfigError('mixing = "dadao" needs inner_steps = 1 and merge_every = "end"')


def _check_graph(entries: Mapping[str, Any]) -> None:
    """Raises ConfigError."""
    if entries["topology_file"]:
        raise ConfigError("topology_file is read by those who found a run: here edges are needed")
    if entries["topology"] == "file":
        check_edges(entries["edges"])
    elif len(entries["edges"]):
        raise ConfigError(f'edges with topology = "{entries["topology"]}": they are of topology = "file"')
