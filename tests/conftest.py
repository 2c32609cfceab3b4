"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[dict[str, str]], None]:
    """Compares hex strings with those committed in tests/golden/<module>.json.

    THINWIRE_WRITE_GOLDEN=1 writes them instead: only for a change of format with a new version number.
    """
    path = GOLDEN / f"{request.path.stem.removeprefix('test_')}.json"

    def compare(values: dict[str, str]) -> None:
        known = json.loads(path.read_text()) if path.exists() else {}
        if os.environ.get("THINWIRE_WRITE_GOLDEN") == "1":
            path.write_text(json.dumps({**known, **values}, indent=1, sort_keys=True) + "\n")
        else:
            assert values == {name: known.get(name) for name in values}

    return compare


@pytest.fixture(params=["torch", "numba"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with the plain torch kernels and with the numba ones (skipped where numba is missing)."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="the numba kernels are an extra")
    monkeypatch.setenv("THINWIRE_KERNELS", request.param)
    return str(request.param)
