"""One suite over every strategy: what a swarm may rely on, whatever is sent.

A new strategy is a row in `ROWS`. The swarm is a list of replicas that exchange the bytes of their payloads;
which offers are lost is scripted.
"""

from __future__ import annotations

import copy
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.compressors import has_expected_bytes, n_bytes_of, name_of, small_compressors
from tests.support.paths import ROOT
from tests.support.replicas import LAYOUT, Replica, run_round
from thinwire.compression import wire
from thinwire.compression.base import Packed, Part, Payload
from thinwire.compression.errors import BadPayload, ConfigError
from thinwire.compression.numerics.noise import initial_values
from thinwire.compression.registry import build_compressor
from thinwire.optim.base import Closure, Own, Strategy
from thinwire.optim.registry import complete_config
from thinwire.optim.sapo import Group, Sapo

pytestmark = pytest.mark.usefixtures("one_thread")


def bad_values(packed: Packed) -> dict[str, Packed]:
    """The first tensor full of bytes that are no SPSA code, or of NaN."""
    first = packed[0]
    bad = torch.full_like(first, 0x80 if first.dtype == torch.uint8 else float("nan"))
    return {"bad values": (bad, *packed[1:])}


@dataclass(frozen=True)
class Row:
    """A strategy's config, as it stands in a run's record 0, and what the suite cannot know of its payloads.

    `n_bytes`: of a payload's tensors; None: what the compressor's docstring says. `bad_packs`: packs of the
    first parameter, made from a good one, that can be written down and read, and that `check` refuses; by
    what is wrong with them. `is_quiet`: rounds that change no replica.
    """

    config: dict[str, Any]
    n_bytes: Callable[[Strategy], int] | None = None
    bad_packs: Callable[[Packed], dict[str, Packed]] = bad_values
    is_quiet: Callable[[int], bool] = lambda round: False


SPSA = {"name": "spsa", "lr": 1e-2, "probes": 3}
DECOUPLED = {"name": "decoupled", "lr": 1e-2, "beta": 0.9}
DILOCO = {"name": "diloco", "lr": 3e-3, "inner_steps": 3, "feedback_decay": 0.95}
GOSSIP = {"name": "gossip", "lr": 3e-3, "inner_steps": 2, "merge_every": 1}
SUBSPACE = {"name": "subspace", "lr": 3e-3, "dimension": 24, "accumulate": 2}
ONE_BIT = {"name": "dct_topk", "k": 32, "bits": 1}
EIGHT_BITS = {"name": "dct_topk", "k": 64, "group_size": 1024, "bits": 8}
DENSE = {"name": "dense"}
ADAMW = {
    "base": "adamw",
    "compressor": EIGHT_BITS,
    "weight_decay": 0.1,
    "accumulate": 2,
    "replicate_every": 2,
}
BOUNDED = {"bound": 1.0, "own_data_share": 0.25}
"""The bound at which half of the payloads are scaled down."""


SENDERS = {"mean": "senders", "sender_floor": 0.25}


def one_per_probe(strategy: Strategy) -> int:
    return int(strategy.option("probes"))


