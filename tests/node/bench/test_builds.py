"""`thinwire bench --against` another build: where it comes from, and how figures are compared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from thinwire.compression.errors import ConfigError, ThinwireError
from thinwire.node.bench.builds import FOLDERS, Build, _figures, _ratio, other_build

ROOT = Path(__file__).parents[3]


def test_a_checkout_is_found_first() -> None:
    with other_build(str(ROOT)) as build:
        assert build.path is not None
        for folder in FOLDERS:
            assert (build.path / "thinwire" / folder).samefile(ROOT / folder)
        with pytest.raises(ThinwireError, match="nonsense"):
            build.run(["nonsense"])
    assert not build.path.exists()


def test_what_is_no_build(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compression is not there"), other_build(str(tmp_path)):
        pass
    with pytest.raises(ConfigError, match="no revision of"), other_build("no-such-revision"):
        pass


def test_commands_of_a_build_without_kernels(tmp_path: Path) -> None:
    with pytest.raises(ThinwireError, match="cannot be compiled"):
        Build("/bin/false", tmp_path).compile()


def test_what_a_build_prints_is_no_result() -> None:
    with pytest.raises(ThinwireError):
        Build(sys.executable, None).run(["noise", "--params", "12"])


def result(s: float, n: int) -> dict[str, list[dict[str, object]]]:
    timing = {"median_s": s, "min_s": s, "max_s": s, "cpu_s": 2 * s}
    return {"noise": [{"n_params": 5, "step": timing, "payload_n_bytes": n}]}


def test_pairs_are_compared_each_by_itself() -> None:
    """Theirs and ours, in weather that gets three times worse."""
    pairs = [(_figures(result(a, 8)), _figures(result(b, 4))) for a, b in ((1, 2), (3, 6), (2, 8))]
    step = _ratio("step", [(a["noise 5: step"], b["noise 5: step"]) for a, b in pairs])
    assert (step.theirs, step.ours, step.ratio, step.least, step.most, step.cpu_ratio) == (2, 6, 2, 2, 4, 2)
    n = _ratio("bytes", [(a["noise 5: payload_n_bytes"], b["noise 5: payload_n_bytes"]) for a, b in pairs])
    assert (n.ratio, n.cpu_ratio, n.is_time) == (0.5, None, False)
