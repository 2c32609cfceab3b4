"""`thinwire bench decoupled`: a round of decoupled momentum without its backward, against DeMo's way."""

from __future__ import annotations

from typing import Any

import torch

from ...compression.base import Part, Payload, Turn
from ...compression.codecs.dct_topk import DctTopK
from ...compression.fingerprint import parameter_sum
from ...compression.kernels import kernels_for
from ...optim.base import Share
from ...optim.decoupled import Decoupled
from .learning.demo import TILE, cosine_basis, decode, select
from .measure import Timing, copy_bandwidth, fill_gradients, measure, ratios, transformer

N_PEERS, K = 4, 32
LR, BETA = 1e-3, 0.999
VERIFY_EVERY = 10


def bench_decoupled(n_params: int, n_repeats: int, device: str) -> dict[str, Any]:
    """Momentum, pack, what is sent leaves the momentum, decode of 4 peers, signed update.

    Baseline: the same in the manner of DeMo's program, in plain torch. And steps of torch's AdamW, as it is
    by default (foreach) and fused. Not in the round: checking a peer's payload, and the fingerprint, which is
    taken every 10 rounds by default.

    `exactness`: what the same bits everywhere cost. `inexact_apply` is decode and update in plain torch, in
    floating point and fused, from coefficients that are unpacked already.
    """
    ours, theirs, adam = (transformer(n_params, device) for _ in range(3))
    for model in (ours, theirs, adam):
        fill_gradients(model.values())
    n_exactly = sum(p.numel() for p in ours.values())
    bandwidth = copy_bandwidth(n_exactly, n_repeats, device)

    round_ = DecoupledRound(ours)
    inexact = InexactApply(ours, round_)
    propose = measure(round_.propose, n_repeats, device)
    apply = measure(round_.apply, n_repeats, device)
    both = measure(round_.run, n_repeats, device)
    demo = measure(Demo(theirs).step, max(1, n_repeats // 2), device)
    adamw = measure(torch.optim.AdamW(adam.values(), lr=LR).step, n_repeats, device)
    fused = measure(torch.optim.AdamW(adam.values(), lr=LR, fused=True).step, n_repeats, device)
    check = measure(round_.check, n_repeats, device)
    fingerprint = measure(lambda: [parameter_sum(p) for p in ours.values()], n_repeats, device)
    plain = measure(inexact.step, n_repeats, device)
    fingerprint_s = fingerprint.median_s / VERIFY_EVERY
    return {
        "n_params": n_exactly,
        "n_peers": N_PEERS,
        "kernels": kernels_for(next(iter(ours.values())).detach()),
        "payload_n_bytes": round_.payload_n_bytes(),
        "copy_bandwidth_bytes_per_s": bandwidth,
        # Momentum and parameters are read and written, gradients read; payloads are less than a hundredth.
        "round": both.to_dict() | _traffic(20 * n_exactly, bandwidth, both),
        "propose": propose.to_dict() | _traffic(12 * n_exactly, bandwidth, propose),
        "apply": apply.to_dict() | _traffic(8 * n_exactly, bandwidth, apply),
        "fingerprint": fingerprint.to_dict() | _traffic(4 * n_exactly, bandwidth, fingerprint),
        "check_of_a_payload": check.to_dict(),
        "demo_step": demo.to_dict(),
        "adamw_step": adamw.to_dict(),
        "adamw_fused_step": fused.to_dict(),
        **ratios(demo, both),
        "ratio_to_adamw": adamw.median_s / both.median_s,
        "ratio_to_adamw_by_cpu_time": adamw.cpu_s / max(both.cpu_s, 1e-9),
        "ratio_to_adamw_fused": fused.median_s / both.median_s,
        "exactness": {
            "inexact_apply": plain.to_dict(),
            "verify_every": VERIFY_EVERY,
            "fingerprint_share_of_round": fingerprint_s / both.median_s,
            "exact_update_share_of_round": (apply.median_s - plain.median_s) / both.median_s,
            "share_of_round": (fingerprint_s + max(0.0, apply.median_s - plain.median_s)) / both.median_s,
        },
        "least_n_bytes": 20 * n_exactly,
        "fraction_of_copy_bandwidth": 20 * n_exactly / bandwidth / both.median_s,
    }


def _traffic(least_n_bytes: int, bandwidth: float, timing: Timing) -> dict[str, float]:
    return {
        "least_n_bytes": least_n_bytes,
        "fraction_of_copy_bandwidth": least_n_bytes / bandwidth / timing.median_s,
    }


class DecoupledRound:
    """Rounds of one replica; the other peers' payloads are made once."""

    def __init__(self, model: dict[str, torch.nn.Parameter]) -> None:
        self.strategy = Decoupled(model.items(), compressor=DctTopK(k=K), lr=LR, beta=BETA)
        self.round = 0
        self.others: list[Payload] = []
        for _ in range(N_PEERS):
            self.propose()
            self.others.append(self.payload)
        self.others.pop()

    def turn(self) -> Turn:
        return Turn(self.round, 1, 2, 1.0)

    def propose(self) -> None:
        self.round += 1
        self.payload = self.strategy.propose_from_grad(self.turn())

    def apply(self) -> None:
        shares = [Share(i, 1, payload) for i, payload in enumerate([*self.others, self.payload])]
        self.strategy.apply(shares, self.turn(), "counted")

    def check(self) -> None:
        self.strategy.check(self.payload, self.turn())

    def run(self) -> None:
        self.propose()
        self.apply()

    def payload_n_bytes(self) -> int:
        return sum(t.numel() * t.dtype.itemsize for packed in self.payload.values() for t in packed)


class InexactApply:
    """Decode and signed update as one would write them if replicas were free to differ in the last bits."""

    def __init__(self, model: dict[str, torch.nn.Parameter], round_: DecoupledRound) -> None:
        self.parameters = list(model.values())
        device = self.parameters[0].device
        self.basis = cosine_basis(TILE).T.contiguous().to(device)
        compressor = DctTopK(k=K)
        payloads = [*round_.others, round_.payload]
        self.entries = []
        for name, p in model.items():
            found = [compressor.entries(payload[name], Part.whole(p.shape)) for payload in payloads]
            rows = [(torch.from_numpy(e.position_E), torch.from_numpy(e.value_E)) for e in found]
            self.entries.append([(position.to(device), value.to(device)) for position, value in rows])

    @torch.no_grad()
    def step(self) -> None:
        for p, entries in zip(self.parameters, self.entries, strict=True):
            n = -(-p.numel() // TILE) * TILE
            coefficients = torch.zeros(n, device=p.device)
            for position, value in entries:
                coefficients.index_add_(0, position, value, alpha=1 / N_PEERS)
            decoded = (coefficients.view(-1, TILE) @ self.basis).view(-1)[: p.numel()]
            p.add_(decoded.sign_().view(p.shape), alpha=-LR)


# ------------------------------------------------------------------------------------------- the baseline


class Demo:
    """A step of DeMo (arXiv 2411.19870): per parameter a transform in tiles, int64 index, float32 value."""

    def __init__(self, model: dict[str, torch.nn.Parameter]) -> None:
        self.parameters = list(model.values())
        self.momentum = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        for p, delta in zip(self.parameters, self.momentum, strict=True):
            assert p.grad is not None
            delta.mul_(BETA).add_(p.grad, alpha=LR)
            sent = select(delta, K)
            delta.sub_(decode([sent], delta.shape))
            mean = decode([sent] * N_PEERS, delta.shape)
            p.add_(mean.sign_(), alpha=-LR)