def sixteen_bits(strategy: Strategy) -> int:
    """Of all parameters, dense."""
    counts = [p.part.n_global for p in strategy.parameters_in_order()]
    return sum(2 * -(-n // 1024) + 2 * n for n in counts)


def decoupled_with(compressor: dict[str, Any], sign: bool) -> Row:
    return Row({**DECOUPLED, "compressor": compressor, "sign": sign, "weight_decay": 0.1})


ROWS: dict[str, Row] = {
    "spsa sign": Row({**SPSA, "weight_decay": 0.1}, one_per_probe),
    "spsa shared": Row({**SPSA, "shared_noise": True, "params": "a,c"}, one_per_probe),
    "spsa gauss": Row({**SPSA, "noise": "gauss", "scale": "sqrt"}, one_per_probe),
    "decoupled dct_topk 1 sign": decoupled_with(ONE_BIT, sign=True),
    "decoupled dct_topk 1 plain": decoupled_with(ONE_BIT, sign=False),
    "decoupled dct_topk 8 sign": decoupled_with(EIGHT_BITS, sign=True),
    "decoupled dct_topk 8 plain": decoupled_with(EIGHT_BITS, sign=False),
    "decoupled dense sign": decoupled_with(DENSE, sign=True),
    "decoupled dense plain": decoupled_with(DENSE, sign=False),
    "decoupled senders": Row({**DECOUPLED, "compressor": {**ONE_BIT, "bits": 8}, "mean": "senders"}),
    "decoupled adamw sign": Row({**DECOUPLED, **ADAMW, "sign": True}),
    "decoupled adamw plain": Row({**DECOUPLED, **ADAMW, "sign": False}),
    "diloco dense": Row({**DILOCO, "compressor": DENSE}),
    "diloco dct_topk 8": Row({**DILOCO, "compressor": EIGHT_BITS, "nesterov": False}),
    "diloco streaming": Row(
        {**DILOCO, "compressor": EIGHT_BITS, "fragments": 3, "mix": 0.5, "outer_lr": 0.4}
    ),
    "diloco sgd": Row(
        {
            **DILOCO,
            "compressor": ONE_BIT,
            "inner": {"name": "SGD", "momentum": 0.9},
            "outer_lr": 1.0,
            "outer_momentum": 0.0,
            "fragments": 2,
        }
    ),
    "decoupled topk": decoupled_with({"name": "topk", "k": 32, "group_size": 1024, "bits": 2}, sign=False),
    "decoupled tiles": decoupled_with(
        {"name": "dct_topk", "k": 32, "layout": "tiles", "bits": 4, "indices": "rice"}, sign=False
    ),
    "decoupled random_k": decoupled_with({"name": "random_k", "rate": 0.2}, sign=False),
    "decoupled striding": decoupled_with({"name": "striding", "rate": 0.2, "bits": 16}, sign=False),
    "decoupled slicing": decoupled_with({"name": "slicing", "rate": 0.2, "bits": 32}, sign=False),
    "diloco sparse": Row(
        {
            **DILOCO,
            "compressor": {"name": "topk", "k": 64, "bits": 2},
            "outer_lr": 1.0,
            "outer_momentum": 0.0,
        }
    ),
    "diloco four bits": Row({**DILOCO, "compressor": {"name": "dense", "bits": "e3m0"}}),
    "diloco control": Row({**DILOCO, **BOUNDED, "compressor": EIGHT_BITS, "control": "scaffold"}),
    "diloco overlap": Row({**DILOCO, "compressor": EIGHT_BITS, "fragments": 2, "mix": 0.5, "overlap": 2}),
    "diloco striding": Row({**DILOCO, "compressor": {"name": "striding", "rate": 0.5}, "fragments": 2}),
    "spsa bounded": Row({**SPSA, **BOUNDED, "clip": 1.0, "scale": "sqrt"}, one_per_probe),
    "spsa shared bounded": Row({**SPSA, **BOUNDED, "clip": 1.0, "shared_noise": True}, one_per_probe),
    "decoupled bounded sign": Row({**DECOUPLED, **BOUNDED, "compressor": EIGHT_BITS}),
    "decoupled bounded dense sign": Row({**DECOUPLED, **BOUNDED, "compressor": DENSE}),
    "decoupled bounded plain": Row({**DECOUPLED, **BOUNDED, "compressor": EIGHT_BITS, "sign": False}),
    "decoupled bounded senders": Row({**DECOUPLED, **BOUNDED, "compressor": EIGHT_BITS, "mean": "senders"}),
    "decoupled bounded adamw": Row({**DECOUPLED, **ADAMW, **BOUNDED, "sign": False}),
    "spsa trimmed": Row({**SPSA, **BOUNDED, "shared_noise": True, "aggregate": "trimmed"}, one_per_probe),
    "decoupled median sign": Row({**DECOUPLED, **BOUNDED, "compressor": EIGHT_BITS, "aggregate": "median"}),
    "decoupled vote plain": Row(
        {**DECOUPLED, "compressor": {"name": "topk", "k": 64}, "aggregate": "vote", "sign": False}
    ),
    "decoupled trimmed adamw": Row(
        {**DECOUPLED, **ADAMW, **BOUNDED, "sign": False, "aggregate": "trimmed"},
    ),
    "decoupled centred plain": Row(
        {**DECOUPLED, **BOUNDED, "compressor": EIGHT_BITS, "aggregate": "centred", "sign": False}
    ),
    "diloco median": Row({**DILOCO, **BOUNDED, "compressor": DENSE, "aggregate": "median"}),
    "diloco centred": Row({**DILOCO, "compressor": EIGHT_BITS, "fragments": 2, "aggregate": "centred"}),
    "diloco bounded dense": Row({**DILOCO, **BOUNDED, "compressor": DENSE}),
    "diloco bounded sparse": Row({**DILOCO, **BOUNDED, "compressor": EIGHT_BITS, "fragments": 2}),
    "diloco senders": Row({**DILOCO, **BOUNDED, **SENDERS, "compressor": EIGHT_BITS}),
    "decoupled adamw senders": Row({**DECOUPLED, **ADAMW, **SENDERS, "sign": False}),
    "decoupled by rule": Row({**DECOUPLED, "compressor": {"name": "topk", "k": 64}, "lr_scale": "rule"}),
    "gossip": Row({**GOSSIP, "compressor": DENSE, "merge_every": 1}),
    "gossip every second round": Row(
        {
            **GOSSIP,
            **BOUNDED,
            "mixing": "a2cid2",
            "compressor": {"name": "dense", "bits": 8},
            "merge_every": 2,
        },
        n_bytes=lambda strategy: 4,
        is_quiet=lambda round: round % 2 == 1,
    ),
    "gossip choco": Row(
        {**GOSSIP, "mixing": "choco", "topology": "ring", "compressor": EIGHT_BITS, "aggregate": "median"},
        n_bytes=sixteen_bits,
    ),
    "spsa by rule": Row({**SPSA, **BOUNDED, "lr_scale": "rule"}, one_per_probe),
    "sapo": Row(
        {"name": "sapo", "lr": 3e-3, "prompts": 6, "samples": 4, "length": 1, "vocabulary": 5, "own": 6},
        lambda _: 6 * 4,
        is_quiet=lambda round: True,
    ),
    "subspace": Row({**SUBSPACE, "compressor": DENSE, "weight_decay": 0.1}, lambda _: 4 * 24),
    "subspace bounded": Row(
        {**SUBSPACE, **BOUNDED, "compressor": {"name": "dense", "bits": 8}, "reseed_every": 2},
        lambda _: 2 + 24,
    ),
    "subspace for ever": Row(
        {**SUBSPACE, "compressor": DENSE, "reseed_every": 0, "aggregate": "median"}, lambda _: 4 * 24
    ),
}

PAYLOADS = ROOT / "tests/golden/strategy_payloads.json"


class Net(nn.Module):
    """Two groups of 4096 in one matrix, short groups, vectors and a scalar; exact initial weights."""

    def __init__(self, width: int = 211) -> None:
        super().__init__()
        shapes = {"a": (width, 24), "b": (width,), "c": (5, width), "temperature": ()}
        for i, (name, shape) in enumerate(shapes.items()):
            n = torch.Size(shape).numel()
            self.register_parameter(name, nn.Parameter(initial_values(77, i, 0, n, 0.2).view(shape)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, self.a, self.b))
        return F.linear(hidden, self.c) * (1 + self.temperature)


def batch_loss(model: nn.Module, seed: int) -> Closure:
    """A fixed batch: which fifth of the inputs has the largest sum."""
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed))
    target = torch.stack([part.sum(1) for part in x.tensor_split(5, dim=1)], dim=1).argmax(1)
    return lambda: F.cross_entropy(model(x), target)


