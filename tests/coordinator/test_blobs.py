"""Blobs on the coordinator's disk."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.full_disk import full_disk
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.protocol.messages import BadMessage, digest_of


def blob(i: int, n_bytes: int = 100) -> bytes:
    return i.to_bytes(4, "big") * (n_bytes // 4)


def put(store: BlobStore, data: bytes) -> bytes:
    store.put(digest_of(data), data)
    return digest_of(data)


def test_what_is_put_can_be_read(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    data = blob(7, 4000)
    chunks = [data[i : i + 333] for i in range(0, len(data), 333)]
    assert store.put(digest_of(data), iter(chunks)) == len(data)
    assert store.read(digest_of(data)) == data
    assert store.size(digest_of(data)) == len(data) == store.n_bytes
    with store.open(digest_of(data)) as f:
        assert f.read(10) == data[:10]
    assert [p.name for p in tmp_path.iterdir()] == [digest_of(data).hex()]


def test_unknown_blobs_are_key_errors(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    assert digest_of(b"x") not in store
    assert store.size(digest_of(b"x")) is None
    with pytest.raises(KeyError):
        store.read(digest_of(b"x"))


def test_bytes_that_do_not_fit_the_digest_are_refused(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with pytest.raises(BadMessage, match="do not fit"):
        store.put(digest_of(b"right"), b"wrong")
    assert list(tmp_path.iterdir()) == []
    assert store.n_bytes == 0


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)

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
    store = BlobStore(tmp_path)
    put(store, blob(1))
    first, second = store.writer(digest_of(blob(2))), store.writer(digest_of(blob(2)))
    for writer in (first, second):
        writer.write(blob(2))
    assert first.finish() == second.finish() == 100
    put(store, blob(1))
    assert store.n_bytes == 200
    assert len(list(tmp_path.iterdir())) == 2


def test_a_blob_that_comes_twice_and_is_released_between_is_refused(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    first, second = store.writer(digest_of(blob(2))), store.writer(digest_of(blob(2)))
    for writer in (first, second):
        writer.write(blob(2))
    second.sync()
    first.finish()
    store.discard(digest_of(blob(2)))
    with pytest.raises(BadMessage, match="released"):
        second.finish()
    second.abort()
    assert (store.n_bytes, store.coming(digest_of(blob(2))), list(tmp_path.iterdir())) == (0, None, [])


def test_one_of_two_uploads_that_breaks_off_does_not_hide_the_other(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    first, second = store.writer(digest_of(blob(2))), store.writer(digest_of(blob(2)))
    first.write(blob(2))
    assert store.coming(digest_of(blob(2))) is first, "which has most"
    second.abort()
    assert store.coming(digest_of(blob(2))) is first
    assert first.finish() == 100
    assert store.coming(digest_of(blob(2))) is None


def test_an_upload_can_be_read_while_a_thread_gives_it_its_name(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        for i in range(10):
            writer = store.writer(digest_of(blob(i)), 100)
            writer.write(blob(i))
            syncing = pool.submit(writer.sync)
            while not syncing.done():
                with writer.open() as file:
                    assert file.read() == blob(i)
            writer.finish()


def test_an_upload_for_which_there_is_no_room_leaves_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    writer = store.writer(digest_of(blob(1)), 100)
    with full_disk(50):
        with pytest.raises(OSError, match="File too large"):
            writer.write(blob(1))
        with contextlib.suppress(OSError):
            writer.abort()
    assert (store.reserved_bytes, list(tmp_path.iterdir())) == (0, [])


def test_an_upload_that_is_synced_and_given_up_leaves_only_what_came_before(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    writer = store.writer(digest_of(blob(1)), 100)
    writer.write(blob(1))
    writer.sync()
    writer.abort()
    assert (store.reserved_bytes, list(tmp_path.iterdir())) == (0, [])
    put(store, blob(2))
    again = store.writer(digest_of(blob(2)))
    again.write(blob(2))
    again.sync()
    again.abort()
    assert store.read(digest_of(blob(2))) == blob(2)


def test_a_restart_finds_blobs_and_removes_leftovers(tmp_path: Path) -> None:
    digest = put(BlobStore(tmp_path), blob(1))
    (tmp_path / f"{digest.hex()}.0.part").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not ours")
    store = BlobStore(tmp_path)
    assert store.read(digest) == blob(1)
    assert store.n_bytes == 100
    assert {p.name for p in tmp_path.iterdir()} == {digest.hex(), "notes.txt"}


def test_what_is_released_is_gone(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    digests = [put(store, blob(i)) for i in range(6)]
    for round_, digest in enumerate(digests):
        store.mark_offered(digest, round_)
    for round_ in (1, 2, 3):
        store.mark_counted(digests[round_], round_)
    assert store.release(counted_to=2, offered_to=4) == 2
    assert [digest in store for digest in digests] == [False, False, False, True, False, True]
    assert store.n_bytes == 200
    assert len(list(tmp_path.iterdir())) == 2
    assert store.release(counted_to=2, offered_to=4) == 0
    assert store.release(counted_to=3, offered_to=5) == 3
    assert store.n_bytes == 0
    assert list(tmp_path.iterdir()) == []


def test_a_blob_used_again_is_as_new_as_its_last_round(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    counted, offered = put(store, blob(1)), put(store, blob(2))
    for digest in (counted, offered):
        store.mark_offered(digest, 1)
        store.mark_counted(digest, 1)
    store.mark_counted(counted, 9)
    store.mark_counted(counted, 5)  # no news
    store.mark_offered(offered, 9)
    store.release(counted_to=8, offered_to=8)
    assert counted in store
    assert offered in store
    store.release(counted_to=9, offered_to=9)
    assert store.n_bytes == 0


def test_the_run_s_own_are_never_released(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    own = put(store, blob(1000))
    store.mark_counted(own, 1)
    for _ in range(2):
        store.pin(own)
    store.release(counted_to=9, offered_to=9)
    assert own in store
    assert store.pinned_bytes == store.n_bytes == 100
    with pytest.raises(KeyError):
        store.pin(digest_of(b"x"))


def test_after_a_restart_what_nobody_marks_was_just_uploaded(tmp_path: Path) -> None:
    own, old, new = (put(BlobStore(tmp_path), blob(i)) for i in range(3))
    store = BlobStore(tmp_path)
    store.pin(own)
    store.mark_counted(old, 3)
    store.mark_rest(7)
    store.release(counted_to=3, offered_to=6)
    assert [digest in store for digest in (own, old, new)] == [True, False, True]
    store.release(counted_to=3, offered_to=7)
    assert [digest in store for digest in (own, old, new)] == [True, False, False]


def test_marks_of_what_is_not_here_do_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.mark_offered(digest_of(b"x"), 1)
    store.mark_counted(digest_of(b"x"), 1)
    assert store.release(counted_to=9, offered_to=9) == 0


def test_a_reader_keeps_what_is_released_meanwhile(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    digest = put(store, blob(1))
    store.mark_counted(digest, 1)
    with store.open(digest) as f:
        store.release(counted_to=1, offered_to=1)
        assert digest not in store
        assert f.read() == blob(1)
    assert put(store, blob(1)) in store, "it may come again"
