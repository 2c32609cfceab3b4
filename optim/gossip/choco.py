"""CHOCO-SGD (arXiv 1902.00340): peers send what has changed of their models, by any compressor.

    xhat_i                                       what i's neighbours know of x_i, and i itself
    q_i = C(x_i - xhat_i);  xhat_i += q_i        on both ends
    x_i += gamma sum_j W_ij (xhat_j - xhat_i)

In the beginning, and when x_i has become the reference model theta, xhat_i is theta. A message names the
xhat that it goes on from by a digest: who has another one (a new neighbour, one that missed a message)
leaves that neighbour out, asks for all of it, and gets it in the next round: one dense transfer. After a
restart of its own a peer goes on from theta, as all others then take it to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from blake3 import blake3
from torch import Tensor

from ...compression.base import Compressor, Field, Packed, Turn
from ...compression.codecs.dense import Dense
from ...compression.errors import BadPayload
from ..base import Parameter, Strategy
from ..inner.phase import InnerPhase
from ..parts.packing import pack_all
from .meeting import Meeting
from .messages import Messages
from .mixing import Mixed
from .pulling import Limiter, Pull, length, lengths, pulled

Values = dict[str, Tensor]
"""A model: flat float32 by parameter name."""

_DIGEST_BYTES: Final = 8
_MOST_WANTED: Final = 64
_BASE, _AFTER, _WANTS = ":base", ":after", ":wants"
_CHANGE, _WHOLE = b"\0", b"\1"


class ChocoMixing:
    """See `Mixing` and the module's docstring. What is known of models is kept in memory only."""

    def __init__(self, strategy: Strategy, phase: InnerPhase, compressor: Compressor, gamma: float) -> None:
        self._strategy, self._phase, self._compressor, self._gamma = strategy, phase, compressor, gamma
        self._parameters = strategy.parameters_in_order()
        digest = Field(torch.uint8, _DIGEST_BYTES)
        wants = Field(torch.uint8, _DIGEST_BYTES * _MOST_WANTED)
        extra = {_BASE: digest, _AFTER: digest, _WANTS: wants}
        self._changes = Messages("changes", compressor, self._parameters, extra)
        self._dense = Dense()
        self._wholes = Messages("whole", self._dense, self._parameters, extra)
        self._own: Values | None = None
        """xhat of this peer; None: theta."""
        self._known: dict[str, tuple[bytes, Values]] = {}
        """xhat of neighbours, and its digest."""
        self._wants: list[str] = []
        self._is_wanted = False
        self._gave_in = 0
        """The round in which all of this peer's model went out last."""
        self._limiter = Limiter()

    @torch.no_grad()
    def message(self, meeting: Meeting) -> bytes:
        own, turn = self._own or self._theta(), meeting.turn
        base = _digest(own)
        compressor, format_, kind = self._compressor, self._changes, _CHANGE
        if self._is_wanted:
            compressor, format_, kind = self._dense, self._wholes, _WHOLE

        def values(p: Parameter) -> Tensor:
            x = p.local.reshape(-1)
            return x.clone() if kind == _WHOLE else x - own[p.name]

        packs = pack_all(self._strategy.ranks, compressor, self._parameters, values, turn)
        self._own = self._after(own, packs, kind, turn)
        if self._is_wanted:
            self._is_wanted, self._gave_in = False, turn.round
        wants = b"".join(map(_short, self._wants[:_MOST_WANTED]))
        extra = {_BASE: base, _AFTER: _digest(self._own), _WANTS: wants}
        self._wants = []
        return kind + format_.encode(packs, {name: _row(data) for name, data in extra.items()}, turn)

    @torch.no_grad()
    def mix(self, meeting: Meeting, heard: Sequence[tuple[str, bytes]], factor: float) -> Mixed:
        assert self._own is not None, "message() comes before mix()"
        own, pulls, refused = self._own, list[Pull](), list[str]()
        for peer, data in heard:
            try:
                theirs = self._follow(peer, data, meeting)
            except BadPayload as e:
                refused.append(e.reason)
                continue
            if theirs is not None:
                weight = self._gamma * meeting.weights[peer]
                pulls.append(Pull(peer, weight, _difference(theirs, own)))
        self._known = {peer: known for peer, known in self._known.items() if peer in meeting.weights}
        if not pulls:
            return Mixed(None, refused)
        found = lengths(self._parameters, pulls)
        kept = self._limiter.kept(found, length(self._parameters, self._phase.moved), factor)
        for p in self._parameters:
            p.local.add_(pulled(p, pulls, kept).view(p.local.shape))
        return Mixed(sorted(found)[(len(found) - 1) // 2], refused, sum(share < 1 for share in kept))

    def model_of(self, data: bytes, turn: Turn) -> dict[str, Tensor] | None:
        return None

    def merged(self, parameter: Parameter) -> None:
        self._own = None

    def _follow(self, peer: str, data: bytes, meeting: Meeting) -> Values | None:
        """What is known of the peer's model after its message; None: all of it has to be asked for. Raises
        BadPayload."""
        kind, body, turn = data[:1], data[1:], meeting.turn
        packs, extra = (self._wholes if kind == _WHOLE else self._changes).decode(body, turn)
        base, after = (bytes(extra[name].tolist()) for name in (_BASE, _AFTER))
        if turn.round > self._gave_in and _short(meeting.me) in _cut(extra[_WANTS]):
            self._is_wanted = True
        before = self._base(peer, base) if kind == _CHANGE else {}
        found = None if before is None else self._after(before, packs, kind, turn)
        if found is None or _digest(found) != after:
            self._known.pop(peer, None)
            self._wants.append(peer)
            return None
        self._known[peer] = after, found
        return found

    def _base(self, peer: str, digest: bytes) -> Values | None:
        known = self._known.get(peer)
        if known is not None and known[0] == digest:
            return known[1]
        theta = self._theta()
        return theta if _digest(theta) == digest else None

    def _after(self, before: Values, packs: Mapping[str, Packed], kind: bytes, turn: Turn) -> Values:
        compressor = self._dense if kind == _WHOLE else self._compressor
        found = {}
        for p in self._parameters:
            x = compressor.decode([packs[p.name]], [1.0], p.part, turn)
            found[p.name] = x if kind == _WHOLE else x.add_(before[p.name].cpu())
        return found

    def _theta(self) -> Values:
        states = self._strategy.state
        return {p.name: states[p.tensor]["outer"].reshape(-1).cpu() for p in self._parameters}


def _difference(theirs: Values, own: Values) -> Callable[[Parameter], Tensor]:
    return lambda p: theirs[p.name] - own[p.name]


def _digest(values: Values) -> bytes:
    found = blake3()
    for name in sorted(values):
        found.update(values[name].contiguous().numpy().tobytes())
    return found.digest(_DIGEST_BYTES)


def _short(name: str) -> bytes:
    return blake3(name.encode()).digest(_DIGEST_BYTES)


def _cut(t: Tensor) -> list[bytes]:
    data = bytes(t.tolist())
    return [data[i : i + _DIGEST_BYTES] for i in range(0, len(data), _DIGEST_BYTES)]


def _row(data: bytes) -> Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)
