"""No peer moves the model by more than a small multiple of what a median peer does, whatever it sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinwire.compression.base import Compressor, Part, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.errors import ConfigError
from thinwire.compression.exact import to_float32
from thinwire.optim.base import Share, Strategy
from thinwire.optim.decoupled import Decoupled
from thinwire.optim.diloco import Diloco
from thinwire.optim.parts import byte_code
from thinwire.optim.parts.clip import Terms, bounded, lower_median, work_weights
from thinwire.optim.registry import build_strategy
from thinwire.optim.robust.weights import with_copies
from thinwire.optim.spsa import CODES, Spsa

TURN = Turn(1, 5, 6, 1.0)
N = 600
OWN = Terms(own_data_share=0.25)

Apply = Callable[[Sequence[Share]], Tensor]
"""What a round's shares do to zeros."""


def row(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * scale


def moved(strategy: Callable[[list[tuple[str, nn.Parameter]]], Strategy], shares: Sequence[Share]) -> Tensor:
    p = nn.Parameter(torch.zeros(20, 30))
    strategy([("p", p)]).apply(shares, TURN, None)
    return -p.detach().flatten()


class Vectors:
    """A strategy that sends vectors: outer rate 1, no momentum; without sign it moves by the mean itself."""

    def __init__(self, compressor: Compressor, kind: str, **options: Any) -> None:
        self.compressor, self.kind = compressor, kind
        self.options = {"bound": 2.0, **options}

    def share(self, values: Tensor, n_samples: int = 1, **claims: Any) -> Share:
        packed = self.compressor.pack(values, Part.whole((20, 30)), TURN)
        return Share(7, n_samples, {"p": packed}, **claims)

    def __call__(self, shares: Sequence[Share], **options: Any) -> Tensor:
        wanted = {"compressor": self.compressor, **self.options, **options}
        if self.kind == "diloco":
            return moved(lambda p: Diloco(p, outer_lr=1.0, outer_momentum=0.0, **wanted), shares)
        sign = self.kind == "sign"
        return moved(lambda p: Decoupled(p, lr=1.0, sign=sign, **wanted), shares)


UNSIGNED = {
    "decoupled dense": Vectors(Dense(), "plain"),
    "decoupled topk": Vectors(TopK(k=60, group_size=200, bits=8), "plain"),
    "decoupled dct": Vectors(DctTopK(k=60, group_size=200, bits=8), "plain"),
    "diloco dense": Vectors(Dense(), "diloco"),
    "diloco sparse": Vectors(TopK(k=60, group_size=200, bits=8), "diloco"),
}
SPARSE = Vectors(TopK(k=60, group_size=200, bits=8), "diloco", mean="senders", sender_floor=0.25)
SIGNED = {
    "dense": Vectors(Dense(), "sign"),
    "dct": Vectors(DctTopK(k=60, group_size=200, bits=8), "sign"),
    "senders": Vectors(TopK(k=200, group_size=200, bits=8), "sign", mean="senders"),
}

unsigned = pytest.mark.parametrize("name", UNSIGNED)
signed = pytest.mark.parametrize("name", SIGNED)


# ------------------------------------------------------------------------------------------- the rules


def claims(n: int, copies: Sequence[int] = (), own: Sequence[int] = ()) -> list[Share]:
    """`copies`: which have one payload; `own`: which have their own data."""
    return [Share(i, 1, {}, own_data=i in own, n_copies=len(copies) if i in copies else 1) for i in range(n)]


def test_medians_are_lower_ones_of_those_that_sent_something() -> None:
    assert lower_median([3.0, 1.0, 2.0]) == 2.0
    assert lower_median([4.0, 1.0, 2.0, 3.0]) == 2.0
    assert lower_median([0.0, 5.0, 0.0, 7.0]) == 5.0
    assert lower_median([0.0]) == lower_median([]) == 0.0


def test_copies_count_as_one_in_a_median() -> None:
    """Three copies of something enormous against two that are honest."""
    assert lower_median([1e9, 1e9, 1e9, 1.0, 2.0]) == 1e9
    assert lower_median([1e9, 1e9, 1e9, 1.0, 2.0], claims(5, copies=(0, 1, 2))) == 2.0


def test_payloads_are_scaled_down_never_up() -> None:
    assert bounded([1.0, 1.0, 1.0, 8.0, 0.0, 0.1], claims(6), 2.0) == (1.0, 1.0, 1.0, 0.25, 1.0, 1.0)
    assert bounded([0.0, 0.0], claims(2), 2.0) == (1.0, 1.0)


def test_work_counts_up_to_twice_its_lower_median() -> None:
    assert work_weights([10.0, 10.0, 12.0, 2.0**20], claims(4)) == [10.0, 10.0, 12.0, 20.0]
    assert work_weights([6.0, 6.0, 6.0], claims(3, copies=(0, 2))) == [3.0, 6.0, 3.0]


def test_own_data_weighs_a_share_of_all_at_most() -> None:
    weights = work_weights([1.0] * 4, claims(4, own=(0, 1)), OWN)
    assert weights == pytest.approx([1 / 3, 1 / 3, 1.0, 1.0])
    assert sum(weights[:2]) / sum(weights) == pytest.approx(0.25)
    assert work_weights([1.0] * 5, claims(5, own=(0,)), OWN) == [1.0] * 5  # a fifth of all
    assert work_weights([1.0, 1.0], claims(2, own=(0, 1)), OWN) == [0.0, 0.0]  # nobody else is there


def test_newcomers_weigh_less_where_half_of_the_weight_is_of_others() -> None:
    def weights(
        n: int, new: Sequence[int], copies: Sequence[int] = (), own: Sequence[int] = ()
    ) -> list[float]:
        offers = [replace(c, is_new=i in new) for i, c in enumerate(claims(n, copies, own))]
        return work_weights([1.0] * n, offers, replace(OWN, newcomers=0.25))

    assert weights(4, new=(3,)) == [1.0, 1.0, 1.0, 0.25]
    assert weights(4, new=(2, 3)) == [1.0, 1.0, 0.25, 0.25]
    assert weights(4, new=(1, 2, 3)) == weights(4, new=range(4)) == [1.0] * 4
    assert weights(6, new=(1, 2, 3, 4), copies=(1, 2, 3, 4)) == [1.0, *[0.0625] * 4, 1.0], "one payload"
    assert weights(4, new=(3,), own=(3,)) == [1.0, 1.0, 1.0, 0.25]
    offers = [replace(c, is_new=c.seed >= 2) for c in claims(4, own=(3,))]
    assert work_weights([1.0] * 4, offers) == [1.0] * 4, "as in older runs"
    assert work_weights([1.0] * 4, offers, Terms(newcomers=0.25)) == [1.0, 1.0, 0.25, 1.0]
    offers = [replace(c, is_new=c.seed > 0) for c in claims(4, own=(0, 3))]
    assert work_weights([1.0] * 4, offers, Terms(newcomers=0.25)) == [1.0] * 4, "nobody is known"


NEW = Terms(own_data_share=0.25, newcomers=0.1, newcomers_share=0.125)


def test_any_number_of_newcomers_weighs_a_share_of_all() -> None:
    def weights(n: int, new: Sequence[int], own: Sequence[int] = ()) -> list[float]:
        return work_weights(
            [1.0] * n, [replace(c, is_new=i in new) for i, c in enumerate(claims(n, (), own))], NEW
        )

    assert weights(4, new=(3,)) == [1.0, 1.0, 1.0, 0.1]
    assert weights(4, new=(3,), own=(3,)) == [1.0, 1.0, 1.0, 0.1]
    found = weights(53, new=range(3, 53))
    assert sum(found[3:]) / sum(found) == pytest.approx(0.125)
    assert weights(4, new=range(4)) == [1.0] * 4, "nobody else is there"
    assert sum(weights(4, new=(1, 2, 3))[1:]) == pytest.approx(1 / 7)


def test_medians_are_those_of_who_is_known() -> None:
    offers = [replace(c, is_new=i >= 3) for i, c in enumerate(claims(9))]
    norms = [1.0, 2.0, 3.0, *[1e9] * 6]
    assert lower_median(norms, offers) == 1e9
    assert lower_median(norms, offers, NEW) == 2.0
    assert lower_median([0.0] * 3 + [5.0] * 6, offers, NEW) == 5.0, "they have sent nothing"
    assert bounded(norms, offers, 1.25, NEW) == (1.0, 1.0, 2.5 / 3.0, *[2e-9] * 6), "one median for them"
    assert work_weights(norms, offers, NEW)[:3] == [1.0, 2.0, 3.0]
    failed = [replace(c, is_new=False, has_failed=i >= 3) for i, c in enumerate(offers)]
    assert lower_median(norms, failed, NEW) == 2.0
    assert work_weights([1.0] * 9, failed, NEW) == [1.0] * 3 + [0.0] * 6
    assert work_weights([1.0] * 9, failed) == [1.0] * 3 + [0.0] * 6


# ------------------------------------------------------------------------------------------- vectors


def test_offers_that_hold_nothing_do_not_shorten_steps_by_signs() -> None:
    apply = Vectors(TopK(k=20, group_size=200, bits=8), "sign", lr_scale="rule", newcomers_share=0.125)
    shares = [apply.share(row(i)) for i in range(2)]
    nothing = [apply.share(row(2, 0.0)) for _ in range(3)]
    assert torch.equal(apply([*shares, *nothing]), apply(shares))
    assert float(apply([*shares, apply.share(row(2))]).abs().max()) < float(apply(shares).abs().max())


MEANS = [(name, "mean") for name in UNSIGNED]
ROBUST = [("decoupled dense", kind) for kind in ("trimmed", "median", "vote", "centred")]


@pytest.mark.parametrize(("name", "aggregate"), [*MEANS, *ROBUST])
def test_fifty_newcomers_move_less_than_one_peer_of_three(name: str, aggregate: str) -> None:
    apply, options = UNSIGNED[name], {"newcomers": 0.1, "newcomers_share": 0.125, "aggregate": aggregate}
    known = [apply.share(row(i)) for i in range(3)]
    honest = apply(known, **options)
    flood = [apply.share(row(0, -1e3), is_new=True) for _ in range(50)]
    moved_by = float((apply([*known, *flood], **options) - honest).norm())
    of_one = float((apply(known[1:], **options) - honest).norm())
    assert moved_by < of_one


@unsigned
def test_a_single_offer_counts_as_without_a_bound(name: str) -> None:
    """To the last bit; and so do offers of which none is beyond the bound."""
    apply = UNSIGNED[name]
    for shares in ([apply.share(row(1))], [apply.share(row(i), 3) for i in range(3)]):
        assert torch.equal(apply(shares), apply(shares, bound=0.0))
        assert apply(shares).any()


@signed
def test_with_sign_offers_within_the_bound_count_as_without(name: str) -> None:
    apply = SIGNED[name]
    shares = [apply.share(row(i)) for i in range(3)]
    assert torch.equal(apply(shares), apply(shares, bound=0.0))


@unsigned
@pytest.mark.parametrize("scale", [10.0, 1e3, 1e9])
def test_an_enormous_offer_moves_the_model_by_two_honest_ones(name: str, scale: float) -> None:
    """The same values are never a copy when their scale is another; all four keep their weight."""
    apply = UNSIGNED[name]
    honest, bad = row(1), row(2)
    shares = [*(apply.share(honest * s) for s in (1.0, 1.0001, 0.9999)), apply.share(bad * scale)]
    found = apply(shares)
    without = apply([*shares[:3], apply.share(bad * 0.0)])
    twice = apply([apply.share(bad * 2)]) / 4
    norm = float(twice.abs().sum())
    assert float((found - without).abs().sum()) <= 1.1 * norm
    if "dct" not in name:  # which rounds what it decodes
        assert torch.allclose(found, without + twice, atol=0.02 * float(twice.abs().max()), rtol=0.1)


def test_over_senders_whatever_nobody_else_sends_grows_by_the_floor_alone() -> None:
    """Eight honest peers send the first half, a ninth the second: at twice their norm, and at a quarter of
    the round's weight instead of its ninth. What they send is their mean, as if it were not there."""
    first, second = torch.zeros(N), torch.zeros(N)
    first[: N // 10], second[N // 2 : N // 2 + N // 10] = row(1)[: N // 10], row(2)[: N // 10]
    shares = [SPARSE.share(first * (1 + i / 1000)) for i in range(8)]
    honest, found = SPARSE(shares), SPARSE([*shares, SPARSE.share(second * 1e6)])
    assert torch.equal(found[: N // 2], honest[: N // 2])
    bad, one = float(found[N // 2 :].abs().sum()), float(honest.abs().sum())
    assert bad == pytest.approx(2 * one / 9 / 0.25, rel=0.02)
    unbounded = SPARSE([*shares, SPARSE.share(second * 2)], bound=0.0, sender_floor=0.01)
    assert float(unbounded[N // 2 :].abs().sum()) > 8 * one / 9


def test_over_senders_one_that_is_scaled_down_keeps_its_weight() -> None:
    shares = [SPARSE.share(row(1) * s) for s in (1.0, 1.0001, 0.9999, -1e6)]
    torch.testing.assert_close(SPARSE(shares), SPARSE(shares[:1]) / 4, rtol=0.02, atol=0.01)


@signed
def test_with_sign_a_flipped_offer_decides_nothing_by_its_scale(name: str) -> None:
    """Against three that agree: without a bound every sign is the other one's."""
    apply = SIGNED[name]
    shares = [*(apply.share(row(1) * s) for s in (1.0, 1.0001, 0.9999)), apply.share(row(1) * -1e6)]
    honest = apply(shares[:3])
    assert (apply(shares, bound=0.0) == honest).float().mean() < 0.05
    assert (apply(shares) == honest).float().mean() > 0.98


@unsigned
def test_samples_count_up_to_twice_the_median(name: str) -> None:
    apply = UNSIGNED[name]
    values = [row(1), row(2), row(3), row(4)]
    by_samples = {} if name.startswith("diloco") else {"weights": "samples"}
    most = apply([apply.share(v, n) for v, n in zip(values, (4, 4, 4, 2**20), strict=True)], **by_samples)
    twice = apply([apply.share(v, n) for v, n in zip(values, (4, 4, 4, 8), strict=True)], **by_samples)
    assert torch.equal(most, twice)


@unsigned
def test_copies_share_one_weight(name: str) -> None:
    """Two honest peers and one payload that four have sent: it counts once."""
    apply = UNSIGNED[name]
    a, b, c = (apply.share(row(i)) for i in range(3))
    copied = with_copies([a, b, c, c, c, c], [b"a", b"b", b"c", b"c", b"c", b"c"])
    assert [s.n_copies for s in copied] == [1, 1, 4, 4, 4, 4]
    torch.testing.assert_close(apply(copied), apply([a, b, c]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(apply(copied, bound=0.0), apply([a, b, c]), rtol=1e-2)


@unsigned
def test_peers_with_their_own_data_are_a_quarter_of_a_round_at_most(name: str) -> None:
    apply = UNSIGNED[name]
    values = [row(i) for i in range(3)]
    shares = [apply.share(v, own_data=i == 2) for i, v in enumerate(values)]
    found, alone = apply(shares, own_data_share=0.25), [apply([apply.share(v)]) for v in values]
    expected = 0.375 * alone[0] + 0.375 * alone[1] + 0.25 * alone[2]
    if "dct" not in name:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    only = [apply.share(values[0], own_data=True)]
    assert not apply(only, own_data_share=0.25).any(), "as in older runs"
    assert torch.equal(apply(only, own_data_share=0.25, own_data_alone=True), apply(only))
    assert torch.equal(apply(shares, own_data_share=0.25, own_data_alone=True), found)
    assert apply(only).any()


@unsigned
def test_of_one_and_one_the_smaller_sets_the_limit(name: str) -> None:
    """Nobody wrecks such a run, but either one can slow it down."""
    apply = UNSIGNED[name]
    honest, enormous, tiny = (apply.share(row(i, scale)) for i, scale in ((1, 1.0), (2, 1e6), (3, 1e-6)))
    alone = float(apply([honest]).abs().sum())
    assert float(apply([honest, enormous]).abs().sum()) < 1.6 * alone
    assert float(apply([honest, tiny]).abs().sum()) < 2e-6 * alone


@unsigned
def test_of_two_and_one_neither_enormous_nor_tiny_offers_do_harm(name: str) -> None:
    apply = UNSIGNED[name]
    honest = [apply.share(row(i)) for i in range(2)]
    alone = apply(honest)
    length = float(alone.norm())
    for scale, most in ((1e6, 2.1), (1e-6, 0.35)):
        found = apply([*honest, apply.share(row(3, scale))])
        assert float((found - alone * 2 / 3).norm()) < most * length
        assert float(torch.dot(found, alone)) > 0.5 * length * length


def test_what_became_of_each_share_can_be_read() -> None:
    p = nn.Parameter(torch.zeros(20, 30))
    strategy = Decoupled([("p", p)], compressor=Dense(), bound=2.0)
    assert strategy.weighing is None
    same = torch.ones(N)
    values = [same, same * 0.5, same * 1.5, same * 8, same * 0]
    strategy.apply([Share(i, 1, {"p": (v,)}) for i, v in enumerate(values)], TURN, None)
    assert strategy.weighing is not None
    assert strategy.weighing.sizes == (1.0, 0.5, 1.5, 8.0, 0.0)
    assert strategy.weighing.kept == (1.0, 1.0, 1.0, 0.25, 1.0)
    assert strategy.weighing.dilution == to_float32(4.25 / 5)


# ------------------------------------------------------------------------------------------- probes


def probes(seed: int, gs: Sequence[float], **claims: Any) -> Share:
    codes = [byte_code.encode(g, 0) for g in gs]
    return Share(seed, len(gs), {CODES: (torch.tensor(codes, dtype=torch.uint8),)}, **claims)


def spsa(shares: Sequence[Share], **options: Any) -> Tensor:
    wanted = {"lr": 1.0, "bound": 2.0, "clip": 4.0, **options}
    return moved(lambda p: Spsa(p, **wanted), shares)


@pytest.mark.parametrize("scale", ["mean", "sqrt"])
def test_probes_within_the_bound_count_as_without(scale: str) -> None:
    shares = [probes(s, [1.0, -2.0, 0.5, 0.0]) for s in (1, 2, 3)]
    assert torch.equal(spsa(shares, scale=scale), spsa(shares, scale=scale, bound=0.0))
    assert torch.equal(spsa(shares[:1], scale=scale), spsa(shares[:1], scale=scale, bound=0.0))


def test_g_counts_up_to_clip_times_the_median_of_the_peers_medians() -> None:
    honest = [probes(s, [1.0, -1.0, 2.0]) for s in (1, 2, 3)]
    enormous, four = probes(4, [2.0**15, -(2.0**15), 2.0**15]), probes(4, [4.0, -4.0, 4.0])
    assert torch.equal(spsa([*honest, enormous]), spsa([*honest, four]))


def test_many_enormous_probes_do_not_set_the_median_that_clips_them() -> None:
    """A peer with more probes than all others weighs as twice the median peer: here as 6 of its 300."""
    honest = [probes(s, [1.0, -1.0, 2.0]) for s in (1, 2, 3)]
    many = probes(4, [2.0**15] * 300)
    found, without = spsa([*honest, many], max_probes=300), spsa(honest)
    expected = spsa([probes(4, [4.0] * 300)], max_probes=300) * 6 / 15 + without * 9 / 15
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float(spsa([*honest, many], max_probes=300, bound=0.0).abs().mean()) > 1e3 * float(
        found.abs().mean()
    )


@pytest.mark.parametrize("scale", ["mean", "sqrt"])
def test_peers_weigh_as_their_probes_up_to_twice_the_median(scale: str) -> None:
    share = [probes(1, [1.0] * 4), probes(2, [1.0] * 4), probes(3, [1.0] * 64)]
    root = {"mean": 16.0, "sqrt": 4.0}[scale]
    sums = [spsa([s], max_probes=64) * n for s, n in zip(share, (4, 4, 64), strict=True)]
    expected = (sums[0] + sums[1] + sums[2] / 8) / root
    torch.testing.assert_close(spsa(share, scale=scale), expected, rtol=1e-4, atol=1e-5)


def test_with_one_and_one_the_smaller_g_sets_the_limit() -> None:
    found = spsa([probes(1, [1.0] * 4), probes(2, [2.0**15] * 4)])
    assert torch.equal(found, spsa([probes(1, [1.0] * 4), probes(2, [4.0] * 4)]))
    assert float(spsa([probes(1, [1.0] * 4), probes(2, [2.0**-15] * 4)]).abs().max()) < 1e-3
    two = [probes(1, [1.0] * 4), probes(3, [1.0] * 4)]
    deflated = spsa([*two, probes(2, [2.0**-15] * 4)])
    torch.testing.assert_close(deflated, spsa(two) * 2 / 3, rtol=1e-3, atol=1e-3)


def test_codes_are_copies_only_along_the_same_directions() -> None:
    codes = [1.0, -2.0]
    shares = [probes(1, codes, n_copies=2), probes(2, codes, n_copies=2), probes(3, [4.0, 0.25])]
    plain = [probes(1, codes), probes(2, codes), probes(3, [4.0, 0.25])]
    assert torch.equal(spsa(shares), spsa(plain))
    once = [plain[0], plain[2]]
    found = spsa(shares, shared_noise=True)
    torch.testing.assert_close(found, spsa(once, shared_noise=True), rtol=1e-5, atol=1e-6)


def test_own_data_of_probes() -> None:
    shares = [probes(1, [1.0] * 4), probes(2, [1.0] * 4), probes(3, [1.0] * 4, own_data=True)]
    a, b, c = (spsa([s]) for s in shares)
    found = spsa(shares, own_data_share=0.25)
    torch.testing.assert_close(found, 0.375 * a + 0.375 * b + 0.25 * c, rtol=1e-4, atol=1e-5)
    assert not spsa(shares[2:], own_data_share=0.25).any()
    assert torch.equal(spsa(shares[2:], own_data_share=0.25, own_data_alone=True), c)


# ------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("bound", [0.5, -1.0, float("nan"), True])
def test_a_bound_is_none_or_one_at_least(bound: float) -> None:
    with pytest.raises(ConfigError, match="bound = "):
        build_strategy({"name": "spsa", "lr": 1.0, "bound": bound}, [("p", nn.Parameter(torch.zeros(1)))])