class Pointing:
    """Of a peer of `sapo`: it says which fifth of the inputs of a seed has the largest sum."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def sample(self, seed: int, prompts: int, samples: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed % 2**63)
        p_PC = self._model(self._inputs(seed, prompts)).softmax(dim=1)
        return torch.multinomial(p_PC, samples, replacement=True, generator=rng).to(torch.uint8)[..., None]

    def rewards(self, seed: int, tokens_PGC: Tensor) -> Tensor:
        x = self._inputs(seed, len(tokens_PGC))
        right_P = torch.stack([part.sum(1) for part in x.tensor_split(5, dim=1)], dim=1).argmax(1)
        return (tokens_PGC[..., 0] == right_P[:, None]).float()

    def loss(self, groups: Sequence[Group]) -> Tensor:
        x = torch.stack([self._inputs(g.seed, g.prompt + 1)[-1] for g in groups])
        log_p_PC = self._model(x).log_softmax(dim=1)
        said_PG = torch.stack([g.tokens_GC[:, 0].long() for g in groups])
        advantage_PG = torch.stack([g.advantage_G for g in groups])
        return -(log_p_PC.gather(1, said_PG) * advantage_PG).mean()

    def _inputs(self, seed: int, n: int) -> Tensor:
        return torch.randn(n, 24, generator=torch.Generator().manual_seed(seed % 2**63))


def new_replica(config: dict[str, Any], peer: int, width: int = 211) -> Replica:
    found = Replica(config, peer, Net(width), batch_loss)
    if isinstance(found.strategy, Sapo):
        found.strategy.policy = Pointing(found.model)
    return found


Ledger = list[tuple[int, list[tuple[int, bytes]]]]
"""Rounds with (seed, payload) of what counted."""


def swarm(row: str, n_peers: int, width: int = 211) -> list[Replica]:
    return [new_replica(ROWS[row].config, peer, width) for peer in range(n_peers)]


def run(replicas: list[Replica], rounds: range, lost: dict[int, set[int]] | None = None) -> Ledger:
    return [(r, run_round(replicas, r, (lost or {}).get(r))) for r in rounds]


@dataclass(frozen=True)
class Trained:
    """What a swarm leaves behind: its ledger, and the replicas' fingerprint after each round."""

    ledger: Ledger
    prints: list[str]


