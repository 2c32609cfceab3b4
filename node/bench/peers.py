"""`thinwire bench peers`: what 1 to 256 peers' payloads cost a replica, on a model of one size."""

from __future__ import annotations

from typing import Any, Final

from ...compression.kernels import kernels_for
from ...optim.base import Share
from ...optim.spsa import Spsa
from .decoupled import DecoupledRound
from .measure import Timing, copy_bandwidth, fill_gradients, measure, transformer
from .noise import spsa_update

PEERS: Final = (1, 4, 16, 64, 256)


def bench_peers(n_params: int, n_repeats: int, device: str) -> dict[str, Any]:
    """`apply` of a round, by the number of its offers: decoupled momentum (32 of 4096 coefficients, 1
    bit), and SPSA with a probe of each peer.

    The fewest bytes: parameters once in, once out, whoever many peers there are. `further_peer_s`: what one
    more costs, from the first to the last. `growth_of_the_last_fourfold`: of CPU time beyond that for one
    peer, from 64 to 256 peers; 4 where cost is linear.
    """
    model = transformer(n_params, device)
    parameters = Spsa(model.items(), lr=1e-6).parameters_in_order()
    n_exactly = sum(p.tensor.numel() for p in parameters)
    bandwidth = copy_bandwidth(n_exactly, n_repeats, device)
    spsa = {n: measure(lambda n=n: spsa_update(parameters, n), n_repeats, device) for n in PEERS}  # type: ignore[misc]
    fill_gradients(model.values())
    round_ = DecoupledRound(model)
    payloads = [*round_.others, round_.payload]

    def apply(n: int) -> None:
        round_.round += 1
        round_.strategy.apply(
            [Share(i, 1, payloads[i % len(payloads)]) for i in range(n)], round_.turn(), None
        )

    decoupled = {n: measure(lambda n=n: apply(n), n_repeats, device) for n in PEERS}  # type: ignore[misc]
    least = 8 * n_exactly
    return {
        "n_params": n_exactly,
        "kernels": kernels_for(parameters[0].tensor),
        "copy_bandwidth_bytes_per_s": bandwidth,
        "least_n_bytes": least,
        "spsa": _by_peers(spsa, least / bandwidth),
        "decoupled": _by_peers(decoupled, least / bandwidth),
    }


def _by_peers(times: dict[int, Timing], least_s: float) -> dict[str, Any]:
    first, last = min(times), max(times)
    return {
        **{f"peers_{n}": timing.to_dict() for n, timing in times.items()},
        "further_peer_s": (times[last].median_s - times[first].median_s) / (last - first),
        "growth_of_the_last_fourfold": _growth(times),
        "fraction_of_copy_bandwidth": least_s / times[first].median_s,
    }


def _growth(times: dict[int, Timing]) -> float:
    one, most = times[min(times)].cpu_s, max(times)
    return (times[most].cpu_s - one) / max(times[most // 4].cpu_s - one, 1e-9)
