"""Cases of tests/support/triton_cases.py: rounds of strategies whose parameters kernels take all at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.triton_payload_cases import is_same_pack, plain
from thinwire.compression.base import Payload, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.topk import TopK
from thinwire.optim.base import Draw, Round, Share, Strategy
from thinwire.optim.decoupled import Decoupled
from thinwire.optim.diloco import Diloco
from thinwire.optim.spsa import Spsa


def model_on(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(30, 9), nn.ReLU(), nn.Linear(9, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.empty(p.shape).uniform_(-0.2, 0.2, generator=generator))
    return model.to(device, dtype)


def draws(model: nn.Module, round: int, broken: bool = False) -> Draw:
    """Batches of a round; the first of them may be one that is not finite."""
    batches = iter(range(100))

    def draw() -> Callable[[], Tensor]:
        number = next(batches)
        generator = torch.Generator().manual_seed(100 * round + number)
        x = torch.empty(9, 30).uniform_(-1, 1, generator=generator)
        if broken and number == 0:
            x[0, 0] = float("nan")
        p = next(model.parameters())
        x = x.to(p.device, p.dtype)
        return lambda: model(x).float().square().mean()

    return draw


def apply(strategy: Strategy, payloads: list[Payload], turn: Turn, own: Any) -> None:
    strategy.apply([Share(i, 1, payload) for i, payload in enumerate(payloads)], turn, own)


def same_replicas(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in pairs)


def decoupled_case(device: torch.device) -> None:
    """A peer with these kernels and one with the plain ones: replicas stay the same, momenta nearly; batches
    that are not finite are dropped by both."""
    rng = random.Random("decoupled")
    for options in (
        {},
        {"max_grad_norm": 0.05, "accumulate": 2, "replicate_every": 2, "sign": False, "alpha": 0.5},
        {"sign": False, "bound": 1.0},
    ):
        compressor = rng.choice([DctTopK(k=4, group_size=256, bits=8), TopK(k=8, group_size=100)])
        models = model_on(device), model_on(torch.device("cpu"))
        ours, theirs = (
            Decoupled(m.named_parameters(), compressor=compressor, lr=1e-2, weight_decay=0.1, **options)  # type: ignore[arg-type]
            for m in models
        )
        for round in range(1, 4):
            turn, broken = Turn(round, 1, 2, 1.0), round == 2
            payload = ours.propose(draws(models[0], round, broken), turn)
            ours.check(payload, turn)
            with plain():
                payloads = [payload, theirs.propose(draws(models[1], round, broken), turn)]
                apply(theirs, payloads, turn, "missed" if round == 1 else "counted")
            apply(ours, payloads, turn, "missed" if round == 1 else "counted")
            assert same_replicas(*models), (options, round)
        assert ours.counters == theirs.counters
        assert ours.counters["dropped_batches"] == 1
        assert ours.last_loss is not None
        assert abs(ours.last_loss - (theirs.last_loss or 0)) < 1e-5
        if device.type == "cpu":
            for p, q in zip(*(m.parameters() for m in models), strict=True):
                assert torch.allclose(ours.state[p]["momentum"], theirs.state[q]["momentum"], atol=1e-8)
            assert all(is_same_pack(payloads[0][name], payloads[1][name]) for name in payload)


def from_grad_case(device: torch.device) -> None:
    """`step` with the gradients in place, two steps of the momentum for an exchange."""
    models = model_on(device), model_on(torch.device("cpu"))
    ours, theirs = (
        Decoupled(m.named_parameters(), compressor=TopK(k=8, group_size=100), replicate_every=2)
        for m in models
    )
    for step in range(4):
        models[0].zero_grad()
        draws(models[0], step)()().backward()
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            q.grad = None if p.grad is None else p.grad.cpu().clone()
        ours.step()
        with plain():
            theirs.step()
        assert same_replicas(*models), step


def diloco_case(device: torch.device) -> None:
    """Pseudo-gradients packed at once and decoded where the parameters are; other compressors, too."""
    for compressor, n_rounds in ((TopK(k=8, group_size=100, bits=2), 2), (Dense(bits=4, group_size=64), 1)):
        models = model_on(device), model_on(torch.device("cpu"))
        ours, theirs = (
            Diloco(m.named_parameters(), compressor=compressor, lr=1e-2, inner_steps=2, bound=1.0)
            for m in models
        )
        for round in range(1, n_rounds + 1):
            turn = Turn(round, 1, 2, 1.0)
            payload = ours.propose(draws(models[0], round), turn)
            with plain():
                payloads = [payload, theirs.propose(draws(models[1], round), turn)]
                apply(theirs, payloads, turn, "counted")
            apply(ours, payloads, turn, "counted")
            assert same_replicas(*models), (compressor, round)


def adamw_case(device: torch.device) -> None:
    models = model_on(device), model_on(torch.device("cpu"))
    ours, theirs = (
        Decoupled(m.named_parameters(), compressor=DctTopK(k=4, group_size=256), base="adamw", lr=1e-2)
        for m in models
    )
    for round in (1, 2):
        turn = Turn(round, 1, 2, 1.0)
        payload = ours.propose(draws(models[0], round), turn)
        apply(ours, [payload], turn, "counted")
        with plain():
            apply(theirs, [payload], turn, None)
        assert same_replicas(*models), round


def spsa_case(device: torch.device) -> None:
    """Many rounds at once, in both types; rounding depends on the round."""
    for dtype in (torch.float32, torch.bfloat16):
        models = model_on(device, dtype), model_on(torch.device("cpu"), dtype)
        ours, theirs = (
            Spsa(m.named_parameters(), lr=1e-2, probes=2, weight_decay=0.1, params="*") for m in models
        )
        turn = Turn(1, 5, 6, 1.0)
        with plain():
            payload = theirs.propose(draws(models[1], 1), turn)
        found = ours.propose(draws(models[0], 1), turn)
        if device.type == "cpu":
            assert is_same_pack(found["codes"], payload["codes"])
        rounds = [
            Round([Share(seed, 1, payload) for seed in (6, 7)], Turn(r, r, 6, 1.0), None) for r in (1, 2, 3)
        ]
        ours.apply_many(rounds)
        with plain():
            theirs.apply_many(rounds)
        assert same_replicas(*models), dtype


ROUND_CASES: dict[str, Callable[[torch.device], None]] = {
    "decoupled": decoupled_case,
    "decoupled from gradients in place": from_grad_case,
    "diloco": diloco_case,
    "adamw": adamw_case,
    "spsa": spsa_case,
}
