"""`thinwire bench attacks`: what it prints, of swarms that are over after two rounds."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Here
from thinwire.compression.errors import ConfigError
from thinwire.node.bench.attacks.bad_peers import ATTACKS
from thinwire.node.bench.attacks.swarm import trained
from thinwire.node.bench.attacks.table import Wanted, names_of, rows_of
from thinwire.node.bench.command import BENCHES

pytestmark = pytest.mark.usefixtures("one_core")

KEYS = {
    "strategy", "attack", "n_honest", "n_bad", "held_out_honest", "held_out_attacked", "ratio",
    "found_after_rounds",
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
    assert [row["ratio"] for row in rows if row["attack"] == "nan"] == [1.0, 1.0]
    assert len(err.splitlines()) == len(rows)


def test_a_table_for_people(here: Here) -> None:
    code, out, _ = here("bench", "attacks", "--strategies", "spsa", "--attacks", "scaled-10", "--rounds", "1")
    assert code == 0
    assert "scaled-10" in out
    assert "3 + 1" in out


def test_colluding_peers_are_two_and_the_honest_ones_as_many_more() -> None:
    wanted = Wanted(strategies=["spsa"], attacks=["colluding"], n_rounds=1, n_honest=2)
    (row,) = rows_of(wanted, trained, progress=lambda _row: None)
    assert (row.n_honest, row.n_bad) == (4, 2)


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="--attacks fliped: did you mean 'flipped'"):
        names_of("scaled-10,fliped", list(ATTACKS), "--attacks")


def test_it_is_no_measurement_of_this_machine() -> None:
    assert "attacks" not in BENCHES
