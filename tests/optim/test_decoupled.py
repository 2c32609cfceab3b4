"""Decoupled momentum: the arithmetic of both phases, what becomes of lost offers, and that it learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.compression.base import Compressor, Packed, Part, Payload, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.none import Nothing
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.errors import ConfigError
from thinwire.compression.exact import power, to_float32
from thinwire.optim.base import Closure, Share
from thinwire.optim.decoupled import Decoupled
from thinwire.optim.parts.clip import Weighing
from thinwire.optim.parts.sender_mean import decode_sender_mean

pytestmark = pytest.mark.usefixtures("one_thread")


def turn_of(round_: int, lr_factor: float = 1.0) -> Turn:
    return Turn(round_, 500 + round_, 900 + round_, lr_factor)


def tensor(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_loss(p: nn.Parameter, gradient: Tensor) -> Closure:
    """A loss whose gradient is `gradient`."""
    return lambda: torch.sum(p * gradient)


def momentum_of(strategy: Decoupled, p: nn.Parameter) -> Tensor:
    """Flat, the memory itself."""
    momentum: Tensor = strategy.state[p]["momentum"]
    return momentum.view(-1)


def dense(values: Tensor) -> Payload:
    return {"p": (values.flatten(),)}


# ------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("compressor", [DctTopK(k=8, group_size=64), DctTopK(k=4, bits=8), Dense()])
def test_what_is_sent_leaves_the_momentum(compressor: Compressor) -> None:
    p = nn.Parameter(tensor(10, 70))
    strategy = Decoupled([("p", p)], compressor=compressor, lr=0.5, beta=0.9, alpha=0.25)
    first, second = tensor(10, 70, seed=4), tensor(10, 70, seed=5)
    delta = torch.zeros(700)
    for round_, gradient in ((1, first), (2, second)):
        turn = turn_of(round_, 0.5)
        payload = strategy.propose(lambda g=gradient: linear_loss(p, g), turn)
        strategy.apply([], turn, "counted")
        delta = delta * 0.9 + gradient.flatten() * 0.25
        q = strategy.compressor.decode([payload["p"]], [1.0], Part.whole(p.shape), turn)
        delta = delta - 0.25 * q
        torch.testing.assert_close(momentum_of(strategy, p), delta)


@pytest.mark.parametrize("sign", [True, False])
def test_apply_computes_the_formula(sign: bool) -> None:
    matrix, vector = nn.Parameter(tensor(5, 6)), nn.Parameter(tensor(6, seed=9))
    before = matrix.detach().clone(), vector.detach().clone()
    lr, lr_factor, wd = 0.01, 0.5, 0.1
    strategy = Decoupled(
        [("m", matrix), ("v", vector)], compressor=Dense(), lr=lr, sign=sign, weight_decay=wd
    )
    sent = [{"m": tensor(30, seed=i), "v": tensor(6, seed=10 + i)} for i in range(3)]
    sent[0]["m"][0] = sent[1]["m"][0] = sent[2]["m"][0] = 0.0
    shares = [Share(i, 1, {name: (t,) for name, t in s.items()}) for i, s in enumerate(sent)]
    strategy.apply(shares, turn_of(1, lr_factor), None)
    third, rate = torch.tensor(1 / 3), torch.tensor(lr * lr_factor)
    for p, name, old in ((matrix, "m", before[0]), (vector, "v", before[1])):
        mean = (sent[0][name] + sent[1][name] + sent[2][name]) * third
        step = torch.sign(mean) * rate if sign else mean
        decay = torch.tensor(1 - lr * lr_factor * wd) if name == "m" else torch.tensor(1.0)
        assert torch.equal(p.detach(), old * decay - step.view(old.shape))
    if sign:
        assert matrix[0, 0] == before[0][0, 0] * torch.tensor(1 - lr * lr_factor * wd)  # sign(0) is 0


def train(optimizer: torch.optim.Optimizer, p: nn.Parameter, n_steps: int) -> list[Tensor]:
    """A least-squares problem; the trajectory."""
    a, b = tensor(20, 8, seed=6), tensor(20, 5, seed=7)
    seen = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        F.mse_loss(a @ p, b).backward()
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


def test_alone_dense_and_plain_equals_sgd() -> None:
    ours, theirs = nn.Parameter(tensor(8, 5)), nn.Parameter(tensor(8, 5))
    decoupled = Decoupled([("p", ours)], compressor=Dense(), lr=0.1, sign=False)
    sgd = torch.optim.SGD([theirs], lr=0.1)
    for a, b in zip(train(decoupled, ours, 50), train(sgd, theirs, 50), strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-6
    assert ours.grad is not None  # as torch's: gradients stay until zero_grad


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_alone_without_a_compressor_it_is_what_dense_is(base: str) -> None:
    """The baseline of one peer; in a swarm it is refused."""
    a, b = nn.Parameter(tensor(8, 5)), nn.Parameter(tensor(8, 5))
    alone, with_dense = (
        Decoupled([("p", p)], compressor=c, base=base, lr=0.01) for p, c in ((a, Nothing()), (b, Dense()))
    )
    for x, y in zip(train(alone, a, 5), train(with_dense, b, 5), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ConfigError, match="exchanges nothing"):
        alone.fields(turn_of(1))


def test_a_closure_and_gradients_in_place_give_the_same_step() -> None:
    a, b = nn.Parameter(tensor(4, 4)), nn.Parameter(tensor(4, 4))
    gradient = tensor(4, 4, seed=8)
    with_closure = Decoupled([("p", a)], compressor=DctTopK(), lr=0.1)
    in_place = Decoupled([("p", b)], compressor=DctTopK(), lr=0.1)
    loss = with_closure.step(linear_loss(a, gradient))
    linear_loss(b, gradient)().backward()
    assert in_place.step() is None
    assert loss == pytest.approx(float((tensor(4, 4) * gradient).sum()))
    assert torch.equal(a, b)


def test_micro_batches_are_averaged_then_clipped() -> None:
    p = nn.Parameter(tensor(3, 4))
    gradients = iter([tensor(3, 4, seed=1) * 10, tensor(3, 4, seed=2) * 10])
    strategy = Decoupled([("p", p)], compressor=Dense(), lr=1.0, accumulate=2, max_grad_norm=0.5)
    sent = strategy.propose(lambda: linear_loss(p, next(gradients)), turn_of(1))["p"][0]
    mean = (tensor(3, 4, seed=1) + tensor(3, 4, seed=2)).flatten() * 5
    torch.testing.assert_close(sent, mean * (0.5 / mean.norm()))


def test_a_gradient_of_none_is_zero() -> None:
    used, unused = nn.Parameter(tensor(3)), nn.Parameter(tensor(3))
    strategy = Decoupled([("used", used), ("unused", unused)], compressor=Dense())
    payload = strategy.propose(lambda: lambda: torch.sum(used * used), turn_of(1))
    assert payload["unused"][0].tolist() == [0.0, 0.0, 0.0]
    assert bool((payload["used"][0] != 0).all())


def test_sparse_gradients_are_taken() -> None:
    embed = nn.Embedding(5, 3, sparse=True)
    strategy = Decoupled(embed.named_parameters(), compressor=Dense(), lr=1.0)
    sent = strategy.propose(lambda: lambda: torch.sum(embed(torch.tensor([1, 1, 4]))), turn_of(1))
    assert sent["weight"][0].view(5, 3)[:, 0].tolist() == [0, 2, 0, 0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_never_enters_the_momentum(bad: float) -> None:
    p = nn.Parameter(tensor(2, 2))
    good = tensor(2, 2, seed=5)
    poisoned = good.clone()
    poisoned[0, 0] = bad

    def finite_loss_bad_gradient() -> Tensor:
        # The root of zero: its gradient is infinite, times zero it is NaN.
        return torch.sqrt(torch.sum(p * 0.0) * (0.0 if math.isnan(bad) else 1.0)) + torch.sum(p * good)

    batches = iter([linear_loss(p, poisoned), linear_loss(p, good), finite_loss_bad_gradient])
    strategy = Decoupled([("p", p)], compressor=Dense(), lr=1.0, accumulate=3)
    sent = strategy.propose(lambda: next(batches), turn_of(1))["p"][0]
    torch.testing.assert_close(sent, good.flatten())
    assert strategy.counters["dropped_batches"] == 2
    assert strategy.last_loss == pytest.approx(float((p.detach() * good).sum()))


@pytest.mark.parametrize("n_keys", [4, 40])
def test_a_nan_that_attention_hides_is_in_the_gradient(n_keys: int) -> None:
    """torch 2.13, on a CPU: of a NaN query comes 0 with fewer keys than a vector has lanes, else NaN."""
    query = nn.Parameter(torch.full((1, 1, 2, 8), math.nan))
    key = value = tensor(1, 1, n_keys, 8)
    strategy = Decoupled([("p", query)], compressor=Dense(), lr=1.0)
    strategy.propose(lambda: lambda: F.scaled_dot_product_attention(query, key, value).sum(), turn_of(1))
    assert strategy.counters["dropped_batches"] == 1
    assert strategy.last_loss is None


def test_a_round_without_a_finite_batch_sends_what_the_momentum_has() -> None:
    p = nn.Parameter(tensor(2, 2))
    strategy = Decoupled([("p", p)], compressor=Dense(), lr=1.0, beta=0.5, alpha=0.0)
    strategy.propose(lambda: linear_loss(p, torch.ones(2, 2)), turn_of(1))
    sent = strategy.propose(lambda: lambda: torch.sum(p) * math.nan, turn_of(2))["p"][0]
    assert strategy.last_loss is None
    assert sent.tolist() == [0.5] * 4


# ------------------------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_alone_dense_and_plain_with_base_adamw_equals_adamw(weight_decay: float) -> None:
    ours, theirs = nn.Parameter(tensor(8, 5)), nn.Parameter(tensor(8, 5))
    decoupled = Decoupled(
        [("p", ours)], compressor=Dense(), base="adamw", lr=0.03, sign=False, weight_decay=weight_decay
    )
    adamw = torch.optim.AdamW([theirs], lr=0.03, weight_decay=weight_decay)
    for a, b in zip(train(decoupled, ours, 50), train(adamw, theirs, 50), strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-6


def test_adamw_computes_the_formula_one_rounding_at_a_time() -> None:
    """In numpy's float32, which rounds every operation once, its root included."""
    p = nn.Parameter(tensor(6, 7))
    theta, m, v = p.detach().numpy().copy(), np.zeros((6, 7), np.float32), np.zeros((6, 7), np.float32)
    strategy = Decoupled(
        [("p", p)], compressor=Dense(), base="adamw", lr=0.01, sign=False, weight_decay=0.1, adam_beta1=0.8
    )
    power1 = power2 = 1.0
    for t in range(1, 6):
        g = tensor(6, 7, seed=20 + t)
        strategy.apply([Share(0, 1, dense(g))], turn_of(t, 0.5), None)
        power1, power2, lr, f = power1 * 0.8, power2 * 0.999, 0.01 * 0.5, np.float32
        m = m * f(0.8) + g.numpy() * f(1.0 - 0.8)
        v = v * f(0.999) + g.numpy() * g.numpy() * f(1.0 - 0.999)
        root = np.sqrt(v * f(1.0 / (1.0 - power2))) + f(1e-8)
        theta = theta * f(1.0 - lr * 0.1) - m * f(lr / (1.0 - power1)) / root
        assert p.detach().numpy().tobytes() == theta.tobytes()
    replicated = strategy.replicated_tensors()
    assert list(replicated) == ["p", "p:moment1", "p:moment2", "p:updates"]
    assert replicated["p:moment1"].numpy().tobytes() == m.tobytes()
    assert replicated["p:updates"] == 5.0


