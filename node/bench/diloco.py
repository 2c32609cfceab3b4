"""`thinwire bench diloco`: an outer round with a single inner step and no backward, against plain torch."""

from __future__ import annotations

from typing import Any, Final

import torch

from ...compression.base import Compressor, Payload, Turn
from ...compression.codecs.dense import Dense
from ...compression.codecs.topk import TopK
from ...compression.kernels import kernels_for
from ...coordinator.protocol.figures import ddp_bytes
from ...optim.base import Own, Share
from ...optim.diloco import Diloco
from .measure import copy_bandwidth, fill_gradients, measure, ratios, transformer

N_PEERS: Final = 4
LR, OUTER_LR, MU = 4e-4, 0.7, 0.9
# Bytes per parameter. AdamW reads and writes parameters and two moments, and reads gradients. The outer round
# reads inner and outer parameters, reads and writes what error feedback keeps, and the parameters.
ADAMW_BYTES, OUTER_BYTES, MOMENTUM_BYTES = 28, 24, 8


def bench_diloco(n_params: int, n_repeats: int, device: str) -> dict[str, Any]:
    """One AdamW step, pack, decode of 4 peers, outer step; H such inner steps make a round in real life.

    Baseline: DiLoCo in plain torch on float32 values that nobody packs. And what data-parallel training sends
    in a single step, to a ring of as many peers.
    """
    model = transformer(n_params, device)
    n_exactly = sum(p.numel() for p in model.values())
    bandwidth = copy_bandwidth(n_exactly, n_repeats, device)
    plain = measure(PlainDiloco(transformer(n_params, device)).run, n_repeats, device)
    data_parallel = ddp_bytes(N_PEERS, n_exactly)
    result: dict[str, Any] = {
        "n_params": n_exactly,
        "n_peers": N_PEERS,
        "kernels": kernels_for(model["embed"].detach()),
        "copy_bandwidth_bytes_per_s": bandwidth,
        "plain_round": plain.to_dict(),
        "ddp_n_bytes_per_step": round(data_parallel),
    }
    methods: dict[str, tuple[Compressor, dict[str, float]]] = {
        "dense_e3m0": (Dense(bits="e3m0"), {"outer_lr": OUTER_LR, "outer_momentum": MU}),
        "sparseloco": (TopK(k=64, bits=2), {"outer_lr": 1.0, "outer_momentum": 0.0, "feedback_decay": 0.95}),
    }
    for name, (compressor, options) in methods.items():
        parameters = transformer(n_params, device).items()
        round_ = OuterRound(Diloco(parameters, compressor=compressor, lr=LR, **options))  # type: ignore[arg-type]
        propose = measure(round_.propose_again, n_repeats, device)
        apply = measure(round_.apply_again, n_repeats, device)
        both = measure(round_.run, n_repeats, device)
        per_param = ADAMW_BYTES + OUTER_BYTES + (MOMENTUM_BYTES if options["outer_momentum"] else 0)
        result[name] = {
            "payload_n_bytes": round_.payload_n_bytes(),
            "ratio_to_ddp_bytes": data_parallel / round_.payload_n_bytes(),
            "round": both.to_dict(),
            "propose": propose.to_dict(),
            "apply": apply.to_dict(),
            "least_n_bytes": per_param * n_exactly,
            **ratios(plain, both),
            "fraction_of_copy_bandwidth": per_param * n_exactly / bandwidth / both.median_s,
        }
    for key in ("ratio_to_baseline", "ratio_to_baseline_by_cpu_time", "fraction_of_copy_bandwidth"):
        result[key] = result["dense_e3m0"][key]
    return result


class OuterRound:
    """Rounds of one replica; the other peers' payloads are made once."""

    def __init__(self, strategy: Diloco) -> None:
        self.strategy = strategy
        self.round = 0
        fill_gradients([p.tensor for p in strategy.parameters_in_order()])
        self.others: list[Payload] = []
        for _ in range(N_PEERS):
            self.run()
            self.others.append(self.payload)
        self.others.pop()

    def propose_again(self) -> None:
        """For the round that comes next; what was sent for it before is put back."""
        self.payload = self.strategy.propose_from_grad(Turn(self.round + 1, 1, 2, 1.0))
        self.is_proposed = True

    def apply_again(self) -> None:
        """The next round; from the second time on without an offer of one's own."""
        self.round += 1
        self._apply("counted" if self.is_proposed else None)

    def run(self) -> None:
        self.propose_again()
        self.round += 1
        self._apply("counted")

    def _apply(self, own: Own) -> None:
        self.is_proposed = False
        shares = [Share(i, 1, payload) for i, payload in enumerate([*self.others, self.payload])]
        self.strategy.apply(shares, Turn(self.round, 1, 2, 1.0), own)

    def payload_n_bytes(self) -> int:
        return sum(t.numel() * t.dtype.itemsize for packed in self.payload.values() for t in packed)


class PlainDiloco:
    """DiLoCo by torch's own optimizers, the peers' differences in float32."""

    def __init__(self, model: dict[str, torch.nn.Parameter]) -> None:
        self.inner = list(model.values())
        fill_gradients(self.inner)
        self.outer = [torch.nn.Parameter(p.detach().clone()) for p in self.inner]
        self.adamw = torch.optim.AdamW(self.inner, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
        self.sgd = torch.optim.SGD(self.outer, lr=OUTER_LR, momentum=MU, nesterov=True)
        self.others = [[torch.full_like(p, 1e-4) for p in self.inner]] * (N_PEERS - 1)

    @torch.no_grad()
    def run(self) -> None:
        self.adamw.step()
        for i, (outer, inner) in enumerate(zip(self.outer, self.inner, strict=True)):
            mean = outer - inner
            for other in self.others:
                mean += other[i]
            outer.grad = mean.div_(N_PEERS)
        self.sgd.step()
        for outer, inner in zip(self.outer, self.inner, strict=True):
            inner.copy_(outer)
