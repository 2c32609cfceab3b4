"""Blobs on the coordinator's disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from thinwire.coordinator.blobs import PROTECTED_ROUNDS, BlobStore
from thinwire.coordinator.messages import BadMessage, digest_of


def blob(i: int, n_bytes: int = 100) -> bytes:
    return i.to_bytes(4, "big") * (n_bytes // 4)


def put(store: BlobStore, data: bytes) -> bytes:
    store.put(digest_of(data), data)
    return digest_of(data)


def test_what_is_put_can_be_read(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 10**6)
    data = blob(7, 4000)
    chunks = [data[i : i + 333] for i in range(0, len(data), 333)]
    assert store.put(digest_of(data), iter(chunks)) == len(data)
    assert store.read(digest_of(data)) == data
    assert store.size(digest_of(data)) == len(data) == store.n_bytes
    with store.open(digest_of(data)) as f:
        assert f.read(10) == data[:10]
    assert [p.name for p in tmp_path.iterdir()] == [digest_of(data).hex()]


def test_unknown_blobs_are_key_errors(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 10**6)
    assert digest_of(b"x") not in store
    assert store.size(digest_of(b"x")) is None
    with pytest.raises(KeyError):
        store.read(digest_of(b"x"))


def test_bytes_that_do_not_fit_the_digest_are_refused(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 10**6)
    with pytest.raises(BadMessage, match="do not fit"):
        store.put(digest_of(b"right"), b"wrong")
    assert list(tmp_path.iterdir()) == []
    assert store.n_bytes == 0


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 10**6)

    def broken() -> object:
        yield b"some"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        store.put(digest_of(b"some more"), broken())  # type: ignore[arg-type]
    writer = store.writer(digest_of(b"x"))
    writer.write(b"x")
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_the_same_blob_twice_is_one(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 10**6)
    put(store, blob(1))
    first, second = store.writer(digest_of(blob(2))), store.writer(digest_of(blob(2)))
    for writer in (first, second):
        writer.write(blob(2))
    assert first.finish() == second.finish() == 100
    put(store, blob(1))
    assert store.n_bytes == 200
    assert len(list(tmp_path.iterdir())) == 2


def test_a_restart_finds_blobs_and_removes_leftovers(tmp_path: Path) -> None:
    digest = put(BlobStore(tmp_path, 10**6), blob(1))
    (tmp_path / f"{digest.hex()}.0.part").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not ours")
    store = BlobStore(tmp_path, 10**6)
    assert store.read(digest) == blob(1)
    assert store.n_bytes == 100
    assert {p.name for p in tmp_path.iterdir()} == {digest.hex(), "notes.txt"}


def test_the_oldest_are_pruned_first(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 350)
    digests = [put(store, blob(i)) for i in range(5)]
    assert [digest in store for digest in digests] == [False, False, True, True, True]
    assert store.n_bytes == 300
    assert len(list(tmp_path.iterdir())) == 3


def test_age_survives_a_restart(tmp_path: Path) -> None:
    digests = [put(BlobStore(tmp_path, 10**6), blob(i)) for i in range(3)]
    store = BlobStore(tmp_path, 250)
    new = put(store, blob(9))
    assert [digest in store for digest in (*digests, new)] == [False, False, True, True]


def test_the_newest_rounds_and_the_run_s_own_are_never_pruned(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 350)
    own = put(store, blob(1000))
    store.pin(own)
    rounds = range(1, PROTECTED_ROUNDS + 11)
    digests = {}
    for round_ in rounds:
        digests[round_] = put(store, blob(round_))
        store.mark(digests[round_], round_)
    put(store, blob(2000))
    kept = [round_ for round_ in rounds if digests[round_] in store]
    assert kept == list(rounds)[-PROTECTED_ROUNDS:]
    assert own in store


def test_a_blob_used_again_is_as_new_as_its_last_round(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 150)
    digest = put(store, blob(1))
    store.mark(digest, 1)
    store.mark(digest, PROTECTED_ROUNDS + 5)
    put(store, blob(2))
    put(store, blob(3))
    assert digest in store


def test_a_reader_keeps_what_is_pruned_meanwhile(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 150)
    digest = put(store, blob(1))
    with store.open(digest) as f:
        put(store, blob(2))
        assert digest not in store
        assert f.read() == blob(1)
