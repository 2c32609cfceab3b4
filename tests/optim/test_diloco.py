"""DiLoCo: against plain references, error feedback, weights, time, fragments, use in a plain loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.support.full_disk import full_disk
from thinwire.compression.base import Part, Payload, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.errors import BadPayload, ConfigError, DiskError
from thinwire.optim.base import Closure, Own, Share
from thinwire.optim.diloco import Diloco
from thinwire.optim.inner.aside import Aside
from thinwire.optim.parts.fragments import fragments_of, unit_of
from thinwire.optim.registry import build_strategy

pytestmark = pytest.mark.usefixtures("one_thread")

SGD = {"name": "SGD"}


def turn_of(round_: int, lr_factor: float = 1.0) -> Turn:
    return Turn(round_, 500 + round_, 900 + round_, lr_factor)


def tensor(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_loss(p: nn.Parameter, gradient: Tensor) -> Closure:
    """A loss whose gradient is `gradient`."""
    return lambda: torch.sum(p * gradient)


def net() -> nn.Module:
    """Three layers; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))


def batch_loss(model: nn.Module, seed: int, n: int = 32) -> Closure:
    """Which four of sixteen inputs have the largest sum."""
    x = tensor(n, 16, seed=seed)
    y = x.view(n, 4, 4).sum(2).argmax(1)
    return lambda: F.cross_entropy(model(x), y)


def seeds_of(round_: int, peer: int) -> Iterator[int]:
    return count(10_000 * round_ + 1000 * peer)


class Swarm:
    """Peers that train in turn in this process; each has a model of its own."""

    def __init__(self, n_peers: int, **options: Any) -> None:
        self.models = [net() for _ in range(n_peers)]
        self.strategies = [Diloco(m.named_parameters(), **options) for m in self.models]

    def round(self, number: int, lost: Sequence[int] = ()) -> None:
        turn, shares = turn_of(number), []
        for peer, strategy in enumerate(self.strategies):
            payload = propose(strategy, self.models[peer], turn, peer)
            work_ahead(strategy, self.models[peer], turn, peer)
            if peer not in lost:
                shares.append(Share(peer, 1, payload))
        for peer, strategy in enumerate(self.strategies):
            own: Own = "missed" if peer in lost else "counted"
            strategy.apply(shares, turn, own)

    def parameters(self, peer: int = 0) -> Tensor:
        return flat(self.models[peer])

    def loss(self) -> float:
        return float(batch_loss(self.models[0], 10**9, n=1000)().detach())


def propose(strategy: Diloco, model: nn.Module, turn: Turn, peer: int = 0) -> Payload:
    seeds = seeds_of(turn.round, peer)
    return strategy.propose(lambda: batch_loss(model, next(seeds)), turn)


def work_ahead(strategy: Diloco, model: nn.Module, turn: Turn, peer: int = 0) -> int:
    """As long as there is something to do; how often there was."""
    seeds = count(next(seeds_of(turn.round, peer)) + 500)
    n_before = strategy.counters.get("ahead", 0)
    while strategy.work_ahead(lambda: batch_loss(model, next(seeds)), turn):
        pass
    return strategy.counters.get("ahead", 0) - n_before


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------- references


class Reference:
    """Streaming DiLoCo as the paper has it, with torch's own optimizers; with one fragment DiLoCo."""

    def __init__(
        self, n_peers: int, steps: int, fragments: list[list[str]], mix: float, overlap: int = 0
    ) -> None:
        self.steps, self.fragments, self.mix, self.overlap = steps, fragments, mix, overlap
        self.outer = dict(net().named_parameters())
        self.outer_sgd = [
            torch.optim.SGD([self.outer[name] for name in names], lr=0.7, momentum=0.9, nesterov=True)
            for names in fragments
        ]
        self.peers = [net() for _ in range(n_peers)]
        self.inner = [
            torch.optim.AdamW(
                [
                    {"params": [p for p in peer.parameters() if p.ndim > 1], "weight_decay": 0.1},
                    {"params": [p for p in peer.parameters() if p.ndim < 2], "weight_decay": 0.0},
                ],
                lr=3e-3,
                betas=(0.9, 0.95),
            )
            for peer in self.peers
        ]

    def train(self, n_steps: int, number: int, first_seed: int = 0) -> None:
        for i, (peer, inner) in enumerate(zip(self.peers, self.inner, strict=True)):
            seeds = count(next(seeds_of(number, i)) + first_seed)
            for _ in range(n_steps):
                inner.zero_grad()
                batch_loss(peer, next(seeds))().backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
                inner.step()

    def round(self, number: int) -> None:
        self.train(self.steps if number == 1 else self.steps - self.overlap, number)
        which = (number - 1) % len(self.fragments)
        for name in self.fragments[which]:
            theirs = [dict(peer.named_parameters())[name].detach() for peer in self.peers]
            self.outer[name].grad = self.outer[name].detach() - sum(theirs) / len(theirs)
        self.train(self.overlap, number, 500)  # while the offers travel
        self.outer_sgd[which].step()
        with torch.no_grad():
            for peer in self.peers:
                for name in self.fragments[which]:
                    p = dict(peer.named_parameters())[name]
                    p.copy_(self.mix * p + (1 - self.mix) * self.outer[name])

    def parameters(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.outer.values()])