def test_a_round_without_shares_leaves_the_moments_alone() -> None:
    p = nn.Parameter(tensor(3))
    strategy = Decoupled([("p", p)], compressor=Dense(), base="adamw")
    strategy.apply([Share(0, 1, dense(tensor(3)))], turn_of(1), None)
    before = {name: t.clone() for name, t in strategy.replicated_tensors().items()}
    strategy.apply([], turn_of(2), None)
    assert all(torch.equal(t, before[name]) for name, t in strategy.replicated_tensors().items())


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_powers_are_running_products(beta: float) -> None:
    product = 1.0
    for t in range(1, 60000):
        product *= beta
        if t in (1, 2, 100, 59999):
            assert 1.0 - power(beta, t) == 1.0 - product


# ------------------------------------------------------------------------------------------- several steps


def test_replicate_every_steps_the_momentum_several_times_at_one_theta() -> None:
    p = nn.Parameter(tensor(3, 4))
    gradients = [tensor(3, 4, seed=i) for i in range(6)]
    batches = iter(gradients)
    strategy = Decoupled([("p", p)], compressor=Dense(), lr=0.5, beta=0.9, accumulate=2, replicate_every=3)
    sent = strategy.propose(lambda: linear_loss(p, next(batches)), turn_of(1))["p"][0]
    delta = torch.zeros(12)
    for a, b in zip(gradients[::2], gradients[1::2], strict=True):
        delta = delta * 0.9 + 0.5 * (a + b).flatten() / 2
    torch.testing.assert_close(sent, delta)
    assert (strategy.counters["decays"], strategy.n_batches) == (3, 6)


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("compressor", [DctTopK(k=4, group_size=64), TopK(k=8, group_size=64), Dense()])
def test_with_overlap_gradients_are_those_before_the_commit_moved_by_ones_own_offer(
    compressor: Compressor, lost: int
) -> None:
    """Bit for bit what one finds that puts those weights in place; also when it is saved and restored on the
    way, when a batch is not finite, and when its offer was lost: then it comes back before the gradient does.
    """
    options = {"compressor": compressor, "lr": 0.1, "beta": 0.9, "accumulate": 2}
    p, other = nn.Parameter(tensor(16, 16)), nn.Parameter(tensor(16, 16))
    strategy, plain = Decoupled([("p", p)], overlap=1, **options), Decoupled([("p", other)], **options)  # type: ignore[arg-type]

    def draw(parameter: nn.Parameter, round_: int) -> Callable[[], Closure]:
        targets = iter([tensor(16, 16, seed=10 * round_), tensor(16, 16, seed=10 * round_ + 1)])

        def drawn() -> Closure:
            target = next(targets) * (math.nan if round_ == 3 and len(seen) == 1 else 1.0)
            seen.append(round_)
            return lambda: torch.sum((parameter - target) ** 2)

        seen: list[int] = []
        return drawn

    before, payload = other.detach().clone(), dict[str, Packed]()
    for round_ in range(1, 5):
        turn, now = turn_of(round_, 1 / round_), other.detach().clone()
        if round_ > 1:
            alone = nn.Parameter(before)
            mover = Decoupled([("p", alone)], **options)  # type: ignore[arg-type]
            mover.apply([Share(7, 1, payload)], turn_of(round_ - 1, 1 / (round_ - 1)), None)
            before = alone.detach()
        payload = strategy.propose(draw(p, round_), turn)
        with torch.no_grad():
            other.copy_(before)
        expected = plain.propose(draw(other, round_), turn)
        with torch.no_grad():
            other.copy_(now)
        before = now
        foreign = {"p": compressor.pack(tensor(256, seed=70 + round_), Part.whole((16, 16)), turn)}
        assert all(torch.equal(a, b) for a, b in zip(payload["p"], expected["p"], strict=True))
        assert (strategy.n_batches, strategy.n_ahead) == (2, 0 if round_ == 1 else 2)
        assert strategy.last_loss == pytest.approx(plain.last_loss)
        ahead = draw(p, round_ + 1)
        assert strategy.work_ahead(ahead, turn)
        if round_ == 2:  # a restart
            state = copy.deepcopy(strategy.state_dict())
            strategy = Decoupled([("p", p)], overlap=1, **options)  # type: ignore[arg-type]
            strategy.load_state_dict(state)
        assert strategy.work_ahead(ahead, turn)
        assert not strategy.work_ahead(ahead, turn), "that is all of a round"
        assert p.grad is None
        for s in (strategy, plain):
            shares = [Share(1, 1, foreign), *([Share(2, 1, payload)] if round_ != lost else [])]
            s.apply(shares, turn, "missed" if round_ == lost else "counted")
        assert torch.equal(p, other)
        assert torch.equal(strategy.state[p]["momentum"], plain.state[other]["momentum"])


