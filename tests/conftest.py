"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.coordinator.identity import peer_id_of
from thinwire.coordinator.messages import PROTOCOL_VERSION, GenesisBody, LayoutEntry, Limits
from thinwire.coordinator.schedule import float32_bits

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


@pytest.fixture
def key() -> Ed25519PrivateKey:
    """The coordinator's key; the same in every test."""
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture
def make_genesis(key: Ed25519PrivateKey) -> Callable[..., GenesisBody]:
    """Record 0 of a small run as the coordinator reads it; arguments change its config and limits."""

    def make(
        *,
        rounds: int = 10,
        min_peers: int = 2,
        eval_every: int = 1000,
        policy: str = "all",
        max_peers: int = 8,
        max_payload_bytes: int = 2**20,
    ) -> GenesisBody:
        config = {
            "run": {
                "name": "test",
                "rounds": rounds,
                "min_peers": min_peers,
                "seed": 1,
                "eval_every": eval_every,
                "verify_every": 1,
            },
            "policy": {"name": policy},
            "schedule": {"name": "linear", "warmup_rounds": 2, "final_factor": 0.1},
            "network": {"heartbeat_s": 1.0},
            "strategy": {"name": "opaque to the coordinator"},
        }
        return GenesisBody(
            protocol=PROTOCOL_VERSION,
            config=json.dumps(config),
            layout=(LayoutEntry(name="w", shape=(4, 5), dtype="float32", init="zeros", scale=0.0),),
            base=None,
            held_out=None,
            corpus=None,
            limits=Limits(max_peers=max_peers, max_payload_bytes=max_payload_bytes, max_samples=1000),
            coordinator=peer_id_of(key.public_key()),
            lr_factor_bits=float32_bits(0.5),
            time_ms=1,
        )

    return make
