"""A coordinator's service for a test, with any run's config."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.service_world import MakeWorld, World
from thinwire.coordinator.protocol.messages import GenesisBody


@pytest.fixture
def make_world(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey
) -> Iterator[MakeWorld]:
    worlds = []

    def make(**config: Any) -> World:
        worlds.append(World(tmp_path, make_genesis(**config), key))
        return worlds[-1]

    yield make
    for world in worlds:
        world.ledger.close()
