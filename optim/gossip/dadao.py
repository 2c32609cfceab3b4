"""DADAO (arXiv 2208.00779): peers find the optimum of the sum of their losses, each strongly convex, exactly
and at a linear rate, where plain gossip with a constant rate stays beside it.

Each peer has three pairs that flow together in continuous time, x and y and z, each with one that goes ahead;
nu = mu / 2, for losses that are mu-strongly convex and L-smooth:

    dx  = eta (x~ - x) dt         dx~ = eta (x - x~) dt                          eta = 1/8 sqrt(nu / L)
    dy  = a (y~ - y) dt           dy~ = -(theta nu x~ + theta y + theta z) dt    a = 1/4 sqrt(nu / L)
    dz  = a (z~ - z) dt           dz~ = a/2 (z - z~) dt                          theta = 1/2 sqrt(L / nu)

a gradient   q = grad f_i(x) - nu x - y~:  x -= q / 4L,  x~ -= q / (4 sqrt(L nu)),  y~ += (a + 1) q
an edge      m = (y + z)_i - (y + z)_j:    z_i -= m / 2,  z~_i -= 2 chi sqrt(L / nu) m,  and j with +

Clocks: one gradient of each peer in a unit of time, edges sqrt(2 chi1 chi2) times as often as a round of them
has. A round has one matching, so that it takes dt = 1 / sqrt(2 chi1 chi2) of time, at most 1, and a gradient
with that probability; chi = chi1 dt (chi1, chi2: in rounds, see `topology`). The flow over it is exact.

The sum of z over the peers stays zero as long as both ends of an edge hear each other: so nothing is clipped,
and a peer that loses its local state moves the optimum. For peers that are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

from ...compression.base import Compressor, Packed, Turn
from ...compression.errors import BadPayload
from ..base import Parameter, Strategy
from ..parts.gradients import local_gradients
from ..parts.packing import pack_all
from .meeting import UNKNOWN, Meeting
from .messages import Messages
from .mixing import Mixed

_DUALS = ("y", "y_ahead", "z", "z_ahead")
_PAIRS = ("x_ahead", *_DUALS)
"""Entries of the state, shaped like the parameter, which has x."""


class DadaoMixing:
    """See `Mixing` and the module's docstring. `step` takes the inner optimizer's place."""

    def __init__(self, strategy: Strategy, compressor: Compressor, mu: float, smoothness: float) -> None:
        self._strategy, self._compressor = strategy, compressor
        self._nu, self._smooth = mu / 2, smoothness
        self._parameters = strategy.parameters_in_order()
        self._messages = Messages("dual", compressor, self._parameters)
        self._own: Mapping[str, Packed] = {}
        self._dt = 0.0
        """Of a round of the last meeting."""

    @cached_property
    def _generator(self) -> Tensor:
        """Of the flow of x, x~, y, y~, z, z~."""
        ratio = sqrt(self._nu / self._smooth)
        eta, a, theta = ratio / 8, ratio / 4, 1 / (2 * ratio)
        return torch.tensor(
            [
                [-eta, eta, 0, 0, 0, 0],
                [eta, -eta, 0, 0, 0, 0],
                [0, 0, -a, a, 0, 0],
                [0, -theta * self._nu, -theta, 0, -theta, 0],
                [0, 0, 0, 0, -a, a],
                [0, 0, 0, 0, a / 2, -a / 2],
            ],
            dtype=torch.float64,
        )

    @torch.no_grad()
    def step(self, turn: Turn) -> bool:
        """A gradient, from those in place, in as many rounds as the clock says; False, and nothing changes,
        if anything is not finite."""
        grads = local_gradients(self._parameters, self._strategy.ranks)
        if not all(bool(g.isfinite().all()) for g in grads.values()):
            return False
        if turn.own_seed < int(self._dt * 2.0**64):
            for p in self._parameters:
                if p.name in grads:
                    self._descend(p, grads[p.name])
        return True

    def _descend(self, p: Parameter, grad: Tensor) -> None:
        nu, smooth, state = self._nu, self._smooth, self._state(p)
        q = grad.view(p.local.shape) - nu * p.local - state["y_ahead"]
        p.local.sub_(q / (4 * smooth))
        state["x_ahead"].sub_(q / (4 * sqrt(smooth * nu)))
        state["y_ahead"].add_(q * (sqrt(nu / smooth) / 4 + 1))

    def _state(self, p: Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._strategy.state[p.tensor]
        if "x_ahead" not in state:
            state["x_ahead"] = p.local.clone()
            state.update({name: torch.zeros_like(p.local) for name in _DUALS})
        return state

    @torch.no_grad()
    def message(self, meeting: Meeting) -> bytes:
        self._dt = 0.0
        if meeting.spectrum is not UNKNOWN:
            chis = meeting.spectrum
            self._dt = 1 / max(1.0, sqrt(2 * chis.chi1 * chis.chi2))
            self._flow()

        def dual(p: Parameter) -> Tensor:
            state = self._state(p)
            return (state["y"] + state["z"]).reshape(-1)

        turn = meeting.turn
        self._own = pack_all(self._strategy.ranks, self._compressor, self._parameters, dual, turn)
        return self._messages.encode(self._own, {}, turn)

    def _flow(self) -> None:
        """Over the time of a round."""
        flow = torch.linalg.matrix_exp(self._generator * self._dt).float()
        for p in self._parameters:
            state = self._state(p)
            before = torch.stack([p.local, *(state[name] for name in _PAIRS)])
            after = torch.tensordot(flow.to(before.device), before, dims=1)
            p.local.copy_(after[0])
            for name, value in zip(_PAIRS, after[1:], strict=True):
                state[name].copy_(value)

    @torch.no_grad()
    def mix(self, meeting: Meeting, heard: Sequence[tuple[str, bytes]], factor: float) -> Mixed:
        refused = []
        chi = meeting.spectrum.chi1 * self._dt
        ahead = 4 * chi * sqrt(self._smooth / self._nu)
        for _, data in heard:
            try:
                theirs, _ = self._messages.decode(data, meeting.turn)
            except BadPayload as e:
                refused.append(e.reason)
                continue
            for p in self._parameters:
                own, other = (self._decoded(packs, p, meeting.turn) for packs in (self._own, theirs))
                half = ((own - other) / 2).view(p.local.shape).to(p.local.device)
                state = self._state(p)
                state["z"].sub_(half)
                state["z_ahead"].sub_(half * ahead)
        return Mixed(None, refused)

    def _decoded(self, packs: Mapping[str, Packed], p: Parameter, turn: Turn) -> Tensor:
        return self._compressor.decode([packs[p.name]], [1.0], p.part, turn)

    def model_of(self, data: bytes, turn: Turn) -> dict[str, Tensor] | None:
        return None

    @torch.no_grad()
    def merged(self, parameter: Parameter) -> None:
        """Duals stay: they say what the other peers' losses pull at."""
        state = self._strategy.state.get(parameter.tensor, {})
        if "x_ahead" in state:
            state["x_ahead"].copy_(parameter.local)