LAYERS = [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["4.weight", "4.bias"]]
WHOLE = [[*LAYERS[0], *LAYERS[1], *LAYERS[2]]]


@pytest.mark.parametrize(
    ("fragments", "mix", "overlap"),
    [
        pytest.param(WHOLE, 0.0, 0, id="DiLoCo"),
        pytest.param([LAYERS[0] + LAYERS[2], LAYERS[1]], 0.0, 0, id="streaming, two fragments"),
        pytest.param(LAYERS, 0.5, 0, id="streaming, three fragments, mixed"),
        pytest.param(LAYERS, 0.5, 3, id="streaming, three fragments, overlap"),
        pytest.param(WHOLE, 0.5, 1, id="overlap"),
        pytest.param(WHOLE, 0.25, 4, id="overlap of a whole round"),
    ],
)
def test_it_is_the_paper_s(fragments: list[list[str]], mix: float, overlap: int) -> None:
    swarm = Swarm(
        3, compressor=Dense(), lr=3e-3, inner_steps=4, fragments=len(fragments), mix=mix, overlap=overlap
    )
    reference = Reference(3, 4, fragments, mix, overlap)
    for round_ in range(1, 9):
        swarm.round(round_)
        reference.round(round_)
        assert distance(swarm.parameters(), reference.parameters()) < 1e-5


def test_streaming_with_one_fragment_and_no_overlap_is_diloco() -> None:
    """On the path of streaming, where the inner parameters are kept from round to round: with a share of them
    in the mix that is below what a float32 can see."""
    options = {"compressor": Dense(), "lr": 3e-3, "inner_steps": 4}
    plain, streaming = Swarm(3, **options), Swarm(3, **options, fragments=1, mix=1e-30)
    for round_ in range(1, 7):
        plain.round(round_, lost=[round_ % 3])
        streaming.round(round_, lost=[round_ % 3])
        assert torch.equal(streaming.parameters(), plain.parameters())
    assert "live" in streaming.strategies[0].state[next(streaming.models[0].parameters())]


def test_one_inner_step_of_sgd_and_an_outer_one_are_sgd_on_all_batches() -> None:
    swarm = Swarm(
        4, compressor=Dense(), lr=0.2, weight_decay=0.0, inner=SGD, inner_steps=1, max_grad_norm=0.0,
        outer_lr=1.0, outer_momentum=0.0,
    )  # fmt: skip
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.2)
    for round_ in range(1, 21):
        swarm.round(round_)
        sgd.zero_grad()
        losses = [batch_loss(model, next(seeds_of(round_, peer)))() for peer in range(4)]
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        sgd.step()
        assert distance(swarm.parameters(), flat(model)) < 1e-5


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_outer_step_has_the_bits_of_its_formula(nesterov: bool) -> None:
    """In numpy's float32: one rounding per operation."""
    p = nn.Parameter(tensor(5, 6))
    strategy = Diloco([("p", p)], compressor=Dense(), outer_lr=0.7, outer_momentum=0.9, nesterov=nesterov)
    theta, m = p.detach().numpy().copy(), torch.zeros(5, 6).numpy()
    mu, lr = torch.tensor([0.9, 0.7]).numpy()
    for round_ in range(1, 4):
        delta = tensor(5, 6, seed=round_)
        strategy.apply([Share(0, 1, {"p": (delta.flatten(),)})], turn_of(round_), None)
        m = m * mu + delta.numpy()
        theta = theta - ((delta.numpy() + m * mu) if nesterov else m) * lr
        assert p.detach().numpy().tobytes() == theta.tobytes()
    replicated = strategy.replicated_tensors()
    assert list(replicated) == ["p", "p:outer_momentum"]
    assert replicated["p:outer_momentum"].numpy().tobytes() == m.tobytes()


# ------------------------------------------------------------------------------------------- local work


def test_the_inner_optimizer_goes_on_from_round_to_round() -> None:
    """Alone, with an outer step that adopts the inner parameters, it is the inner optimizer itself."""
    swarm = Swarm(1, compressor=Dense(), lr=3e-3, inner_steps=5, outer_lr=1.0, outer_momentum=0.0)
    reference = Reference(1, 5, WHOLE, 0.0)
    for round_ in range(1, 6):
        swarm.round(round_)
        seeds = seeds_of(round_, 0)
        for _ in range(5):
            reference.inner[0].zero_grad()
            batch_loss(reference.peers[0], next(seeds))().backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(reference.peers[0].parameters(), 1.0)
            reference.inner[0].step()
        assert distance(swarm.parameters(), flat(reference.peers[0])) < 1e-5


EXTRAS = {"lion": "lion_pytorch", "schedulefree": "schedulefree"}


@pytest.mark.parametrize("name", ["adafactor", "lion", "nadam", "schedulefree"])
def test_other_optimizers_by_name_learn_and_go_on_from_round_to_round(name: str) -> None:
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], reason="an extra")
    options: dict[str, Any] = {"compressor": Dense(), "inner": name, "inner_steps": 5, "weight_decay": 0.0}
    rates = {"adafactor": 0.1, "lion": 3e-3, "nadam": 3e-3, "schedulefree": 3e-2}
    swarm = Swarm(2, lr=rates[name], outer_lr=1.0, outer_momentum=0.0, **options)
    before = swarm.loss()
    for round_ in range(1, 7):
        swarm.round(round_)
    assert swarm.loss() < 0.8 * before
    state = next(iter(swarm.strategies[0].state.values()))["inner"]
    assert state.get("step", state.get("k", 30)) == 30
    again = Diloco(net().named_parameters(), lr=rates[name], **options)
    again.load_state_dict(copy.deepcopy(swarm.strategies[0].state_dict()))
    kept = next(iter(again.state.values()))["inner"]
    assert all(torch.equal(torch.as_tensor(kept[k]), torch.as_tensor(v)) for k, v in state.items())


