"""A residual takes gradients in and sends what is selected, in one read and one write of memory.

From a GPU the payload travels to the host through pinned memory. The host waits for nothing before it asks
for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compression.base import Change, Compressor, Packed, Payload, PendingPacks, Source
from ...compression.exact import to_float32
from ..base import Parameter, Strategy


@dataclass(frozen=True, slots=True)
class Gain:
    """residual = decay residual + scale factor gradient; `factor` and `gradient` by parameter, `scale` on the
    device. Gradients of scale 0 are left out, whatever they are."""

    decay: float
    scale: Tensor
    factor: Callable[[Parameter], float]
    gradient: Callable[[Parameter], Tensor | None]


def has_fused_send(strategy: Strategy, compressor: Compressor, parameters: Sequence[Parameter]) -> bool:
    """Whether `FusedSend` can be used: one rank, a compressor with a kernel, and all that is selected is
    sent."""
    return (
        strategy.ranks.count == 1
        and strategy.allotted.share >= 1
        and compressor.has_fused_send([(p.part, p.local) for p in parameters])
    )


class FusedSend:
    """A payload on its way. `alpha` times what is selected leaves the residuals."""

    def __init__(
        self,
        compressor: Compressor,
        parameters: Sequence[Parameter],
        residual: Callable[[Parameter], Tensor],
        gain: Gain,
        alpha: float,
        losses: Tensor,
    ) -> None:
        """`residual`: flat float32, changed in place. `losses` travel with the payload."""
        by_device: dict[torch.device, list[Parameter]] = {}
        for p in parameters:
            by_device.setdefault(p.local.device, []).append(p)
        self._names = [p.name for p in parameters]
        self._sent: list[tuple[list[Parameter], PendingPacks]] = []
        for device, some in by_device.items():
            change = Change(gain.decay, gain.scale.to(device), to_float32(alpha))
            sources = [Source(p.part, residual(p), gain.gradient(p), gain.factor(p)) for p in some]
            self._sent.append((some, compressor.fused_send(sources, change)))
        self._losses = _on_its_way(losses)

    def payload(self) -> Payload:
        """Waits for it. Raises ValueError for values that cannot be sent."""
        packs: dict[str, Packed] = {}
        for some, sent in self._sent:
            packs.update(zip([p.name for p in some], sent.packs(), strict=True))
        return {name: packs[name] for name in self._names}

    def losses(self) -> list[float]:
        found: list[float] = self._losses().tolist()
        return found


def _on_its_way(x: Tensor) -> Callable[[], Tensor]:
    """What waits until it is on the host."""
    if not x.is_cuda:
        return lambda: x
    from ...compression.gpu.tables_triton import Arrival

    arrival = Arrival(x)
    return lambda: arrival.wait()[0]
