"""What a node loads."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from thinwire.node.run_node import _without_scipy


def test_scipy_is_there_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "scipy.linalg", raising=False)
    with _without_scipy(), pytest.raises(ImportError):
        import_module("scipy.linalg")
    assert "scipy.linalg" not in sys.modules


def test_nobody_loses_a_scipy_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.linalg", sys)
    with _without_scipy():
        assert import_module("scipy.linalg") is sys
    assert sys.modules["scipy.linalg"] is sys