@pytest.mark.parametrize("overlap", [0, 2])
def test_schedule_free_averages_over_all_rounds_as_its_package_does(overlap: int) -> None:
    """One peer, whose replica is where the package's average is; with `overlap` it goes on from there."""
    package = pytest.importorskip("schedulefree", reason="ScheduleFree is an extra")
    options: dict[str, Any] = {"mix": 1 - 2**-40, "overlap": overlap} if overlap else {}
    options |= {"inner": {"name": "ScheduleFree", "betas": [0.8, 0.95]}, "lr": 1e-2, "inner_steps": 5}
    options |= {"compressor": Dense(), "outer_lr": 1.0, "outer_momentum": 0.0}
    swarm = Swarm(1, **options)
    model = net()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    free = package.AdamWScheduleFree(groups, lr=1e-2, betas=(0.8, 0.95))
    ahead: list[int] = []
    for round_ in range(1, 6):
        if round_ == 3:  # a restart
            state = copy.deepcopy(swarm.strategies[0].state_dict())
            swarm.strategies = [Diloco(swarm.models[0].named_parameters(), **options)]
            swarm.strategies[0].load_state_dict(state)
        swarm.round(round_)
        first = next(seeds_of(round_, 0))
        free.train()
        for seed in [*ahead, *range(first, first + 5 - len(ahead))]:
            free.zero_grad()
            batch_loss(model, seed)().backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            free.step()
        ahead = [first + 500 + i for i in range(overlap)]
        free.eval()
        assert distance(swarm.parameters(), flat(model)) < 1e-5


def test_what_schedule_free_is_not_given_by_a_run_is_refused() -> None:
    pytest.importorskip("schedulefree", reason="ScheduleFree is an extra")
    inner = {"name": "ScheduleFree", "warmup_steps": 9}
    with pytest.raises(ConfigError, match="warmup_steps: leave it out"):
        Diloco(net().named_parameters(), compressor=Dense(), inner=inner)


def test_what_lion_is_not_given_by_a_run_is_refused() -> None:
    pytest.importorskip("lion_pytorch", reason="Lion is an extra")
    for inner in ({"name": "Lion", "decoupled_weight_decay": True}, {"name": "Lion", "betas": [2.0, 0.9]}):
        with pytest.raises(ConfigError, match=r"[Ll]ion|decoupled"):
            Diloco(net().named_parameters(), compressor=Dense(), inner=inner)


def test_the_schedule_acts_on_the_inner_rate() -> None:
    p = nn.Parameter(tensor(3))
    strategy = Diloco(
        [("p", p)], compressor=Dense(), lr=0.5, inner=SGD, inner_steps=2, max_grad_norm=0.0, weight_decay=0
    )
    sent = strategy.propose(lambda: linear_loss(p, torch.ones(3)), turn_of(1, lr_factor=0.25))["p"][0]
    torch.testing.assert_close(sent, torch.full((3,), 2 * 0.5 * 0.25))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_no_inner_step(bad: float) -> None:
    p = nn.Parameter(tensor(2, 2))
    gradients = iter([torch.ones(2, 2), torch.full((2, 2), bad), torch.ones(2, 2)])
    strategy = Diloco(
        [("p", p)], compressor=Dense(), lr=1.0, inner=SGD, inner_steps=3, max_grad_norm=0.0, weight_decay=0.0
    )
    sent = strategy.propose(lambda: linear_loss(p, next(gradients)), turn_of(1))["p"][0]
    torch.testing.assert_close(sent, torch.full((4,), 2.0))
    assert strategy.counters["dropped_batches"] == 1
    assert strategy.n_batches == 3


def test_inner_parameters_that_are_not_finite_are_not_sent() -> None:
    largest = torch.full((1, 1), 3e38)
    p = nn.Parameter(largest.clone())
    strategy = Diloco(
        [("p", p)], compressor=Dense(), lr=1e38, inner=SGD, inner_steps=1, max_grad_norm=0.0, weight_decay=0.0
    )
    sent = strategy.propose(lambda: linear_loss(p, -torch.ones(1, 1)), turn_of(1))["p"][0]
    assert sent.tolist() == [0.0]
    assert strategy.counters["dropped_rounds"] == 1
    assert torch.equal(p.detach(), largest)


def test_an_error_in_the_loss_leaves_the_replica_in_place() -> None:
    p = nn.Parameter(tensor(2, 2))
    strategy = Diloco([("p", p)], compressor=Dense(), lr=1.0, inner_steps=3)
    n_drawn = 0

    def draw() -> Closure:
        nonlocal n_drawn
        n_drawn += 1
        if n_drawn == 3:
            raise RuntimeError("no more data")
        return linear_loss(p, tensor(2, 2))

    with pytest.raises(RuntimeError, match="no more data"):
        strategy.propose(draw, turn_of(1))
    assert torch.equal(p.detach(), tensor(2, 2))
    assert torch.equal(strategy.replicated_tensors()["p"], tensor(2, 2))