def test_what_was_worked_ahead_for_another_round_is_forgotten() -> None:
    p = nn.Parameter(torch.zeros(3))
    strategy = Decoupled([("p", p)], compressor=Dense(), lr=1.0, overlap=1, beta=0.0)
    assert strategy.work_ahead(lambda: linear_loss(p, torch.ones(3)), turn_of(4))
    sent = strategy.propose(lambda: linear_loss(p, torch.full((3,), 2.0)), turn_of(7))["p"][0]
    torch.testing.assert_close(sent, torch.full((3,), 2.0))
    assert strategy.n_ahead == 0
    assert not strategy.counters.keys() & {"ahead", "ahead_for", "ahead_finite"}
    for option in ({"replicate_every": 2}, {"base": "adamw"}, {"sign": False}):
        with pytest.raises(ConfigError, match="replicate_every = 1"):
            Decoupled([("p", p)], compressor=Dense(), overlap=1, **option)  # type: ignore[arg-type]


def test_steps_without_a_closure_exchange_every_so_often() -> None:
    in_place, at_once = nn.Parameter(tensor(4, 4)), nn.Parameter(tensor(4, 4))
    a, b = (
        Decoupled([("p", p)], compressor=DctTopK(), lr=0.1, beta=0.9, replicate_every=3)
        for p in (in_place, at_once)
    )
    for round_ in range(2):
        gradients = [tensor(4, 4, seed=10 * round_ + i) for i in range(3)]
        batches = iter(gradients)
        b.step(lambda batches=batches: torch.sum(at_once * next(batches)))  # type: ignore[misc]
        for i, gradient in enumerate(gradients):
            before = in_place.detach().clone()
            in_place.grad = gradient.clone()
            a.step()
            assert torch.equal(in_place, before) == (i < 2)
        assert torch.equal(in_place, at_once)