@cache
def trained(row: str) -> Trained:
    """Three peers over six rounds, some offers of which are lost; with the kernels that a node takes."""
    lost = {2: {1}, 5: {0, 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("THINWIRE_KERNELS", raising=False)
        replicas = swarm(row, 3)
        ledger: Ledger = []
        prints = []
        for round_ in range(1, 7):
            ledger += run(replicas, range(round_, round_ + 1), lost)
            prints.append(replicas[0].print())
    return Trained(ledger, prints)


def replay(row: str, ledger: Ledger) -> str:
    """The fingerprint of a replica that only follows."""
    follower = new_replica(ROWS[row].config, peer=99)
    for round_, counted in ledger:
        follower.apply(round_, counted, None)
    return follower.print()


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


every_row = pytest.mark.parametrize("row", ROWS)


@every_row
@pytest.mark.parametrize("n_peers", [2, 5])
def test_replicas_stay_equal_when_offers_are_lost(row: str, n_peers: int) -> None:
    replicas = swarm(row, n_peers)
    lost = {2: {0}, 3: {n_peers - 1}, 4: set(range(1, n_peers)), 5: {0}}
    for round_ in range(1, 7):
        before = replicas[0].print()
        run_round(replicas, round_, lost.get(round_))
        prints = {r.print() for r in replicas}
        assert len(prints) == 1
        assert (before in prints) == ROWS[row].is_quiet(round_)


@every_row
def test_a_follower_ends_with_the_same_bits(row: str) -> None:
    assert replay(row, trained(row).ledger) == trained(row).prints[-1]


@every_row
def test_a_changed_option_acts_as_if_it_had_always_been_so(row: str) -> None:
    """Every option that a run may change: payloads look the same, and `apply` has the bits of a strategy that
    was built with it."""
    other: dict[str, Any] = {"lr": 5e-3, "weight_decay": 0.0, "max_grad_norm": 0.5, "clip": 2.0}
    other |= {"eps": 2e-3, "outer_lr": 0.3, "bound": 1.5, "own_data_share": 0.2}
    width = 24
    replicas = swarm(row, 2, width)
    changeable = replicas[0].strategy.facts.changeable
    changes = {name: other[name] for name in changeable}
    changed = new_replica(ROWS[row].config, 99, width)
    built = new_replica({**ROWS[row].config, **changes}, 99, width)
    fields = changed.strategy.fields()
    changed.strategy.change(changes)
    assert {name: changed.strategy.option(name) for name in changeable} == changes
    assert changed.strategy.fields() == fields
    for round_, counted in run(replicas, range(1, 3)):
        for follower in (changed, built):
            follower.apply(round_, counted, None)
    assert changed.print() == built.print()
    with pytest.raises(ConfigError, match=r"seed cannot change: lr, weight_decay"):
        changed.strategy.change({"seed": 3})
    with pytest.raises(ConfigError, match="lr = -1"):
        changed.strategy.change({"lr": -1})
    assert changed.strategy.option("lr") == changes["lr"]


@every_row
def test_many_rounds_at_once_end_with_the_same_bits(row: str, kernels: str) -> None:
    """Parameters and local state, pending sends included: one missed, one unknown to the caller."""
    ledger = trained(row).ledger
    one_by_one, together = swarm(row, 2)
    for r in (one_by_one, together):
        r.peer = 99
        r.offer(1)
        for round_, counted in ledger[:2]:
            r.apply(round_, counted, None)
        r.offer(3)
        r.offer(4)
    fates: list[Own] = ["missed", None, "counted", None]
    for (round_, counted), own in zip(ledger[2:], fates, strict=True):
        one_by_one.apply(round_, counted, own)
    together.strategy.apply_many(
        [together.read(*entry, own) for entry, own in zip(ledger[2:], fates, strict=True)]
    )
    assert one_by_one.print() == together.print() == trained(row).prints[-1]
    assert_same_bits(one_by_one.strategy.state_dict(), together.strategy.state_dict())
    together.strategy.apply_many([])
    assert one_by_one.print() == together.print()


@every_row
def test_threads_do_not_change_the_replica(row: str) -> None:
    ledger, prints = trained(row).ledger[:3], trained(row).prints
    with torch_threads(3):
        assert replay(row, ledger) == prints[2]


@every_row
def test_kernels_do_not_change_the_replica(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="the numba kernels are an extra")
    monkeypatch.setenv("THINWIRE_KERNELS", "torch")
    assert replay(row, trained(row).ledger[:3]) == trained(row).prints[2]


@every_row
def test_autocast_and_grad_mode_of_the_caller_do_not_matter(row: str) -> None:
    ledger, prints = trained(row).ledger[:2], trained(row).prints
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert replay(row, ledger) == prints[1]


@every_row
def test_propose_leaves_the_parameters_alone(row: str) -> None:
    (replica,) = swarm(row, 1)
    before = replica.print()
    replica.offer(1)
    assert replica.print() == before
    assert all(p.grad is None for p in replica.model.parameters())


# ------------------------------------------------------------------------------------------- state


def assert_same_bits(a: Any, b: Any) -> None:
    """Equal values, types and dtypes all the way down."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)) if a.ndim else a == b
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
    else:
        assert a == b


def restarted(replica: Replica) -> Replica:
    """A new process: parameters and the strategy's state come from disk."""
    file = io.BytesIO()
    torch.save({"model": replica.model.state_dict(), "strategy": replica.strategy.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = new_replica(replica.config, replica.peer, width=saved["model"]["b"].numel())
    other.model.load_state_dict(saved["model"])
    other.strategy.load_state_dict(saved["strategy"])
    return other


@every_row
def test_a_restart_in_the_middle_of_a_round_changes_nothing(row: str) -> None:
    """Saved after the offer of round 3 was sent and before its commit, which misses it."""
    uninterrupted, interrupted = swarm(row, 2), swarm(row, 2)
    for replicas in (uninterrupted, interrupted):
        run(replicas, range(1, 3))
        offers = [r.offer(3) for r in replicas]
        if replicas is interrupted:
            saved = [copy.deepcopy(r.strategy.state_dict()) for r in replicas]
            replicas[:] = [restarted(r) for r in replicas]
            assert_same_bits([r.strategy.state_dict() for r in replicas], saved)
        for r in replicas:
            r.apply(3, [(replicas[0].seed(3), offers[0])], "missed" if r.peer else "counted")
        run(replicas, range(4, 6))
    for a, b in zip(uninterrupted, interrupted, strict=True):
        assert a.print() == b.print()
        assert_same_bits(a.strategy.state_dict(), b.strategy.state_dict())


@every_row
def test_loaded_state_is_a_copy(row: str) -> None:
    first, second = swarm(row, 1)[0], swarm(row, 1)[0]
    first.offer(1)
    saved = copy.deepcopy(first.strategy.state_dict())
    second.strategy.load_state_dict(first.strategy.state_dict())
    first.apply(1, [], "missed")
    first.offer(2)
    assert_same_bits(second.strategy.state_dict(), saved)


@every_row
def test_a_replica_is_its_replicated_tensors(row: str) -> None:
    """A joiner copies them from a snapshot and follows; a node adds its local state before or after, and
    is what it was."""
    replicas, (joiner, early, late) = swarm(row, 2), swarm(row, 3)
    run(replicas, range(1, 4), {2: {1}})
    local = copy.deepcopy(replicas[0].strategy.local_state_dict())
    early.strategy.load_state_dict(local)
    for other in (joiner, early, late):
        names = list(other.strategy.replicated_tensors())
        assert names == sorted(names) == list(replicas[0].strategy.replicated_tensors())
        for name, t in replicas[0].strategy.replicated_tensors().items():
            with torch.no_grad():
                other.strategy.replicated_tensors()[name].copy_(t)
    late.strategy.load_state_dict(local)
    for other in (early, late):
        assert_same_bits(other.strategy.state_dict(), replicas[0].strategy.state_dict())
    counted = run_round(replicas, 4)
    for other in (joiner, early, late):
        other.apply(4, counted, None)
        assert other.print() == replicas[0].print()


@every_row
def test_a_replica_begins_again_at_the_base_weights(row: str) -> None:
    replicas = swarm(row, 2)
    ledger = run(replicas, range(1, 4))
    again, end = replicas[0], replicas[0].print()
    again.model.load_state_dict(Net().state_dict())
    again.strategy.begin()
    assert again.print() == swarm(row, 1)[0].print()
    for round_, counted in ledger:
        again.apply(round_, counted, None)
    assert again.print() == end


@every_row
def test_a_payload_has_as_many_bytes_as_stated(row: str) -> None:
    """29 of framing, more only for tensors shorter than usual; and what the compressor's docstring says."""
    (replica,) = swarm(row, 1)
    assert_stated_bytes(ROWS[row], replica, replica.offer(1), 1)


def assert_stated_bytes(row: Row, replica: Replica, data: bytes, round: int) -> None:
    fields = replica.strategy.fields(replica.turn(round))
    payload = replica.decode(data, round)
    body = sum(n_bytes_of(packed) for packed in payload.values())
    n_short = sum(
        t.numel() < f.n_elements for name in fields for t, f in zip(payload[name], fields[name], strict=True)
    )
    assert 29 + body <= len(data) <= 29 + body + 11 * n_short
    if row.n_bytes is None:
        assert has_compressors_bytes(replica, payload)
    else:
        assert body == row.n_bytes(replica.strategy)


def has_compressors_bytes(replica: Replica, payload: Payload) -> bool:
    """Whether every parameter's pack has the bytes that the compressor's docstring promises."""
    compressor = build_compressor(complete_config(replica.config)["compressor"])
    parts = {p.name: Part.whole(p.tensor.shape) for p in replica.strategy.parameters_in_order()}
    return all(has_expected_bytes(compressor, packed, parts[name]) for name, packed in payload.items())


# ------------------------------------------------------------------------------------------- bad payloads


def broken(row: Row, payload: Payload) -> Iterator[tuple[str, Payload]]:
    """Everything that can be wrong with the tensors of a payload, one at a time; the row's own in the end."""
    yield "no names", {}
    yield "an unknown name", {**payload, "intruder": next(iter(payload.values()))}
    for name, packed in payload.items():
        yield f"{name} missing", {n: p for n, p in payload.items() if n != name}
        yield f"{name} has a tensor less", {**payload, name: packed[:-1]}
        yield f"{name} has a tensor more", {**payload, name: (*packed, packed[0])}
        for i, t in enumerate(packed):
            for what, other in broken_tensors(t):
                yield f"{name}[{i}] {what}", {**payload, name: (*packed[:i], other, *packed[i + 1 :])}
    name, packed = next(iter(payload.items()))
    for what, bad in row.bad_packs(packed).items():
        yield f"{name} {what}", {**payload, name: bad}


def broken_tensors(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "of another type", t.to(torch.int64)
    yield "of two dimensions", t[None]
    yield "too long", torch.cat([t, t.new_ones(5000)])
    if t.is_floating_point():
        yield "with a NaN", torch.cat([t.new_full((1,), float("nan")), t[1:]])
        yield "with an infinity", torch.cat([t.new_full((1,), float("inf")), t[1:]])


@every_row
def test_check_refuses_what_is_wrong(row: str) -> None:
    (replica,) = swarm(row, 1)
    assert_refuses_what_is_wrong(ROWS[row], replica, replica.offer(1), 1)


def assert_refuses_what_is_wrong(row: Row, replica: Replica, data: bytes, round: int) -> None:
    turn, payload = replica.turn(round), replica.decode(data, round)
    replica.strategy.check(payload, turn)
    for what, bad in broken(row, payload):
        try:
            replica.strategy.check(bad, turn)
        except BadPayload:
            continue
        pytest.fail(f"accepted a payload with {what}")


def spoilt(row: str, replica: Replica, data: bytes, round: int) -> bytes:
    """The bytes of the payload with the first of the row's bad packs."""
    payload = dict(replica.decode(data, round))
    name = next(iter(payload))
    payload[name] = next(iter(ROWS[row].bad_packs(payload[name]).values()))
    return wire.encode(payload, replica.strategy.fields(replica.turn(round)), round, LAYOUT)


@every_row
def test_a_bad_payload_is_left_out_by_everybody(row: str) -> None:
    replicas, without = swarm(row, 3), swarm(row, 3)
    offers = [r.offer(1) for r in replicas]
    for r in without:
        r.offer(1)
    good = [(replicas[i].seed(1), offers[i]) for i in (0, 2)]
    bad = (replicas[1].seed(1), spoilt(row, replicas[1], offers[1], 1))
    for r, other in zip(replicas, without, strict=True):
        own: Own = "missed" if r.peer == 1 else "counted"
        r.apply(1, [good[0], bad, good[1]], own)
        other.apply(1, good, own)
    assert {r.print() for r in replicas} == {without[0].print()}
    run_round(replicas, 2)
    assert len({r.print() for r in replicas}) == 1


@every_row
def test_a_round_without_good_payloads_changes_nothing(row: str) -> None:
    (replica,) = swarm(row, 1)
    data = replica.offer(1)
    before = replica.print()
    replica.apply(1, [(replica.seed(1), spoilt(row, replica, data, 1))], "missed")
    assert replica.print() == before


# ------------------------------------------------------------------- every strategy with every compressor

WITH_COMPRESSOR: dict[str, dict[str, Any]] = {
    "decoupled": {**DECOUPLED, "sign": False},
    "diloco": {"name": "diloco", "lr": 3e-3, "inner_steps": 1, "mix": 0.5, "overlap": 1},
}


@pytest.mark.parametrize("compressor", small_compressors(), ids=name_of)
@pytest.mark.parametrize("strategy", WITH_COMPRESSOR)
def test_every_strategy_with_every_compressor(strategy: str, compressor: dict[str, Any]) -> None:
    assert_contract(Row({**WITH_COMPRESSOR[strategy], "compressor": compressor}), n_peers=2)


@pytest.mark.parametrize("compressor", [c for c in small_compressors() if c.get("bits", 4) == 4], ids=name_of)
@pytest.mark.parametrize("strategy", WITH_COMPRESSOR)
def test_four_peers_with_every_compressor(strategy: str, compressor: dict[str, Any]) -> None:
    assert_contract(Row({**WITH_COMPRESSOR[strategy], "compressor": compressor}), n_peers=4)


def assert_contract(row: Row, n_peers: int) -> None:
    """On a small model: bytes by the formula, what is wrong is refused, replicas are equal though offers are
    lost and a peer restarts with its state between its offer and the commit that misses it."""
    replicas = [new_replica(row.config, peer, width=13) for peer in range(n_peers)]
    lost = {2: {0}, 3: set(range(1, n_peers))}
    for round_ in range(1, 5):
        before = replicas[0].print()
        offers = [r.offer(round_) for r in replicas]
        if round_ == 1:
            assert_stated_bytes(row, replicas[0], offers[0], 1)
            assert_refuses_what_is_wrong(row, replicas[0], offers[0], 1)
        if round_ == 2:
            saved = copy.deepcopy(replicas[0].strategy.state_dict())
            replicas[0] = restarted(replicas[0])
            assert_same_bits(replicas[0].strategy.state_dict(), saved)
        missing = lost.get(round_, set())
        counted = [(r.seed(round_), offers[r.peer]) for r in replicas if r.peer not in missing]
        for r in replicas:
            r.apply(round_, counted, "missed" if r.peer in missing else "counted")
        prints = {r.print() for r in replicas}
        assert len(prints) == 1
        assert before not in prints


# ------------------------------------------------------------------------------------------- golden bytes


def golden_payloads(row: str) -> list[list[str]]:
    """Payloads per round, as hex. Making them is local work, which may differ between machines: they are
    committed. THINWIRE_WRITE_GOLDEN=1 makes them anew."""
    if os.environ.get("THINWIRE_WRITE_GOLDEN") == "1":
        replicas = swarm(row, 3, width=13)
        made = [[data.hex() for _, data in counted] for _, counted in run(replicas, range(1, 3))]
        known = json.loads(PAYLOADS.read_text()) if PAYLOADS.exists() else {}
        PAYLOADS.write_text(json.dumps({**known, row: made}, indent=0, sort_keys=True) + "\n")
    payloads: list[list[str]] = json.loads(PAYLOADS.read_text())[row]
    return payloads


@every_row
def test_golden(row: str, golden: Callable[[dict[str, str]], None], kernels: str) -> None:
    """`apply` of committed payloads gives the committed fingerprints, on any machine, with any kernels."""
    rounds = golden_payloads(row)
    replica, prints = new_replica(ROWS[row].config, peer=99, width=13), {}
    for round_, payloads in enumerate(rounds, start=1):
        shares = [(replica.seed(7 * i + round_), bytes.fromhex(p)) for i, p in enumerate(payloads)]
        replica.apply(round_, shares, None)
        prints[f"{row}, round {round_}"] = replica.print()
    golden(prints)