def test_a_round_ends_on_time() -> None:
    p = nn.Parameter(tensor(3))
    strategy = Diloco([("p", p)], compressor=Dense(), inner_steps=100, max_seconds=2.0)
    now_s = 0.0
    strategy.clock = lambda: now_s

    def draw() -> Closure:
        nonlocal now_s
        now_s += 0.75
        return linear_loss(p, torch.ones(3))

    for first in (1, 2):
        strategy.propose(draw, turn_of(first))
        assert strategy.n_batches == 3  # the clock said 0.75, 1.5 and 2.25 after them
    strategy.param_groups[0]["max_seconds"] = 0.5
    strategy.propose(draw, turn_of(3))
    assert strategy.n_batches == 1  # one at least


def test_a_round_of_steps_without_a_closure_ends_on_time_too() -> None:
    p = nn.Parameter(tensor(3))
    strategy = Diloco([("p", p)], compressor=Dense(), inner_steps=100, max_seconds=2.0)
    now_s = 0.0
    strategy.clock = lambda: now_s
    rounds = []
    for _ in range(7):
        p.grad = torch.ones(3)
        strategy.step()  # the clock starts with the first gradients of a round
        rounds.append(strategy.counters.get("steps", 0))
        now_s += 0.75
    assert rounds == [0, 0, 0, 1, 1, 1, 1]
    assert strategy.n_batches == 4


# ------------------------------------------------------------------------------------------- error feedback


def sent_and_left(decay: float) -> tuple[Diloco, nn.Parameter, list[Tensor], list[Tensor]]:
    """Two rounds of one peer: what it moved by and what was sent of it."""
    p = nn.Parameter(tensor(10, 70))
    strategy = Diloco(
        [("p", p)], compressor=DctTopK(k=8, group_size=64, bits=8), lr=0.5, inner=SGD, inner_steps=1,
        max_grad_norm=0.0, weight_decay=0.0, feedback_decay=decay,
    )  # fmt: skip
    moved, sent = [], []
    for round_ in (1, 2):
        gradient = tensor(10, 70, seed=round_)
        payload = strategy.propose(lambda g=gradient: linear_loss(p, g), turn_of(round_))  # type: ignore[misc]
        q = strategy.compressor.decode([payload["p"]], [1.0], Part.whole(p.shape), turn_of(round_))
        moved.append(gradient.flatten() * 0.5)
        sent.append(q)
        strategy.apply([], turn_of(round_), "counted" if round_ == 1 else "missed")
    return strategy, p, moved, sent


def test_what_was_not_sent_is_kept_and_what_was_missed_comes_back() -> None:
    strategy, p, moved, sent = sent_and_left(decay=0.5)
    e = (moved[0] - sent[0]) * 0.5 + moved[1]  # the second send came back
    torch.testing.assert_close(strategy.state[p]["leftover"].flatten(), e, rtol=1e-5, atol=1e-6)
    assert strategy.state[p]["sends"] == {}
    assert float((sent[1] - moved[1]).norm()) > 0.1


@pytest.mark.parametrize(("own", "is_back"), [("counted", False), ("missed", True), (None, True)])
def test_a_dense_offer_that_missed_is_sent_with_the_next(own: Own, is_back: bool) -> None:
    p = nn.Parameter(tensor(3))
    strategy = Diloco(
        [("p", p)], compressor=Dense(), lr=1.0, inner=SGD, inner_steps=1, max_grad_norm=0.0, weight_decay=0.0
    )
    strategy.propose(lambda: linear_loss(p, torch.ones(3)), turn_of(1))
    strategy.apply([], turn_of(1), own)
    sent = strategy.propose(lambda: linear_loss(p, torch.ones(3)), turn_of(2))["p"][0]
    torch.testing.assert_close(sent, torch.full((3,), 2.0 if is_back else 1.0))


def test_without_error_feedback_nothing_is_kept() -> None:
    p = nn.Parameter(tensor(64, 4))
    strategy = Diloco([("p", p)], compressor=DctTopK(k=4, group_size=64), error_feedback=False, inner_steps=1)
    strategy.propose(lambda: linear_loss(p, tensor(64, 4)), turn_of(1))
    strategy.apply([], turn_of(1), "missed")
    assert not {"leftover", "sends", "live"} & strategy.state[p].keys()


@pytest.mark.parametrize("fragments", [1, 2])
def test_a_round_proposed_twice_sends_both_works_once(fragments: int) -> None:
    a, b = nn.Parameter(tensor(3)), nn.Parameter(tensor(3))
    strategy = Diloco(
        [("a", a), ("b", b)], compressor=Dense(), lr=1.0, inner=SGD, inner_steps=1, max_grad_norm=0.0,
        fragments=fragments, weight_decay=0.0,
    )  # fmt: skip
    strategy.propose(lambda: linear_loss(a, torch.ones(3)), turn_of(1))
    again = strategy.propose(lambda: linear_loss(a, torch.ones(3) * 10), turn_of(1))
    torch.testing.assert_close(again["a"][0], torch.full((3,), 11.0))


# ------------------------------------------------------------------------------------------- weights