def test_a_beta_that_warms_up_and_what_comes_back_by_it() -> None:
    """n / (n + W) at the n-th step, and beta from when that is less."""
    p = nn.Parameter(torch.zeros(3))
    strategy = Decoupled(
        [("p", p)], compressor=Dense(), lr=1.0, beta=0.5, beta_warmup=2.0, alpha=0.0, sign=False
    )
    expected = 0.0
    for n, beta in enumerate([1 / 3, 1 / 2, 1 / 2], start=1):
        p.grad = torch.full((3,), float(n))
        strategy.propose_from_grad(turn_of(n))
        expected = beta * expected + n
        torch.testing.assert_close(strategy.state[p]["momentum"], torch.full((3,), expected))
    sender = Decoupled([("p", p)], compressor=Dense(), lr=1.0, beta=0.9, beta_warmup=2.0, sign=False)
    for n in (1, 2):
        p.grad = torch.full((3,), 4.0 if n == 1 else 0.0)
        sender.propose_from_grad(turn_of(n))
    sender.apply([], turn_of(1), "missed")
    torch.testing.assert_close(sender.state[p]["momentum"], torch.full((3,), 4.0 / 2))  # by step 2 alone


# ------------------------------------------------------------------------------------------- sender mean


def test_the_mean_over_senders_is_refused_without_sign() -> None:
    with pytest.raises(ConfigError, match="diverges without sign"):
        Decoupled([("p", nn.Parameter(tensor(3, 4)))], compressor=DctTopK(), mean="senders", sign=False)


