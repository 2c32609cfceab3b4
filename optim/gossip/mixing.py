"""Mixing of peers' models with those of their neighbours.

    plain    x_i += sum_j W_ij (x_j - x_i)                       W symmetric, doubly stochastic (Metropolis)

    a2cid2   (arXiv 2306.08289) a second copy x~_i gives it momentum. Between events both flow together,
             dx = eta (x~ - x) dt,  dx~ = eta (x - x~) dt,  eta = 1 / (2 sqrt(chi1 chi2));
             local steps move both; where i and j meet, with m = x_i - x_j:
             x_i -= 1/2 m,  x~_i -= 1/2 sqrt(chi1 / chi2) m

Of x~ the lead x~ - x is kept: local steps leave it as it is, and the flow over a round's time is exact:
x += (1 - exp(-2 eta)) / 2 lead, lead *= exp(-2 eta).

What is sent is theta - x_i, packed in a dense format; theta, the reference model, is the same for both ends
to the last bit. Differences are between decoded values, of one's own too: what rounding does to x_i is in
both ends of an edge, with opposite signs, and the mean over the peers stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from typing import Protocol

import torch
from torch import Tensor

from ...compression.base import Compressor, Packed, Turn
from ...compression.errors import BadPayload
from ..base import Parameter, Strategy
from ..inner.phase import InnerPhase
from ..parts.packing import pack_all
from .meeting import UNKNOWN, Meeting
from .messages import Messages
from .pulling import Limiter, Pull, length, lengths, pulled


@dataclass(frozen=True, slots=True)
class Mixed:
    """What came of an exchange. `distance`: the median of the neighbours', L2; None: nobody was heard.
    `refused`: messages that were not used, by the reason; `n_clipped`: differences that were too long."""

    distance: float | None
    refused: Sequence[str] = ()
    n_clipped: int = 0


class Mixing(Protocol):
    """Of one peer. All is called within an inner phase: the model has x_i, `outer` of the state is theta."""

    def message(self, meeting: Meeting) -> bytes:
        """After the local steps of the meeting's round: what its neighbours get."""
        ...

    def mix(self, meeting: Meeting, heard: Sequence[tuple[str, bytes]], factor: float) -> Mixed:
        """With what came from neighbours of the meeting that `message` was made for; x_i has not changed
        since. `factor`: see `Limiter`."""
        ...

    def model_of(self, data: bytes, turn: Turn) -> dict[str, Tensor] | None:
        """The model in a neighbour's message of that round: theta - x_j, flat, by parameter. None: messages
        hold none. Raises BadPayload."""
        ...

    def merged(self, parameter: Parameter) -> None:
        """x_i is theta now, which has just changed."""
        ...


class ModelMixing:
    """Plain mixing, and `has_momentum` A2CiD2's. See the module's docstring."""

    def __init__(
        self, strategy: Strategy, phase: InnerPhase, compressor: Compressor, *, has_momentum: bool
    ) -> None:
        self._strategy, self._phase, self._compressor = strategy, phase, compressor
        self._has_momentum, self._limiter = has_momentum, Limiter()
        self._parameters = strategy.parameters_in_order()
        self._messages = Messages("model", compressor, self._parameters)
        self._own: Mapping[str, Packed] = {}

    @torch.no_grad()
    def message(self, meeting: Meeting) -> bytes:
        if self._has_momentum and meeting.spectrum is not UNKNOWN:
            self._flow(meeting)
        turn, ranks = meeting.turn, self._strategy.ranks
        self._own = pack_all(ranks, self._compressor, self._parameters, self._phase.moved, turn)
        return self._messages.encode(self._own, {}, turn)

    def message_of(self, moved: Mapping[str, Tensor], turn: Turn) -> bytes:
        """What a peer sends whose theta - x this is, flat, by parameter."""
        packs = {p.name: self._compressor.pack(moved[p.name], p.part, turn) for p in self._parameters}
        return self._messages.encode(packs, {}, turn)

    def _flow(self, meeting: Meeting) -> None:
        """Over the time of a round."""
        left = exp(-1.0 / sqrt(meeting.spectrum.chi1 * meeting.spectrum.chi2))
        for p in self._parameters:
            lead = self._lead(p)
            p.local.add_(lead * ((1.0 - left) / 2))
            lead.mul_(left)

    def _lead(self, parameter: Parameter) -> Tensor:
        """x~ - x, shaped like the parameter."""
        state = self._strategy.state[parameter.tensor]
        if "lead" not in state:
            state["lead"] = torch.zeros_like(parameter.local)
        lead: Tensor = state["lead"]
        return lead

    @torch.no_grad()
    def mix(self, meeting: Meeting, heard: Sequence[tuple[str, bytes]], factor: float) -> Mixed:
        pulls, refused = list[Pull](), list[str]()
        own = {p.name: self._decoded(self._own, p, meeting.turn) for p in self._parameters} if heard else {}
        for peer, data in heard:
            try:
                pulls.append(self._pull(peer, data, meeting, own))
            except BadPayload as e:
                refused.append(e.reason)
        if not pulls:
            return Mixed(None, refused)
        found = lengths(self._parameters, pulls)
        kept = self._limiter.kept(found, length(self._parameters, self._phase.moved), factor)
        chis = meeting.spectrum
        ahead = sqrt(chis.chi1 / chis.chi2) - 1.0 if self._has_momentum else 0.0
        for p in self._parameters:
            change = pulled(p, pulls, kept).view(p.local.shape)
            p.local.add_(change)
            if ahead:
                self._lead(p).add_(change * ahead)  # change is -1/2 m
        return Mixed(sorted(found)[(len(found) - 1) // 2], refused, sum(share < 1 for share in kept))

    def _pull(self, peer: str, data: bytes, meeting: Meeting, own: Mapping[str, Tensor]) -> Pull:
        turn = meeting.turn
        theirs, _ = self._messages.decode(data, turn)

        def difference(p: Parameter) -> Tensor:
            return own[p.name] - self._decoded(theirs, p, turn)

        return Pull(peer, meeting.weights[peer], difference)

    def _decoded(self, packs: Mapping[str, Packed], p: Parameter, turn: Turn) -> Tensor:
        return self._compressor.decode([packs[p.name]], [1.0], p.part, turn)

    def model_of(self, data: bytes, turn: Turn) -> dict[str, Tensor]:
        packs, _ = self._messages.decode(data, turn)
        return {p.name: self._decoded(packs, p, turn) for p in self._parameters}

    def merged(self, parameter: Parameter) -> None:
        if parameter.tensor in self._strategy.state:
            self._strategy.state[parameter.tensor].pop("lead", None)