def applied(offers: Sequence[tuple[float, int]], **options: Any) -> list[float]:
    """What offers of (all elements, samples) do to zeros, with outer rate 1 and no momentum."""
    p = nn.Parameter(torch.zeros(3))
    strategy = Diloco([("p", p)], compressor=Dense(), outer_lr=1.0, outer_momentum=0.0, **options)
    shares = [Share(i, n, {"p": (torch.full((3,), x),)}) for i, (x, n) in enumerate(offers)]
    strategy.apply(shares, turn_of(1), None)
    return [-x for x in p.tolist()]


def test_offers_count_by_their_samples() -> None:
    assert applied([(1.0, 3), (2.0, 1)]) == pytest.approx([1.25] * 3)
    assert applied([(1.0, 3), (2.0, 1)], weights="equal") == pytest.approx([1.5] * 3)
    assert applied([(1.0, 3), (2.0, 0)]) == pytest.approx([1.0] * 3)
    assert applied([(1.0, 2**20), (2.0, 2**20)]) == pytest.approx([1.5] * 3)


def test_without_samples_nothing_changes_not_even_the_momentum() -> None:
    p = nn.Parameter(torch.zeros(3))
    strategy = Diloco([("p", p)], compressor=Dense())
    share = Share(0, 1, {"p": (torch.ones(3),)})
    strategy.apply([share], turn_of(1), None)
    before = {name: t.clone() for name, t in strategy.replicated_tensors().items()}
    strategy.apply([Share(0, 0, share.payload)], turn_of(2), None)
    strategy.apply([], turn_of(3), None)
    assert all(torch.equal(t, before[name]) for name, t in strategy.replicated_tensors().items())


def test_no_offer_counts_for_much_more_than_the_median() -> None:
    claims = [(1.0, 10), (1.0, 10), (2.0, 2**20)]  # of samples: 20 at most
    assert applied(claims, clip=2.0) == pytest.approx([(10 + 10 + 2.0 * 20) / 40] * 3)
    sizes = [(1.0, 1), (1.0, 1), (1000.0, 1)]  # of norm: 2 at most
    assert applied(sizes, clip=2.0) == pytest.approx([(1 + 1 + 2.0) / 2.002] * 3, rel=1e-5)


# ------------------------------------------------------------------------------------------- fragments


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("blocks.3.attention.weight", "blocks.3"),
        ("model.layers.11.mlp.0.weight", "model.layers.11"),
        ("0.weight", "0"),
        ("embed.weight", "embed"),
        ("head.out.bias", "head.out"),
        ("scale", "scale"),
        ("experts.7", "experts.7"),
        ("conv2d.weight", "conv2d"),
    ],
)
def test_units(name: str, unit: str) -> None:
    assert unit_of(name) == unit


def test_fragments_are_strided_layers() -> None:
    names = [f"blocks.{i}.{what}" for i in range(12) for what in ("weight", "bias")]
    number = fragments_of(names, 3)
    assert [number[f"blocks.{i}.weight"] for i in range(12)] == [0, 1, 2] * 4
    assert all(number[f"blocks.{i}.weight"] == number[f"blocks.{i}.bias"] for i in range(12))
    assert set(fragments_of(names, 1).values()) == {0}
    with pytest.raises(ConfigError, match="the model has 12 layers"):
        fragments_of(names, 13)
    with pytest.raises(ConfigError, match="fragments = 4: the model has 3 layers"):
        Diloco(net().named_parameters(), compressor=Dense(), fragments=4)


def test_a_round_sends_one_fragment_and_takes_no_other() -> None:
    model = net()
    strategy = Diloco(model.named_parameters(), compressor=Dense(), fragments=3, inner_steps=1)
    for round_, names in ((1, LAYERS[0]), (2, LAYERS[1]), (3, LAYERS[2]), (4, LAYERS[0])):
        payload = propose(strategy, model, turn_of(round_))
        assert payload.keys() == strategy.fields(turn_of(round_)).keys() == set(names)
        with pytest.raises(BadPayload):
            strategy.check(payload, turn_of(round_ + 1))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        strategy.apply([Share(0, 1, payload)], turn_of(round_), "counted")
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == set(names)
    assert strategy.fields().keys() == before.keys()


def test_compressors_see_the_rounds_of_a_fragment_without_gaps() -> None:
    """One that moves on from round to round would else leave out what falls into other fragments' rounds."""
    seen = []

    class Watched(Dense):
        def pack(self, x: Tensor, part: Part, turn: Turn) -> tuple[Tensor, ...]:
            seen.append((part.shape, turn.round))
            return Dense.pack(self, x, part, turn)

    a, b = nn.Parameter(tensor(3)), nn.Parameter(tensor(4))
    strategy = Diloco([("a", a), ("b", b)], compressor=Watched(), fragments=2, inner_steps=1)
    for round_ in range(1, 7):
        strategy.propose(lambda: lambda: torch.sum(a) + torch.sum(b), turn_of(round_))
        strategy.apply([], turn_of(round_), "counted")
    assert seen == [((3,), 1), ((4,), 1), ((3,), 2), ((4,), 2), ((3,), 3), ((4,), 3)]


