"""Identity files and peer ids, against hivemind's own reading of them where it has one."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import (
    is_signed_by,
    load_or_create,
    new_key,
    peer_id_of,
    public_key_of,
    save,
)

# Test vector of the libp2p specification (peer-ids.md): private key message and public key message.
_SPEC_PRIVATE = bytes.fromhex(
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)
_SPEC_PUBLIC = bytes.fromhex("080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")


def test_reads_the_specifications_key_file(tmp_path: Path) -> None:
    path = tmp_path / "id.key"
    path.write_bytes(_SPEC_PRIVATE)
    key = load_or_create(path)
    assert key.public_key().public_bytes_raw() == _SPEC_PUBLIC[4:]
    save(key, path)
    assert path.read_bytes() == _SPEC_PRIVATE


def test_peer_id_is_base58_of_the_public_key() -> None:
    base58 = pytest.importorskip("base58")  # comes with hivemind
    for _ in range(20):
        public = new_key().public_key()
        expected = base58.b58encode(bytes([0, 36, 8, 1, 18, 32]) + public.public_bytes_raw()).decode()
        assert peer_id_of(public) == expected
        assert expected.startswith("12D3Koo")
        assert public_key_of(expected) == public


def test_a_key_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "id.key"
    first = load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create(path).private_bytes_raw() == first.private_bytes_raw()
    assert [p.name for p in tmp_path.iterdir()] == ["id.key"]


@pytest.mark.parametrize("data", [b"", b"nonsense", _SPEC_PRIVATE[:-1], _SPEC_PRIVATE + b"\0"])
def test_a_file_that_is_no_key_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "id.key"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"id\.key"):
        load_or_create(path)


def test_halves_that_do_not_belong_together(tmp_path: Path) -> None:
    path = tmp_path / "id.key"
    path.write_bytes(_SPEC_PRIVATE[:-1] + bytes([_SPEC_PRIVATE[-1] ^ 1]))
    with pytest.raises(ConfigError, match="damaged"):
        load_or_create(path)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the identity"):
        load_or_create(tmp_path / "nowhere" / "id.key")


def test_signatures_belong_to_a_peer_id() -> None:
    key, other = new_key(), new_key()
    signature = key.sign(b"record")
    assert is_signed_by(peer_id_of(key.public_key()), signature, b"record")
    assert not is_signed_by(peer_id_of(key.public_key()), signature, b"recorD")
    assert not is_signed_by(peer_id_of(other.public_key()), signature, b"record")


@given(st.text(max_size=60) | st.text(alphabet="12D3KooW", min_size=52, max_size=52))
def test_what_is_no_peer_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        public_key_of(text)
