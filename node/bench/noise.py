"""`thinwire bench noise`: what SPSA adds to its forward passes, against MeZO's way of doing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...compression.exact import to_float32
from ...compression.kernels import kernels_for
from ...compression.numerics.noise import update_pieces_
from ...compression.numerics.noise_layout import NoiseKind, Piece, Probe, Update
from ...optim.base import Parameter
from ...optim.parts.perturb import Direction, perturbed
from ...optim.spsa import Spsa
from .measure import copy_bandwidth, measure, ratios, transformer

EPS, LR = 1e-3, 1e-6
N_PROBES = (1, 16)
FUSED_ROUNDS, FUSED_PROBES = 8, 4
"""Catching up: so many rounds in one pass, each with so many probes, of four peers with one probe, say."""


def bench_noise(n_params: int, n_repeats: int, device: str) -> dict[str, Any]:
    """A step without its forwards: two perturbations per probe and one update, for 1 and for 16 probes; and a
    perturbation alone, with signs and with Gaussian noise.

    Baseline: four passes of `torch.normal` per probe (perturb, to the other side, restore, update).
    """
    parameters = Spsa(transformer(n_params, device).items(), lr=LR).parameters_in_order()
    tensors = [p.tensor.detach() for p in parameters]
    n_exactly = sum(t.numel() for t in tensors)
    bandwidth = copy_bandwidth(n_exactly, n_repeats, device)
    mezo = measure(lambda: mezo_step(tensors), max(1, n_repeats // 2), device)
    result: dict[str, Any] = {
        "n_params": n_exactly,
        "kernels": kernels_for(tensors[0]),
        "copy_bandwidth_bytes_per_s": bandwidth,
        "mezo_step": mezo.to_dict(),
    }
    pass_s = 8 * n_exactly / bandwidth
    kinds: tuple[NoiseKind, ...] = ("sign", "gauss")
    for kind in kinds:
        one = measure(lambda kind=kind: perturb_all(parameters, kind), n_repeats, device)  # type: ignore[misc]
        result[f"perturb_{kind}"] = {
            **one.to_dict(),
            "least_n_bytes": 8 * n_exactly,
            "fraction_of_copy_bandwidth": pass_s / one.median_s,
            "fraction_at_best": pass_s / one.min_s,
        }
    for n in N_PROBES:
        step = measure(lambda n=n: spsa_step(parameters, n), n_repeats, device)  # type: ignore[misc]
        update = measure(lambda n=n: spsa_update(parameters, n), n_repeats, device)  # type: ignore[misc]
        # The least traffic: each perturbation and the update read and write every parameter once. (Scratch
        # that stays in the cache until it is used again may beat a copy.)
        result[f"probes_{n}"] = {
            "step": step.to_dict(),
            "update": update.to_dict(),
            **ratios(mezo, step, times=n),  # n probes are n steps of the baseline
            "least_n_bytes": (2 * n + 1) * 8 * n_exactly,
            "fraction_of_copy_bandwidth": (2 * n + 1) * pass_s / step.median_s,
            "update_least_n_bytes": 8 * n_exactly,
            "update_fraction_of_copy_bandwidth": pass_s / update.median_s,
            "update_fraction_at_best": pass_s / update.min_s,
            "update_params_times_probes_per_s": n * n_exactly / update.median_s,
        }
    result["catching_up"] = catching_up(parameters, n_repeats, pass_s, device)
    for key in ("ratio_to_baseline", "ratio_to_baseline_by_cpu_time", "fraction_of_copy_bandwidth"):
        result[key] = result["probes_1"][key]
    return result


def spsa_step(parameters: list[Parameter], n_probes: int) -> None:
    """What `propose` and `apply` do besides the forwards; scratch lives for one use."""
    for probe in range(n_probes):
        for eps in (EPS, -EPS):
            for p in parameters:
                perturbed(p.tensor, p, Direction("sign", 1, probe, eps))
    spsa_update(parameters, n_probes)


def perturb_all(parameters: list[Parameter], kind: NoiseKind) -> None:
    for p in parameters:
        perturbed(p.tensor, p, Direction(kind, 1, 0, EPS))


def spsa_update(parameters: list[Parameter], n_probes: int, n_rounds: int = 1) -> None:
    terms = [Probe(1, probe, to_float32(LR / n_probes)) for probe in range(n_probes)]
    update_pieces_([Piece(p.tensor, p.index, 0) for p in parameters], [Update.of(terms)] * n_rounds, "sign")


def catching_up(parameters: list[Parameter], n_repeats: int, pass_s: float, device: str) -> dict[str, Any]:
    """A round of a fused batch against the same round alone.

    `pass_s`: of a copy of all parameters; the fraction is above 1 where a round of the batch takes less.
    """
    alone = measure(lambda: spsa_update(parameters, FUSED_PROBES), n_repeats, device)
    fused = measure(lambda: spsa_update(parameters, FUSED_PROBES, FUSED_ROUNDS), n_repeats, device)
    round_s = fused.median_s / FUSED_ROUNDS
    return {
        "rounds": FUSED_ROUNDS,
        "probes_per_round": FUSED_PROBES,
        "round_alone": alone.to_dict(),
        "batch": fused.to_dict(),
        "ratio_to_rounds_alone": alone.median_s / round_s,
        "fraction_of_copy_bandwidth": pass_s / round_s,
    }


@torch.no_grad()
def mezo_step(tensors: list[Tensor]) -> None:
    """MeZO's step without its forwards: the noise is drawn again, tensor by tensor, for each pass."""
    for scale in (EPS, -2 * EPS, EPS, -LR):
        generator = torch.Generator(tensors[0].device).manual_seed(1)
        for t in tensors:
            z = torch.normal(mean=0.0, std=1.0, size=t.shape, generator=generator, device=t.device)
            t.add_(z * scale)