def test_inner_parameters_of_a_replica_that_was_moved_are_forgotten() -> None:
    """Else the difference to a snapshot would be sent as if this peer had learnt it."""
    model = net()
    strategy = Diloco(model.named_parameters(), compressor=Dense(), fragments=3, inner_steps=1, lr=1e-3)
    propose(strategy, model, turn_of(1))
    strategy.apply([], turn_of(1), "counted")
    with torch.no_grad():
        for t in strategy.replicated_tensors().values():
            t.add_(100.0)
    payload = propose(strategy, model, turn_of(8))
    assert max(float(packed[0].abs().max()) for packed in payload.values()) < 0.1


# ------------------------------------------------------------------------------------------- overlap

OVERLAP: dict[str, Any] = {"compressor": Dense(), "lr": 3e-3, "inner_steps": 5, "mix": 0.5, "overlap": 2}


def test_steps_made_ahead_are_the_first_of_the_next_round() -> None:
    model = net()
    strategy = Diloco(model.named_parameters(), **OVERLAP)
    before = flat(model)
    propose(strategy, model, turn_of(1))
    assert (strategy.n_batches, strategy.n_ahead) == (5, 0)
    inner = strategy.state[model[0].weight]["live"].clone()
    losses: list[float] = []

    def draw() -> Closure:
        closure = batch_loss(model, len(losses))

        def watched() -> Tensor:
            loss = closure()
            losses.append(float(loss.detach()))
            return loss

        return watched

    while strategy.work_ahead(draw, turn_of(1)):
        assert torch.equal(flat(model), before)  # the model has the replica all the time
        assert all(p.grad is None for p in model.parameters())
    assert len(losses) == 2
    assert not torch.equal(strategy.state[model[0].weight]["live"], inner)
    strategy.apply([], turn_of(1), "missed")
    strategy.propose(draw, turn_of(2))
    assert (strategy.n_batches, strategy.n_ahead, len(losses)) == (5, 2, 5)
    assert strategy.last_loss == pytest.approx(sum(losses) / 5)
    assert work_ahead(strategy, model, turn_of(2)) == 2


@pytest.mark.parametrize("own", ["counted", "missed", None])
def test_what_was_learnt_ahead_is_sent_with_the_share_that_the_fragment_keeps(own: Own) -> None:
    """Whatever became of the offer: it is in the replica, in the error feedback or still a difference."""
    p = nn.Parameter(torch.zeros(3))
    strategy = Diloco(
        [("p", p)], compressor=Dense(), lr=1.0, inner=SGD, inner_steps=2, overlap=1, mix=0.25,
        max_grad_norm=0.0, weight_decay=0.0, outer_lr=1.0, outer_momentum=0.0,
    )  # fmt: skip

    def draw() -> Closure:
        return linear_loss(p, torch.ones(3))

    payload = strategy.propose(draw, turn_of(1))  # at -2
    assert strategy.work_ahead(draw, turn_of(1))  # at -3
    assert not strategy.work_ahead(draw, turn_of(1))
    shares = [Share(0, 1, payload)] if own == "counted" else []
    strategy.apply(shares, turn_of(1), own)
    theta = -2.0 if own == "counted" else 0.0
    assert p.tolist() == [theta] * 3
    live = 0.25 * -3 + 0.75 * theta
    assert strategy.state[p]["live"].tolist() == [live] * 3
    sent = strategy.propose(draw, turn_of(2))["p"][0]
    returned = 0.0 if own == "counted" else 2.0
    assert sent.tolist() == [theta - (live - 1) + returned] * 3


def test_steps_ahead_of_a_commit_that_passed_by_count_in_the_next_offer() -> None:
    model = net()
    strategy = Diloco(model.named_parameters(), **OVERLAP, fragments=3)
    propose(strategy, model, turn_of(1))
    work_ahead(strategy, model, turn_of(1))
    for round_, own in ((1, "missed"), (2, None), (3, None)):
        strategy.apply([], turn_of(round_), own)  # type: ignore[arg-type]
    propose(strategy, model, turn_of(4))
    assert (strategy.n_batches, strategy.n_ahead) == (5, 2)


def test_a_replica_that_was_moved_has_no_steps_ahead() -> None:
    model = net()
    strategy = Diloco(model.named_parameters(), **OVERLAP)
    propose(strategy, model, turn_of(1))
    work_ahead(strategy, model, turn_of(1))
    with torch.no_grad():
        for t in strategy.replicated_tensors().values():
            t.add_(100.0)
    payload = propose(strategy, model, turn_of(8))
    assert (strategy.n_batches, strategy.n_ahead) == (5, 0)
    assert max(float(packed[0].abs().max()) for packed in payload.values()) < 1
    assert work_ahead(strategy, model, turn_of(8)) == 2
    strategy.apply([], turn_of(8), "counted")
    propose(strategy, model, turn_of(9))
    assert (strategy.n_batches, strategy.n_ahead) == (5, 2)


def test_a_round_proposed_twice_does_not_count_what_was_made_ahead_of_the_first() -> None:
    p = nn.Parameter(torch.zeros(3))
    strategy = Diloco(
        [("p", p)], compressor=Dense(), lr=1.0, inner=SGD, inner_steps=2, overlap=1, mix=0.25,
        max_grad_norm=0.0, weight_decay=0.0,
    )  # fmt: skip
    strategy.propose(lambda: linear_loss(p, torch.ones(3)), turn_of(1))
    assert strategy.work_ahead(lambda: linear_loss(p, torch.ones(3)), turn_of(1))
    again = strategy.propose(lambda: linear_loss(p, torch.ones(3)), turn_of(1))
    assert (strategy.n_batches, strategy.n_ahead) == (2, 0)
    assert again["p"][0].tolist() == [4.0] * 3


