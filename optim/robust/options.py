"""The options that every strategy has against peers that send what nobody should send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from ...compression.errors import ConfigError
from ..options import Number, Options
from .means import Aggregate

NEW_RUNS: Final[Mapping[str, Any]] = {
    "bound": 2.0,
    "own_data_share": 0.25,
    "own_data_alone": True,
    "newcomers": 0.1,
    "newcomers_share": 0.125,
}
"""`Facts.in_runs` of every strategy; who runs one for peers that are known may say otherwise."""


@dataclass(frozen=True, kw_only=True)
class BoundedOptions(Options):
    """How much of a round a single peer may decide."""

    bound: Annotated[float, Number(at_least=0)] = 0.0
    """No peer moves the model by more than this many times what the round's median peer does, from 1 on; 0:
    `clip` alone holds, as in older runs."""

    own_data_share: Annotated[float, Number(at_least=0, below=1)] = 0.0
    """With `bound`: what peers with data of their own weigh together, of a round's weight, at most; 0: as
    much as others."""

    own_data_alone: bool = False
    """In a round in which nobody else is they weigh as others; else nothing then, as in older runs."""

    newcomers: Annotated[float, Number(at_least=0, at_most=1)] = 1.0
    """With `bound`: what is left of the weight of a peer whose last audit has not passed, or that had none
    yet; 1: all, as in older runs. Without `newcomers_share` where others have half of the weight."""

    newcomers_share: Annotated[float, Number(at_least=0, below=1)] = 0.0
    """With `bound`: what those who are new weigh together, of the weight of a round that has others, at most,
    and nothing that they send changes its medians; 0: as in older runs."""

    aggregate: Aggregate = "mean"
    """What is made of the peers' values: their mean, or, in spite of a minority that sends anything, the mean
    of the middle half, the median, the values of the sign that wins a vote, or centred clipping."""

    @classmethod
    def check(cls, entries: Mapping[str, Any]) -> None:
        super().check(entries)
        if 0 < entries["bound"] < 1:
            raise ConfigError(f"bound = {entries['bound']:g}: 0, or a number >= 1")


@dataclass(frozen=True, kw_only=True)
class MeanOptions(BoundedOptions):
    """Of strategies that send vectors."""

    mean: Literal["all", "senders"] = "all"
    """Over all counted offers, or per coefficient over the senders of it, for compressors that let every peer
    select its own."""

    sender_floor: Annotated[float, Number(at_least=0, at_most=1)] = 0.0
    """With `mean = "senders"`: the share of the round's weight that the senders of a coefficient count for at
    the least, so that nobody grows by being the only one; 0: they are counted, not weighed, as in older
    runs."""

    @classmethod
    def check(cls, entries: Mapping[str, Any]) -> None:
        super().check(entries)
        if entries["mean"] == "all":
            return
        if entries["weights"] == "samples" and entries["sender_floor"] == 0:
            raise ConfigError(
                "mean = 'senders' without sender_floor counts every sender alike: use weights = 'equal', or "
                "sender_floor = 0.25"
            )
        if entries["aggregate"] != "mean":
            raise ConfigError("mean = 'senders' is a mean: use aggregate = 'mean' or mean = 'all'")