def test_the_mean_over_senders_is_per_coefficient() -> None:
    """In the domain of the coefficients: 0 of 3, 1 of 3 and 3 of 3 peers have sent one."""
    shape, turn = (100, 3), turn_of(1)
    part, compressor = Part.whole(shape), TopK(k=8, group_size=64, bits=8)
    packs = [compressor.pack(tensor(300, seed=i), part, turn) for i in range(3)]
    alone = torch.stack([compressor.decode([p], [1.0], part, turn) for p in packs])
    n_senders = (alone != 0).sum(0)
    assert set(n_senders.tolist()) >= {0, 1, 2}
    total = (alone[0] + alone[1]) + alone[2]

    def mean_of(part: Part, floor: float = 0.0) -> Tensor:
        equal = Weighing([1.0] * 3, [1.0] * 3)
        mean = decode_sender_mean(compressor, total.device, packs, equal, floor, part, turn)
        assert mean is not None
        return mean

    expected = total / n_senders.clamp(min=1)
    assert torch.equal(mean_of(part), expected)
    half = Part(shape, 90, 210)
    assert torch.equal(mean_of(half), expected[90:210])
    assert torch.equal(mean_of(part, 0.5), total / n_senders.clamp(min=1.5))
    assert torch.equal(mean_of(part, 1.0), total / 3)