def test_the_clock_of_a_round_does_not_run_while_work_is_done_ahead() -> None:
    p = nn.Parameter(tensor(3))
    strategy = Diloco([("p", p)], compressor=Dense(), inner_steps=100, max_seconds=2.0, overlap=10, mix=0.5)
    now_s = 0.0
    strategy.clock = lambda: now_s

    def draw() -> Closure:
        nonlocal now_s
        now_s += 0.75
        return linear_loss(p, torch.ones(3))

    strategy.propose(draw, turn_of(1))
    n_ahead = 0
    while strategy.work_ahead(draw, turn_of(1)):
        n_ahead += 1
    assert n_ahead == 10
    strategy.apply([], turn_of(1), "counted")
    strategy.propose(draw, turn_of(2))
    assert (strategy.n_batches, strategy.n_ahead) == (13, 10)


def test_work_ahead_that_fails_leaves_the_replica_in_place() -> None:
    model = net()
    strategy = Diloco(model.named_parameters(), **OVERLAP)
    before = flat(model)
    propose(strategy, model, turn_of(1))

    def draw() -> Closure:
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        strategy.work_ahead(draw, turn_of(1))
    assert torch.equal(flat(model), before)
    assert "ahead" not in strategy.counters


def test_without_the_option_there_is_nothing_to_do_ahead() -> None:
    model = net()
    strategy = Diloco(model.named_parameters(), **{**OVERLAP, "overlap": 0})
    propose(strategy, model, turn_of(1))
    assert work_ahead(strategy, model, turn_of(1)) == 0


def test_a_state_of_a_version_without_the_option_is_read() -> None:
    model = net()
    strategy = Diloco(model.named_parameters(), **OVERLAP)
    propose(strategy, model, turn_of(1))
    old = copy.deepcopy(strategy.state_dict())
    for group in old["param_groups"]:
        del group["overlap"]
    strategy.load_state_dict(old)
    assert strategy.option("overlap") == 2
    assert work_ahead(strategy, model, turn_of(1)) == 2


# ------------------------------------------------------------------------------------------- in a plain loop


@pytest.mark.parametrize("options", [{}, {"fragments": 3, "mix": 0.5}], ids=["DiLoCo", "streaming"])
def test_steps_without_a_closure_are_inner_steps(options: dict[str, Any]) -> None:
    looped, whole = net(), net()
    a, b = (
        Diloco(
            m.named_parameters(), compressor=DctTopK(k=8, group_size=64), lr=3e-3, inner_steps=3, **options
        )
        for m in (looped, whole)
    )
    seeds, same_seeds = count(), count()
    for _ in range(4):
        b.step(lambda: batch_loss(whole, next(same_seeds))())  # noqa: PLW0108 (another batch each time)
        for step in range(3):
            a.zero_grad()
            batch_loss(looped, next(seeds))().backward()  # type: ignore[no-untyped-call]
            before = outer_of(a)
            a.step()
            assert torch.equal(outer_of(a), before) == (step < 2)
        with a.replica():
            assert torch.equal(flat(looped), flat(whole))


def outer_of(strategy: Diloco) -> Tensor:
    tensors = strategy.replicated_tensors()
    return torch.cat([t.flatten() for name, t in tensors.items() if ":" not in name])


def test_a_loop_goes_on_from_its_state_in_the_middle_of_a_round() -> None:
    models = [net(), net()]
    straight, stopped = (
        Diloco(m.named_parameters(), compressor=DctTopK(k=8, group_size=64), lr=3e-3, inner_steps=4)
        for m in models
    )
    for step in range(10):
        if step == 6:
            saved = copy.deepcopy((models[1].state_dict(), stopped.state_dict()))
            models[1] = net()
            stopped = Diloco(
                models[1].named_parameters(), compressor=DctTopK(k=8, group_size=64), lr=3e-3, inner_steps=4
            )
            models[1].load_state_dict(saved[0])
            stopped.load_state_dict(saved[1])
        for model, strategy in zip(models, (straight, stopped), strict=True):
            strategy.zero_grad()
            batch_loss(model, step)().backward()  # type: ignore[no-untyped-call]
            strategy.step()
    assert torch.equal(flat(models[0]), flat(models[1]))


# ------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner": ["AdamW"]}, "inner = ['AdamW']: write a name, or a table with a name"),
        ({"inner": {"name": "AdmaW"}}, "inner optimizer 'AdmaW': did you mean 'AdamW'?"),
        ({"inner": {"name": "LBFGS"}}, "inner optimizer LBFGS: it evaluates the loss itself"),
        ({"inner": {"name": "AdamW", "lr": 1.0}}, "inner.lr: lr is an option of the strategy itself"),
        ({"inner": {"name": "AdamW", "beta": 1.0}}, "inner optimizer AdamW: "),
        ({"inner": {"name": "AdamW", "betas": [0.9, 2.0]}}, "inner optimizer AdamW: Invalid beta"),
        ({"inner": {"name": "Rprop"}}, "inner optimizer Rprop has no weight decay"),
        ({"inner_steps": 0}, "inner_steps = 0: must be a whole number"),
        ({"mix": 1.0}, "mix = 1.0: must be a number >= 0 and < 1"),
        ({"overlap": 31, "mix": 0.5}, "overlap = 31: must be a whole number from 0 to 30"),
        ({"overlap": 5}, "overlap = 5 with mix = 0: what a fragment learns while its offer travels would be"),
        ({"weights": "token"}, "weights = 'token': one of equal, samples"),
        ({"outer_momentum": 1.0}, "outer_momentum = 1.0: "),
    ],
)
def test_what_is_wrong_is_refused_in_clear_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as e:
        build_strategy({"name": "diloco", **options}, net().named_parameters())
    assert words in str(e.value)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop", "Adafactor", "NAdam"])
