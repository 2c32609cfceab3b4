"""`thinwire bench attacks`: what it prints, of swarms that are over after two rounds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import Here
from thinwire.compression.base import Part, Turn
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.errors import ConfigError
from thinwire.node.bench.attacks.bad_peers import ATTACKS, HONEST, OTHER_DATA
from thinwire.node.bench.attacks.contents import TensorContents
from thinwire.node.bench.attacks.honest import honest_rows
from thinwire.node.bench.attacks.swarm import STRATEGIES, Outcome, Plan, trained
from thinwire.node.bench.attacks.table import Wanted, is_meant, names_of, rows_of
from thinwire.node.bench.command import BENCHES

pytestmark = pytest.mark.usefixtures("one_core")

KEYS = {
    "strategy", "attack", "n_honest", "n_bad", "held_out_honest", "held_out_attacked", "ratio",
    "found_after_rounds", "ratios",
}  # fmt: skip


def test_a_list_of_rows_on_stdout_and_progress_on_stderr(here: Here) -> None:
    names = ("--strategies", "spsa,decoupled", "--attacks", "nan,max-probes")
    code, out, err = here("bench", "attacks", *names, "--rounds", "2", "--honest", "2", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["strategy"], row["attack"]) for row in rows] == [
        ("spsa", "nan"), ("spsa", "max-probes"), ("decoupled", "nan"),
    ]  # fmt: skip
    for row in rows:
        assert row.keys() == KEYS
        assert (row["n_honest"], row["n_bad"], row["found_after_rounds"]) == (2, 1, None)
        assert row["ratio"] == pytest.approx(row["held_out_attacked"] / row["held_out_honest"], rel=1e-4)
        assert row["ratios"] == [row["ratio"]]
    assert [row["ratio"] for row in rows if row["attack"] == "nan"] == [1.0, 1.0]
    assert len(err.splitlines()) == len(rows)


def test_a_table_for_people(here: Here) -> None:
    code, out, _ = here("bench", "attacks", "--strategies", "spsa", "--attacks", "scaled-10", "--rounds", "1")
    assert code == 0
    assert "scaled-10" in out
    assert "3 + 1" in out


def test_colluding_peers_are_two_and_the_honest_ones_as_many_more() -> None:
    wanted = Wanted(strategies=["spsa"], attacks=["colluding"], n_rounds=1, n_honest=2)
    (row,) = rows_of(wanted)
    assert (row.n_honest, row.n_bad) == (4, 2)


def test_a_flood_comes_later_and_has_a_dozen_names() -> None:
    plans = list[Plan]()

    def train(plan: Plan) -> Outcome:
        plans.append(plan)
        return Outcome(1.0, b"", {}, None)

    wanted = Wanted(strategies=["spsa"], attacks=["flood"], n_rounds=20)
    (row,) = rows_of(wanted, train)
    assert (row.n_honest, row.n_bad) == (3, 12)
    assert [(p.n_first, p.n_peers, p.joins_after) for p in plans] == [(3, 4, 12), (3, 15, 12)]
    assert len({p.config().to_json() for p in plans}) == 1, "or batches would differ"
    with pytest.raises(ConfigError, match="--rounds 12: the bad peers of flood join after 12"):
        list(rows_of(Wanted(strategies=["spsa"], attacks=["flood"], n_rounds=12), train))


def test_peers_that_join_later_train_from_then_on() -> None:
    late = replace(HONEST, identities=2, joins_after=2)
    outcome = trained(Plan(STRATEGIES["spsa"], late, 2, 1, 4, joins_after=2))
    alone = trained(Plan(STRATEGIES["spsa"], None, 2, 1, 4, joins_after=2))
    assert outcome.fingerprint != alone.fingerprint


def test_coordinates_of_ones_own_are_a_row_where_peers_select_them() -> None:
    """And what is sent there is what the honest payload has nothing of."""
    attack = ATTACKS["disjoint-coordinates"]
    meant = [name for name, options in STRATEGIES.items() if is_meant(attack, options)]
    assert meant == ["decoupled", "decoupled-without-sign", "diloco-sparse"]
    part, turn, compressor = Part.whole((8192,)), Turn(1, 2, 3, 1.0), TopK(k=8, bits=8)
    honest = compressor.pack(torch.arange(8192.0), part, turn)
    twisted = TensorContents(compressor, {"p": part}, turn, {"p": honest}).disjoint(2.0)
    one, other = (compressor.decode([p], [1.0], part, turn) for p in (honest, twisted["p"]))
    assert not (one * other).any()
    assert int((other != 0).sum()) == int((one != 0).sum()) == 16


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="--attacks fliped: did you mean 'flipped'"):
        names_of("scaled-10,fliped", list(ATTACKS), "--attacks")


def test_audits_of_honest_peers_are_counted_by_stage_and_by_data() -> None:
    """What is judged in the last rounds is seen by none of the next."""
    seen: list[Plan] = []

    def train(plan: Plan) -> Outcome:
        seen.append(plan)
        judged = [(9, 0, False), (10, 2, True), (11, 1, False), (12, 0, True), (12, 0, False)]
        return Outcome(1.0, b"", {}, None, judged)

    wanted = Wanted(strategies=["spsa"], attacks=[], n_rounds=12, n_seeds=2, n_honest=2, n_bad=1)
    rows = list(honest_rows(wanted, train))
    assert [(r.data, r.until, r.n_audits, r.n_failed) for r in rows] == [
        ("text", 10, 4, 2), ("text", 12, 6, 2), ("other", 10, 2, 2), ("other", 12, 0, 0),
    ]  # fmt: skip
    assert {plan.attack for plan in seen} == {HONEST, OTHER_DATA}
    assert all(plan.config().audits.rate == 1.0 for plan in seen)


@pytest.mark.parametrize(("found_after", "compared"), [(3, 8), (10, 15), (11, None), (None, None)])
def test_losses_are_compared_some_rounds_after_bad_peers_were_found(
    found_after: int | None, compared: int | None
) -> None:
    def train(plan: Plan) -> Outcome:
        assert (plan.n_rounds, plan.watched_from) == (15, 5)
        is_bad = plan.attack is not None
        losses = {round_: round_ + 0.5 * is_bad for round_ in range(5, 16)}
        return Outcome(20.0, b"", {}, found_after if is_bad else None, losses=losses)

    wanted = Wanted(strategies=["spsa"], attacks=["flipped"], n_rounds=10, after=5)
    (row,) = rows_of(wanted, train)
    assert row.held_out_honest == (compared or 20.0)
    assert row.held_out_attacked == (20.0 if compared is None else compared + 0.5)
    assert row.found_after_rounds == found_after


def test_losses_are_watched() -> None:
    outcome = trained(Plan(STRATEGIES["spsa"], None, 2, 1, 3, watched_from=1))
    assert sorted(outcome.losses) == [1, 2]
    assert outcome.loss_after(1) != outcome.loss_after(3) == outcome.loss_after(None) == outcome.held_out


def test_peers_with_other_data_train_on_them() -> None:
    outcome = trained(Plan(STRATEGIES["spsa"], OTHER_DATA, 2, 1, 2))
    assert outcome.fingerprint != trained(Plan(STRATEGIES["spsa"], HONEST, 2, 1, 2)).fingerprint


def test_it_is_no_measurement_of_this_machine() -> None:
    assert "attacks" not in BENCHES
