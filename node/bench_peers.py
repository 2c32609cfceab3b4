"""`thinwire bench peers`: what 1 to 256 peers' payloads cost a replica, on a model of one size."""

from __future__ import annotations

from typing import Any, Final

from thinwire.compression.noise import use_numba
from thinwire.node.bench import Timing, copy_bandwidth, measure, transformer
from thinwire.node.bench_decoupled import Round, _fill_gradients
from thinwire.node.bench_noise import spsa_update
from thinwire.optim.base import Share
from thinwire.optim.spsa import Spsa

PEERS: Final = (1, 4, 16, 64, 256)


def bench_peers(n_params: int, n_repeats: int) -> dict[str, Any]:
    """`apply` of a round, by the number of its offers: decoupled momentum (32 of 4096 coefficients, 1
    bit), and SPSA with a probe of each peer.

    The fewest bytes: parameters once in, once out, whoever many peers there are. `further_peer_s`: what one
    more costs, from the first to the last.
    """
    model = transformer(n_params)
    parameters = Spsa(model.items(), lr=1e-6).parameters_in_order()
    n_exactly = sum(p.tensor.numel() for p in parameters)
    bandwidth = copy_bandwidth(n_exactly, n_repeats)
    spsa = {n: measure(lambda n=n: spsa_update(parameters, n), n_repeats) for n in PEERS}  # type: ignore[misc]
    _fill_gradients(model)
    round_ = Round(model)
    payloads = [*round_.others, round_.payload]

    def apply(n: int) -> None:
        round_.round += 1
        round_.strategy.apply(
            [Share(i, 1, payloads[i % len(payloads)]) for i in range(n)], round_.turn(), None
        )

    decoupled = {n: measure(lambda n=n: apply(n), n_repeats) for n in PEERS}  # type: ignore[misc]
    least = 8 * n_exactly
    return {
        "n_params": n_exactly,
        "kernels": "numba" if use_numba(parameters[0].tensor) else "torch",
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
        "fraction_of_copy_bandwidth": least_s / times[first].median_s,
    }