def test_inner_optimizers_of_torch(name: str) -> None:
    swarm = Swarm(1, compressor=Dense(), lr=1e-3, inner={"name": name}, inner_steps=2)
    before = swarm.loss()
    for round_ in range(1, 6):
        swarm.round(round_)
    assert swarm.loss() < before


# ------------------------------------------------------------------------------------------- it learns

SPARSE_LOCO = {"feedback_decay": 0.95, "outer_lr": 1.0, "outer_momentum": 0.0}


def test_peers_that_lose_offers_learn_together() -> None:
    swarm = Swarm(4, compressor=Dense(bits="e3m0"), lr=3e-3, inner_steps=10)
    assert swarm.loss() > 1.3
    for round_ in range(1, 13):
        swarm.round(round_, lost=[round_ % 4])
    assert swarm.loss() < 0.75
    assert all(torch.equal(swarm.parameters(i), swarm.parameters()) for i in range(4))


def test_sparse_loco_is_a_configuration_and_needs_its_error_feedback() -> None:
    losses = {}
    compressor = {"name": "topk", "k": 2, "group_size": 64, "bits": 2}
    for feedback in (True, False):
        config = {**SPARSE_LOCO, "lr": 3e-3, "inner_steps": 10, "error_feedback": feedback}
        models = [net() for _ in range(4)]
        strategies = [
            build_strategy({"name": "diloco", **config, "compressor": compressor}, m.named_parameters())
            for m in models
        ]
        for round_ in range(1, 25):
            draws: list[Callable[[], Closure]] = []
            for peer, model in enumerate(models):
                seeds = seeds_of(round_, peer)
                draws.append(lambda m=model, s=seeds: batch_loss(m, next(s)))  # type: ignore[misc]
            shares = [
                Share(i, 1, strategy.propose(draw, turn_of(round_)))
                for i, (strategy, draw) in enumerate(zip(strategies, draws, strict=True))
            ]
            for strategy in strategies:
                strategy.apply(shares, turn_of(round_), "counted")
        losses[feedback] = float(batch_loss(models[0], 10**9, n=1000)().detach())
    assert losses[True] < losses[False] - 0.1


# ---------------------------------------------------------------------------------- what waits elsewhere


def test_a_disk_without_room_for_what_waits_is_named(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(DiskError, match=f"--offload-idle: {tmp_path} cannot be written"):
        Aside(tmp_path).put("x", torch.ones(4))


@pytest.mark.parametrize("error_feedback", [True, False])
def test_where_idle_tensors_wait_changes_nothing(error_feedback: bool) -> None:
    """Not even a round whose training goes wrong, and one that is proposed twice."""
    found = []
    for aside in (None, Aside()):
        model = net()
        strategy = Diloco(
            model.named_parameters(), compressor=Dense(bits=4), inner_steps=2, error_feedback=error_feedback
        )
        strategy.aside = aside
        payloads = []
        for round_ in (1, 2, 3, 3):
            payload = propose(strategy, model, turn_of(round_))
            payloads.append(payload)
            if len(payloads) != 3:
                strategy.apply([Share(0, 1, payload)], turn_of(round_), "counted")
        states = [dict(sorted(s.items())) for s in strategy.state.values()]
        found.append((payloads, flat(model), states))
        assert not any("outer" in s for s in strategy.state.values())
    for plain, spared in zip(pytree.tree_leaves(found[0]), pytree.tree_leaves(found[1]), strict=True):
        assert torch.equal(torch.as_tensor(plain), torch.as_tensor(spared))


def test_a_closure_that_fails_leaves_all_in_place() -> None:
    model = net()
    strategy = Diloco(model.named_parameters(), compressor=Dense(bits=4), inner_steps=2)
    strategy.aside = Aside()
    payload = propose(strategy, model, turn_of(1))
    strategy.apply([Share(0, 1, payload)], turn_of(1), "counted")
    before = flat(model), copy.deepcopy([s["leftover"] for s in strategy.state.values()])
    batches = iter([batch_loss(model, 1)])
    with pytest.raises(StopIteration):
        strategy.propose(lambda: next(batches), turn_of(2))
    assert torch.equal(flat(model), before[0])
    for state, leftover in zip(strategy.state.values(), before[1], strict=True):
        assert torch.equal(state["leftover"], leftover)


def test_broken_inner_parameters_start_over_from_what_waits() -> None:
    model = net()
    strategy = Diloco(model.named_parameters(), compressor=Dense(bits=4), inner_steps=1, lr=1e38)
    strategy.aside = Aside()
    before = flat(model)
    propose(strategy, model, turn_of(1))
    assert strategy.counters["dropped_rounds"] == 1
    assert torch.equal(flat(model), before)
