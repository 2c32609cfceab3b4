"""`thinwire bench NAME`: each takes what means something to it, and nothing else."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from thinwire.node.bench.arguments import Bench
from thinwire.node.bench.command import BENCHES, NOT_IN_ALL
from thinwire.node.cli.main import main

INNER = get_args(get_type_hints(Bench, include_extras=True)["which"])


def test_every_benchmark_has_a_command_of_its_name() -> None:
    names = {mark.name for kind in INNER for mark in kind.__metadata__}
    assert names == BENCHES.keys() | {"all", "attacks", "audits", "learning"}
    for kind in INNER:
        assert getattr(kind.__origin__, "name", None) in (None, kind.__metadata__[0].name)
    (everything,) = (kind.__origin__ for kind in INNER if kind.__metadata__[0].name == "all")
    said = set((everything.__doc__ or "").replace(",", " ").split())
    assert BENCHES.keys() & said == BENCHES.keys() - NOT_IN_ALL


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("round --params 1e6", "--params"),
        ("noise --rate 1Mbit", "--rate"),
        ("learning --attacks flipped", "--attacks"),
        ("audits --after 3", "--after"),
    ],
)
def test_what_another_one_takes_is_refused(line: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *line.split()])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("noise --params few", "--params few"),
        ("wire --params 3", "between 1e6 and 1e10"),
        ("peers --light few", "--light few"),
        ("round --seats 8", "8"),
        ("link --rate fast", "--rate fast"),
        ("step --rtt soon", "soon"),
        ("join --repeats 0", "--repeats 0"),
        ("attacks --strategies spas", "did you mean 'spsa'?"),
        ("attacks --attacks fliped", "did you mean 'flipped'?"),
        ("attacks --after -1", "--after -1"),
        ("audits --honest 0", "--honest 0"),
        ("learning --seeds 0", "--seeds 0"),
        ("learning --split x", "x"),
    ],
)
def test_what_it_takes_arrives_there(line: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *line.split()]) == 2
    assert why in capsys.readouterr().err
