"""SPSA: the byte code, the arithmetic of `apply`, what is dropped, clipped or refused, and learning."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thinwire.compression.base import Payload, Turn
from thinwire.compression.errors import ConfigError
from thinwire.compression.exact import to_float32
from thinwire.compression.numerics.noise import noise
from thinwire.optim.base import Closure, Round, Share
from thinwire.optim.parts import byte_code
from thinwire.optim.parts.perturb import NotSubstituted
from thinwire.optim.spsa import CODES, MAX_BATCH_BYTES, Spsa

pytestmark = pytest.mark.usefixtures("one_thread")

TURN = Turn(1, 11, 22, 1.0)


def codes_of(*codes: int) -> Payload:
    return {CODES: (torch.tensor(codes, dtype=torch.uint8),)}


def code_of(g: float) -> int:
    """The code of an exact power of two."""
    code = byte_code.encode(g, 0)
    assert byte_code.decode(code) == g
    return code


# ------------------------------------------------------------------------------------------- the byte


def test_magnitudes_are_the_float32_values_of_quarter_octaves() -> None:
    assert len(byte_code.MAGNITUDES) == 127
    for m, magnitude in enumerate(byte_code.MAGNITUDES, start=1):
        assert magnitude == float(np.float32(2.0 ** ((m - 64) / 4)))
    assert byte_code.MAGNITUDES[63] == 1.0


def test_every_code_survives_a_round_trip() -> None:
    for code in set(range(256)) - {byte_code.NOTHING, byte_code.NEGATIVE}:
        g = byte_code.decode(code)
        assert (g < 0) == (code >= 128)
        for word in (0, 2**31, 2**32 - 1):
            assert byte_code.encode(g, word) == code


def test_rounding_is_unbiased_within_the_range() -> None:
    words = np.random.default_rng(5).integers(0, 2**32, 20_000)
    for g in (1e-4, -0.0371, 1.1, -6.7e3):
        values = [byte_code.decode(byte_code.encode(g, int(w))) for w in words]
        assert len(set(values)) == 2
        # A step is a factor of 2^(1/4): the standard deviation of one value is at most 9% of it.
        assert abs(np.mean(values) / g - 1) < 4 * 0.09 / math.sqrt(len(words))


def test_what_is_out_of_range_saturates() -> None:
    largest, smallest = byte_code.MAGNITUDES[-1], byte_code.MAGNITUDES[0]
    assert byte_code.decode(byte_code.encode(1e30, 0)) == largest
    assert byte_code.decode(byte_code.encode(-1e30, 2**32 - 1)) == -largest
    assert byte_code.decode(byte_code.encode(1e-30, 0)) == smallest
    assert byte_code.decode(byte_code.encode(-5e-324, 2**32 - 1)) == -smallest


@pytest.mark.parametrize("g", [0.0, -0.0, math.nan, math.inf, -math.inf])
def test_what_says_nothing_has_the_code_nothing(g: float) -> None:
    assert byte_code.encode(g, 123) == byte_code.NOTHING
    assert byte_code.decode(byte_code.NOTHING) == 0.0


# ------------------------------------------------------------------------------------------- apply


def two_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {
        "matrix": nn.Parameter(torch.randn(30, 200, generator=generator)),
        "bias": nn.Parameter(torch.randn(30, generator=generator)),
    }


@pytest.mark.parametrize("kind", ["sign", "gauss"])
def test_apply_computes_the_formula(kind: str, kernels: str) -> None:
    parameters = two_parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    lr, lr_factor, wd = 0.01, 0.5, 0.1
    spsa = Spsa(parameters.items(), lr=lr, weight_decay=wd, noise=kind)  # type: ignore[arg-type]
    shares = [
        Share(100, 1, codes_of(code_of(0.5), byte_code.NOTHING, code_of(-2.0))),
        Share(200, 1, codes_of(code_of(1.0))),
    ]
    spsa.apply(shares, Turn(1, 11, 22, lr_factor), None)
    terms = [(100, 0, 0.5), (100, 2, -2.0), (200, 0, 1.0)]
    for index, name in enumerate(["bias", "matrix"]):
        expected = before[name].flatten().numpy()
        acc = np.zeros_like(expected)
        for seed, probe, g in terms:
            z = noise(kind, seed, index, probe, 0, expected.size).numpy()  # type: ignore[arg-type]
            acc = acc + np.float32(lr * lr_factor / 3 * g) * z
        if name == "matrix":  # biases do not decay
            expected = expected * np.float32(1 - lr * lr_factor * wd)
        assert np.array_equal(parameters[name].detach().flatten().numpy(), expected - acc)


def test_scale_sqrt_divides_by_the_root() -> None:
    mean, root = two_parameters(), two_parameters()
    share = Share(100, 1, codes_of(*[code_of(1.0)] * 4))
    Spsa(mean.items(), lr=0.02).apply([share], TURN, None)
    Spsa(root.items(), lr=0.01, scale="sqrt").apply([share], TURN, None)
    for name in mean:  # 0.02 / 4 = 0.01 / 2
        assert torch.equal(mean[name], root[name])


def test_without_a_counted_probe_nothing_changes() -> None:
    parameters = two_parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    Spsa(parameters.items(), lr=0.5, weight_decay=0.5).apply([Share(1, 1, codes_of(0, 0))], TURN, "counted")
    assert all(torch.equal(parameters[name], before[name]) for name in before)


def test_one_probe_cannot_wreck_a_run() -> None:
    """Beyond ten medians |g| counts as ten medians."""
    honest = [Share(s, 1, codes_of(code_of(1.0))) for s in (1, 2, 3)]
    attacked, clipped = two_parameters(), two_parameters()
    Spsa(attacked.items(), lr=0.01).apply([*honest, Share(4, 1, codes_of(code_of(-(2.0**15))))], TURN, None)
    Spsa(clipped.items(), lr=0.01, clip=1e9).apply(
        [*honest, Share(4, 1, codes_of(byte_code.encode(-10.0, 0)))], TURN, None
    )
    low = byte_code.decode(byte_code.encode(-10.0, 0))
    z = noise("sign", 4, 1, 0, 0, 6000).view(30, 200)
    difference = (clipped["matrix"] - attacked["matrix"]).detach()
    # theta - lr/4 g z: what is left between them is the step from the code's value to exactly -10.
    assert torch.allclose(difference, z * (0.01 / 4) * (-10.0 - low), atol=1e-6)


def test_another_memory_format_gets_the_same_update() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = nn.Parameter(torch.randn(4, 3, 5, 5, generator=generator))
    strided = nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
    assert not strided.is_contiguous()
    for p in (plain, strided):
        Spsa([("w", p)], lr=0.1).apply([Share(9, 1, codes_of(code_of(1.0)))], TURN, None)
    assert torch.equal(plain, strided)
    assert strided.is_contiguous(memory_format=torch.channels_last)


def many_rounds(n_rounds: int) -> list[Round]:
    """Of one to four peers with any codes, some of which are clipped; in one round no probe counts."""
    generator = np.random.default_rng(7)
    rounds = []
    for r in range(1, n_rounds + 1):
        shares = []
        for peer in range(generator.integers(1, 5)):
            codes = np.append(generator.integers(1, 128, 5), [byte_code.NOTHING, code_of(2.0**15)])
            codes = np.where(generator.integers(0, 2, 7) & (codes > 0), codes | 0x80, codes) * (r != 3)
            shares.append(Share(2**63 + 100 * r + peer, 1, codes_of(*codes.tolist())))
        rounds.append(Round(shares, Turn(r, 1, 2, to_float32(1 / r)), None))
    return rounds


@pytest.mark.parametrize("kind", ["sign", "gauss"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", ["mean", "sqrt"])
def test_many_rounds_are_one_after_the_other(
    kernels: str, kind: str, weight_decay: float, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(4, 3, 15, 5, generator=generator).to(memory_format=torch.channels_last)
    start = {**two_parameters(), "head": nn.Parameter(head), "temperature": nn.Parameter(torch.tensor(1.5))}

    def strategy(parameters: dict[str, nn.Parameter]) -> Spsa:
        named = list(parameters.items())
        groups = [{"params": named[:1]}, {"params": named[1:], "lr": 3e-5, "weight_decay": 0.01}]
        return Spsa(groups, lr=1e-4, weight_decay=weight_decay, noise=kind, scale=scale)  # type: ignore[arg-type]

    fused, one_by_one, backwards = (copy.deepcopy(start) for _ in range(3))
    rounds = many_rounds(9)
    strategy(fused).apply_many(rounds)
    strategy(backwards).apply_many(rounds[::-1])
    monkeypatch.setenv("THINWIRE_KERNELS", "torch")
    spsa = strategy(one_by_one)
    for r in rounds:
        before = {name: p.detach().clone() for name, p in one_by_one.items()}
        spsa.apply(r.shares, r.turn, r.own)
        assert torch.equal(before["matrix"], one_by_one["matrix"]) == (r.turn.round == 3)
    for name, p in fused.items():
        assert torch.equal(p, one_by_one[name])
    assert not torch.equal(fused["matrix"], backwards["matrix"])  # the data would show another order


def test_the_larger_the_model_the_smaller_the_batches() -> None:
    """At least one payload of 16 probes for 600 M parameters; bounded for the smallest."""
    sizes = [1, 10**6, 28 * 10**6, 6 * 10**8, 10**11]
    with torch.device("meta"):
        n_bytes = [Spsa([("w", nn.Parameter(torch.empty(n)))], lr=1.0).batch_bytes() for n in sizes]
    assert n_bytes == sorted(n_bytes, reverse=True)
    assert n_bytes[0] == MAX_BATCH_BYTES
    assert n_bytes[3] >= 50
    assert n_bytes[4] == 0


# ------------------------------------------------------------------------------------------- propose


def quadratic(p: nn.Parameter) -> Closure:
    return lambda: torch.sum(p * p)


def test_g_is_the_directional_derivative() -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    spsa = Spsa([("p", p)], lr=1.0, eps=2.0**-10, probes=8)
    codes = spsa.propose(lambda: quadratic(p), TURN)[CODES][0].tolist()
    for probe, code in enumerate(codes):
        z = noise("sign", TURN.own_seed, 0, probe, 0, 4)
        g = float((2 * p.detach() * z).sum())
        # One step of the code is a factor of 2^(1/4); float32 losses near 14 know g to about 1e-3.
        assert byte_code.decode(code) == pytest.approx(g, rel=0.2, abs=2e-3)
    assert spsa.last_loss == pytest.approx(14.25, rel=0.01)


def test_every_probe_gets_a_batch_of_its_own() -> None:
    p = nn.Parameter(torch.ones(3))
    n_drawn = 0

    def draw() -> Closure:
        nonlocal n_drawn
        n_drawn += 1
        return quadratic(p)

    payload = Spsa([("p", p)], lr=1.0, probes=5).propose(draw, TURN)
    assert n_drawn == 5
    assert payload[CODES][0].shape == (5,)


def test_a_probe_that_is_not_finite_is_dropped_and_counted() -> None:
    p = nn.Parameter(torch.ones(3))
    spsa = Spsa([("p", p)], lr=1.0, probes=3)
    spsa.propose(lambda: quadratic(p), TURN)
    batches = iter([quadratic(p), lambda: torch.sum(p * math.inf), lambda: torch.sum(p * math.nan)])
    codes = spsa.propose(lambda: next(batches), TURN)[CODES][0].tolist()
    assert codes[0] != byte_code.NOTHING
    assert codes[1:] == [byte_code.NOTHING] * 2
    assert spsa.counters["dropped_probes"] == 2
    assert spsa.last_loss == pytest.approx(3.0, rel=0.01)
    spsa.propose(lambda: lambda: torch.sum(p * math.nan), TURN)
    assert spsa.last_loss is None


def test_a_loss_that_does_not_depend_on_the_parameters_is_an_error() -> None:
    p, other = nn.Parameter(torch.ones(3)), torch.ones(3)
    with pytest.raises(NotSubstituted, match="does not depend on the parameters"):
        Spsa([("p", p)], lr=1.0).propose(lambda: lambda: torch.sum(other), TURN)


def test_the_first_propose_makes_a_dry_run() -> None:
    p = nn.Parameter(torch.ones(3))
    alias = p.detach()
    with pytest.raises(NotSubstituted, match="past the perturbation: p\\."):
        Spsa([("p", p)], lr=1.0).propose(lambda: lambda: torch.sum(alias * alias), TURN)


def test_step_without_a_closure_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"call step\(closure\)"):
        Spsa([("p", nn.Parameter(torch.ones(3)))], lr=1.0).step()


def test_peers_may_send_different_numbers_of_probes() -> None:
    p = nn.Parameter(torch.ones(3))
    receiver = Spsa([("p", p)], lr=1.0, probes=2, max_probes=8)
    for n in (0, 1, 8):
        receiver.check(codes_of(*[code_of(1.0)] * n), TURN)


# ------------------------------------------------------------------------------------------- it learns


class Regression:
    """Logistic regression with 50 inputs; every peer draws its own batches of 32."""

    def __init__(self) -> None:
        self.w = nn.Parameter(torch.zeros(50, 1))
        self.truth = torch.randn(50, generator=torch.Generator().manual_seed(1))

    def batch(self, seed: int, n: int = 32) -> Closure:
        x = torch.randn(n, 50, generator=torch.Generator().manual_seed(seed))
        y = (x @ self.truth > 0).float()

        def loss() -> Tensor:
            logits = (x @ self.w)[:, 0]
            return nn.functional.binary_cross_entropy_with_logits(logits, y)

        return loss


def test_four_peers_learn() -> None:
    peers = [Regression() for _ in range(4)]
    strategies = [Spsa([("w", peer.w)], lr=0.05, probes=4) for peer in peers]
    held_out = peers[0].batch(10**9, n=2000)
    first = float(held_out().detach())
    for round_ in range(1, 151):
        shares = []
        for i, (peer, spsa) in enumerate(zip(peers, strategies, strict=True)):
            turn = Turn(round_, 0, 1000 * round_ + i, to_float32(1.0))
            shares.append(
                Share(turn.own_seed, 32, spsa.propose(lambda p=peer, t=turn: p.batch(t.own_seed), turn))
            )
        for spsa in strategies:
            spsa.apply(shares, Turn(round_, 0, 0, 1.0), "counted")
    assert first == pytest.approx(math.log(2))
    assert float(held_out().detach()) < 0.45
    assert all(torch.equal(peer.w, peers[0].w) for peer in peers)


def test_step_learns_alone_with_a_scheduler() -> None:
    peer = Regression()
    spsa = Spsa([("w", peer.w)], lr=0.05, probes=8, seed=5)
    schedule = torch.optim.lr_scheduler.LinearLR(spsa, 1.0, 0.1, total_iters=100)
    first = float(peer.batch(10**9, n=2000)().detach())
    for i in range(100):
        assert spsa.step(peer.batch(i)) == spsa.last_loss
        schedule.step()
    assert spsa.counters["steps"] == 100
    assert spsa.param_groups[0]["lr"] == pytest.approx(0.005)
    assert float(peer.batch(10**9, n=2000)().detach()) < first - 0.2


# ------------------------------------------------------------------------------------------- noise, subsets


def bowl(p: nn.Parameter, target: Tensor) -> Closure:
    return lambda: torch.sum((p - target) ** 2)


def test_with_shared_noise_all_peers_probe_the_same_directions() -> None:
    """The sum of their g meets z once; without clipping that is the mean of what each would do alone."""
    codes = [codes_of(code_of(2.0), code_of(-1.0)), codes_of(code_of(0.5), 0), codes_of(code_of(4.0))]
    p = nn.Parameter(torch.zeros(200))
    spsa = Spsa([("p", p)], lr=0.5, shared_noise=True)
    spsa.apply([Share(1000 + i, 1, c) for i, c in enumerate(codes)], TURN, None)
    z0, z1 = (noise("sign", TURN.shared_seed, 0, probe, 0, 200) for probe in (0, 1))
    rate = 0.5 / 4  # four probes have a code
    expected = 0 - (z0 * to_float32(rate * (2.0 + 0.5 + 4.0)) + z1 * to_float32(rate * -1.0))
    assert torch.equal(p.detach(), expected)


def test_peers_with_shared_noise_measure_their_own_batches_along_it() -> None:
    target = torch.linspace(-1, 1, 50)
    payloads = []
    for own_seed in (1, 2):
        p = nn.Parameter(torch.zeros(50))
        spsa = Spsa([("p", p)], lr=0.1, probes=64, shared_noise=True)
        turn = Turn(1, 11, own_seed, 1.0)
        payloads.append(spsa.propose(lambda p=p: bowl(p, target), turn))  # type: ignore[misc]
    a, b = ([byte_code.decode(c) if c else 0.0 for c in x[CODES][0].tolist()] for x in payloads)
    z = torch.stack([noise("sign", 11, 0, probe, 0, 50) for probe in range(64)])
    for g, derivative in zip(a, (z @ (-2 * target)).tolist(), strict=True):
        assert g == pytest.approx(derivative, rel=0.2, abs=0.05)  # the code has steps of a quarter octave
    assert a != b  # which of two steps it is, is drawn by each peer for itself


def test_scalars_accumulated_per_seed_are_the_trajectory() -> None:
    """FedKSeed: at a constant rate without weight decay, one number per seed of a pool is the model."""
    pool, rounds, lr = [101, 202, 303, 404], 40, 0.01
    p = nn.Parameter(torch.linspace(-1, 1, 300))
    start = p.detach().double()
    spsa = Spsa([("p", p)], lr=lr, probes=1, shared_noise=True, clip=1e6)
    accumulated = dict.fromkeys(pool, 0.0)
    for r in range(1, rounds + 1):
        seed = pool[(7 * r) % 4 if r % 3 else r % 4]
        turn = Turn(r, seed, 50 + r, 1.0)
        target = torch.zeros(300) + 0.1 * (r % 5)
        payload = spsa.propose(lambda target=target: bowl(p, target), turn)  # type: ignore[misc]
        spsa.apply([Share(turn.own_seed, 1, payload)], turn, "counted")
        accumulated[seed] += byte_code.decode(int(payload[CODES][0]))
    assert sum(a != 0 for a in accumulated.values()) == 4
    at_once = start
    for seed, g in accumulated.items():
        at_once = at_once - lr * g * noise("sign", seed, 0, 0, 0, 300).double()
    moved = float((start - p.detach().double()).norm())
    assert float((at_once - p.detach().double()).norm()) < 1e-5 * moved


class Adapted(nn.Module):
    """A layer with an adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.base = nn.Linear(6, 4)
            self.lora_a = nn.Linear(6, 2, bias=False)
            self.lora_b = nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.lora_b(self.lora_a(x))
        return out


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("lora", ["lora_a.weight", "lora_b.weight"]),
        ("*.bias, lora_a.*", ["base.bias", "lora_a.weight"]),
        ("base", ["base.bias", "base.weight"]),
        ("*", ["base.bias", "base.weight", "lora_a.weight", "lora_b.weight"]),
    ],
)
def test_a_subset_trains_and_the_rest_is_frozen(params: str, names: list[str]) -> None:
    model = Adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    spsa = Spsa(model.named_parameters(), lr=1e-2, probes=4, params=params)
    assert list(spsa.replicated_tensors()) == names
    x = torch.ones(3, 6)
    for _ in range(3):
        spsa.step(lambda: torch.sum(model(x) ** 2))
    changed = sorted(name for name, p in model.named_parameters() if not torch.equal(p, before[name]))
    assert changed == names


def test_a_subset_of_groups_keeps_their_options() -> None:
    model = Adapted()
    groups = [
        {"params": list(model.base.named_parameters("base")), "lr": 0.5},
        {"params": list(model.lora_a.named_parameters("lora_a")), "lr": 0.25},
    ]
    spsa = Spsa(groups, lr=1.0, params="lora")
    assert [(p.name, p.group["lr"]) for p in spsa.parameters_in_order()] == [("lora_a.weight", 0.25)]


@pytest.mark.parametrize("params", ["lroa", "*.lora", ""])
def test_a_subset_of_nothing_is_refused(params: str) -> None:
    with pytest.raises(ConfigError, match="matches no parameter: there are base"):
        Spsa(Adapted().named_parameters(), lr=1.0, params=params)
