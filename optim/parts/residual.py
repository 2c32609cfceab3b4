"""What a peer has gathered and not sent yet (momentum, error feedback), and its sends of open fate.

Local state, in two entries of a strategy's `state` per parameter: the residual itself, flat float32, and
`sends`. What is sent leaves the residual; what missed its commit comes back, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...compression.base import Compressor, Packed, Payload, Step, Target, Turn
from ...compression.errors import ConfigError
from ...compression.exact import to_float32
from ..base import Own, Parameter, Strategy
from .packing import pack_all

Sends = dict[int, tuple[int, Packed]]
"""Round -> (how often the residual had decayed when it was sent, what was sent), while its fate is open."""


class Residual:
    """See the module's docstring. Strategies count as `lost_sends` those whose fate this replica never
    learnt, because it took over a snapshot of a later round."""

    def __init__(
        self, strategy: Strategy, compressor: Compressor, entry: str, kept: Callable[[Parameter, int], float]
    ) -> None:
        """`entry`: its name in the state. `kept`: what would be left by now of a share of 1 that the residual
        had when it had decayed that often."""
        self._strategy = strategy
        self._compressor = compressor
        self._entry = entry
        self._kept = kept

    def of(self, parameter: Parameter) -> Tensor:
        """The residual itself, flat; zero before its first use."""
        state = self._strategy.state[parameter.tensor]
        if self._entry not in state:
            shape, device = parameter.local.shape, parameter.local.device
            state[self._entry] = torch.zeros(shape, dtype=torch.float32, device=device)
            state["sends"] = {}
        residual: Tensor = state[self._entry]
        if residual.shape != parameter.local.shape:  # flat, from an earlier version
            residual = state[self._entry] = residual.view(parameter.local.shape)
        return residual.view(-1)

    def send(self, parameters: Sequence[Parameter], turn: Turn, n_decays: int, alpha: float) -> Payload:
        """Packs what is selected; `alpha` times that leaves the residual. Its fate is open from now on."""
        payload = pack_all(self._strategy.ranks, self._compressor, parameters, self.of, turn)
        share = self._strategy.allotted.share
        if share < 1:
            strongest = self._compressor.strongest
            payload = {p.name: strongest(payload[p.name], p.part.entire, share) for p in parameters}
        self._subtract([(p, payload[p.name], alpha) for p in parameters], turn)
        self.keep(parameters, turn, n_decays, payload)
        return payload

    def keep(self, parameters: Sequence[Parameter], turn: Turn, n_decays: int, payload: Payload) -> None:
        """A payload whose share has left already: its fate is open from now on."""
        for p in parameters:
            sends = self._strategy.state[p.tensor].setdefault("sends", {})
            sends[turn.round] = (n_decays, payload[p.name])

    def put_back(self, parameter: Parameter, turn: Turn) -> None:
        """Adds this round's send again, as far as it would have decayed since. Only once."""
        if turn.round in self._sends(parameter):
            n_decays, packed = self._sends(parameter).pop(turn.round)
            factor = self._kept(parameter, n_decays)
            self._subtract([(parameter, packed, -factor)], turn)

    def sent(self, parameters: Sequence[Parameter], turn: Turn) -> Payload | None:
        """This round's send, while its fate is open."""
        sends = {p.name: self._sends(p).get(turn.round) for p in parameters}
        payload = {name: send[1] for name, send in sends.items() if send is not None}
        return payload if len(payload) == len(sends) else None

    def is_open(self, parameter: Parameter, turn: Turn) -> bool:
        """Whether the fate of this round's send is open."""
        return turn.round in self._sends(parameter)

    def settle(self, parameter: Parameter, turn: Turn, own: Own) -> int:
        """The fate of this replica's own send of the round. Returns how many sends were given up.

        A send of this round that the caller knows nothing of (`own` is None) never left this machine, so it
        cannot have counted: it is treated as missed. Sends of earlier rounds are still open only if a
        snapshot made this replica skip their commits; putting one back that had counted would send it twice,
        so they are given up.
        """
        sends = self._sends(parameter)
        if own == "counted":
            sends.pop(turn.round, None)
        else:
            self.put_back(parameter, turn)
        lost = [r for r in sends if r < turn.round]
        for r in lost:
            del sends[r]
        return len(lost)

    def _sends(self, parameter: Parameter) -> Sends:
        """Those of one parameter; nothing is allocated for a replica that only follows."""
        states = self._strategy.state
        sends: Sends = states[parameter.tensor].get("sends", {}) if parameter.tensor in states else {}
        return sends

    def _subtract(self, sends: Sequence[tuple[Parameter, Packed, float]], turn: Turn) -> None:
        """residual -= factor * q of each: what the receivers read from the pack."""
        targets = [
            Target(self.of(p), p.part, p.name, Step(scale=to_float32(factor))) for p, _, factor in sends
        ]
        payload = {p.name: packed for p, packed, _ in sends}
        self._compressor.fused_update(targets, [payload], [1.0], turn)


def refuse_other_packing(state_dict: Mapping[str, Any], compressor: Compressor) -> None:
    """Raises ConfigError for a state whose sends another compressor has packed."""
    packed_with = state_dict["param_groups"][0].get("compressor")
    if packed_with is None:
        raise ConfigError("the state of another optimizer: it names no compressor")
    if packed_with != repr(compressor):
        raise ConfigError(f"sends in this state are packed with {packed_with}, not {compressor!r}")