def test_with_a_transform_the_mean_over_senders_is_another_step() -> None:
    """A coefficient that one peer sends weighs as much as one that all send."""
    frequent, rare = dct_row(3), dct_row(9)
    compressor = DctTopK(k=1, group_size=64, bits=8)
    packs = [compressor.pack(row, Part.whole((64,)), turn_of(1)) for row in (frequent, frequent, rare * 1.5)]
    steps = {}
    for mean in ("all", "senders"):
        p = nn.Parameter(torch.zeros(64))
        strategy = Decoupled([("p", p)], compressor=compressor, lr=1.0, mean=mean)
        strategy.apply([Share(i, 1, {"p": pack}) for i, pack in enumerate(packs)], turn_of(1), None)
        steps[mean] = -p.detach()
    agree_all = int((steps["all"] == torch.sign(frequent * 2 + rare * 1.5)).sum())
    agree_senders = int((steps["senders"] == torch.sign(frequent + rare * 1.5)).sum())
    assert min(agree_all, agree_senders) >= 62  # of 64: the integer transform is close, not equal
    assert not torch.equal(steps["all"], steps["senders"])


def dct_row(frequency: int) -> Tensor:
    return torch.cos(math.pi * (torch.arange(64) + 0.5) * frequency / 64)


# ------------------------------------------------------------------------------------------- lost offers


def test_a_missed_offer_goes_back_exactly_once() -> None:
    p = nn.Parameter(tensor(6, 7))
    compressor = DctTopK(k=4, group_size=64, bits=8)
    strategy = Decoupled([("p", p)], compressor=compressor, lr=1.0, beta=0.5, alpha=0.5)
    turn = turn_of(1)
    payload = strategy.propose(lambda: linear_loss(p, tensor(6, 7, seed=1)), turn)
    left = momentum_of(strategy, p).clone()
    q = compressor.decode([payload["p"]], [1.0], Part.whole(p.shape), turn)
    strategy.apply([], turn, "missed")
    assert torch.equal(momentum_of(strategy, p), left + q * 0.5)
    strategy.apply([], turn, "missed")
    assert torch.equal(momentum_of(strategy, p), left + q * 0.5)


def test_a_missed_offer_that_is_found_out_later_has_decayed() -> None:
    p = nn.Parameter(tensor(6, 7))
    strategy = Decoupled([("p", p)], compressor=Dense(), lr=1.0, beta=0.5)
    turns = [turn_of(i) for i in (1, 2, 3)]
    q = strategy.propose(lambda: linear_loss(p, tensor(6, 7, seed=1)), turns[0])["p"][0].clone()
    zero = torch.zeros(6, 7)
    for turn in turns[1:]:  # rounds 2 and 3 are proposed before the commit of round 1 is known
        strategy.propose(lambda: linear_loss(p, zero), turn)
    strategy.apply([], turns[0], "missed")
    assert torch.equal(momentum_of(strategy, p), q * 0.25)
    for turn in turns[1:]:
        strategy.apply([], turn, "counted")
    assert torch.equal(momentum_of(strategy, p), q * 0.25)
    assert strategy.state[p]["sends"] == {}


@pytest.mark.parametrize(("own", "is_back"), [("counted", False), ("missed", True), (None, True)])
def test_only_what_counted_stays_away(own: str | None, is_back: bool) -> None:
    p = nn.Parameter(tensor(3))
    strategy = Decoupled([("p", p)], compressor=Dense(), lr=1.0)
    strategy.propose(lambda: linear_loss(p, torch.ones(3)), turn_of(1))
    strategy.apply([], turn_of(1), own)  # type: ignore[arg-type]
    assert momentum_of(strategy, p).tolist() == [float(is_back)] * 3
    assert strategy.state[p]["sends"] == {}


def test_a_round_proposed_twice_counts_once() -> None:
    p = nn.Parameter(tensor(3))
    strategy = Decoupled([("p", p)], compressor=Dense(), lr=1.0, beta=0.5)
    strategy.propose(lambda: linear_loss(p, torch.ones(3)), turn_of(1))
    again = strategy.propose(lambda: linear_loss(p, torch.ones(3)), turn_of(1))
    assert again["p"][0].tolist() == [1.5] * 3  # 0.5 of the first gradient, and the second
    strategy.apply([], turn_of(1), "counted")
    assert momentum_of(strategy, p).tolist() == [0.0] * 3


def test_sends_that_a_snapshot_skipped_are_given_up() -> None:
    p = nn.Parameter(tensor(3))
    strategy = Decoupled([("p", p)], compressor=Dense(), lr=1.0)
    strategy.propose(lambda: linear_loss(p, torch.ones(3)), turn_of(1))
    strategy.apply([], turn_of(7), None)
    assert strategy.state[p]["sends"] == {}
    assert momentum_of(strategy, p).tolist() == [0.0] * 3
    assert strategy.counters["lost_sends"] == 1


# ------------------------------------------------------------------------------------------- clipping


def test_unsigned_offers_are_clipped_by_norm() -> None:
    p = nn.Parameter(torch.zeros(4))
    strategy = Decoupled([("p", p)], compressor=Dense(), sign=False, clip=2.0)
    offers = [1.0, 1.0, 1.0, 1000.0, 0.0]  # the median of those that say something is 1
    strategy.apply([Share(i, 1, dense(torch.full((4,), x))) for i, x in enumerate(offers)], turn_of(1), None)
    weight = to_float32(2.0 / 1000.0)
    expected = -(3.0 + weight * 1000.0) / (4.0 + weight)
    assert p.tolist() == pytest.approx([expected] * 4, rel=1e-6)


def test_one_enormous_offer_changes_little() -> None:
    honest, attacked = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    good = [Share(i, 1, dense(tensor(4, seed=1))) for i in range(3)]
    bad = Share(3, 1, dense(torch.full((4,), 2.0**59)))
    Decoupled([("p", honest)], compressor=Dense(), sign=False).apply(good, turn_of(1), None)
    Decoupled([("p", attacked)], compressor=Dense(), sign=False).apply([*good, bad], turn_of(1), None)
    assert torch.equal(honest, attacked)  # its weight is below what a compressor takes


# ------------------------------------------------------------------------------------------- it learns


class Classifier:
    """A small net that learns which of four inputs sums is the largest."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))

    def batch(self, seed: int, n: int = 32) -> Closure:
        x = tensor(n, 16, seed=seed)
        y = x.view(n, 4, 4).sum(2).argmax(1)
        return lambda: F.cross_entropy(self.model(x), y)

    def loss(self) -> float:
        return float(self.batch(10**9, n=1000)().detach())


@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize("compressor", [DctTopK(k=64, bits=1), Dense()])
def test_four_peers_learn(compressor: Compressor, sign: bool) -> None:
    peers = [Classifier() for _ in range(4)]
    lr = 0.003 if sign else 0.3
    strategies = [
        Decoupled(peer.model.named_parameters(), compressor=compressor, lr=lr, beta=0.9, sign=sign)
        for peer in peers
    ]
    assert peers[0].loss() > 1.3
    for round_ in range(1, 61):
        shares = [
            Share(i, 32, propose(strategy, peer.batch(100 * round_ + i), turn_of(round_)))
            for i, (peer, strategy) in enumerate(zip(peers, strategies, strict=True))
        ]
        for strategy in strategies:
            strategy.apply(shares, turn_of(round_), "counted")
    assert peers[0].loss() < 0.8
    assert len({peer.loss() for peer in peers}) == 1


def propose(strategy: Decoupled, closure: Closure, turn: Turn) -> Payload:
    draw: Callable[[], Closure] = lambda: closure  # noqa: E731
    return strategy.propose(draw, turn)
