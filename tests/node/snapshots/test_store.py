"""Snapshots on disk: whole ones or none, whatever happens while they are written, downloaded or removed."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from thinwire.compression.errors import ReplicaDiverged
from thinwire.coordinator.protocol.messages import digest_of, encode_record
from thinwire.node.snapshots import store as stores
from thinwire.node.snapshots.format import CHUNK_BYTES, Stored, max_manifest_bytes
from thinwire.node.snapshots.local_state import BadLocalState, LocalState
from thinwire.node.snapshots.store import READING_S, SnapshotStore

RUN = bytes(range(32))
N_ELEMENTS = CHUNK_BYTES // 4
"""float32 values that fill a chunk."""


def tensors(value: float, n_chunks: float = 2.5) -> dict[str, Tensor]:
    n = int(N_ELEMENTS * n_chunks)
    return {"b": torch.arange(n, dtype=torch.float32) + value, "a": torch.tensor([[value]])}


def write(store: SnapshotStore, round: int, local: LocalState | None = None, n_chunks: float = 2.5) -> Stored:
    return store.write(
        tensors(round, n_chunks),
        round=round,
        commit=bytes([round]) * 32,
        fingerprint=bytes([round]) * 8,
        local=local,
    )


def rounds(store: SnapshotStore) -> list[int]:
    return [stored.round for stored in store.stored()]


def only_folder(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def read(store: SnapshotStore, digest: bytes) -> bytes:
    file, n_bytes = store.open(digest)
    data = file.read()
    assert len(data) == n_bytes
    return data


def assert_round(store: SnapshotStore, stored: Stored, n_chunks: float = 2.5) -> None:
    manifest, found = store.load(stored)
    assert (manifest.round, manifest.commit) == (stored.round, bytes([stored.round]) * 32)
    assert {n: torch.equal(t, found[n]) for n, t in tensors(stored.round, n_chunks).items()} == {
        "a": True,
        "b": True,
    }


def test_what_is_written_can_be_read_before_and_after_a_restart(tmp_path: Path) -> None:
    local = LocalState(10, {"state": {0: {"momentum": torch.ones(3)}}})
    first = SnapshotStore(tmp_path, RUN)
    written = [write(first, 20), write(first, 10, local)]
    for store in (first, SnapshotStore(tmp_path, RUN)):
        assert store.stored() == [written[1], written[0]]
        for stored in store.stored():
            assert_round(store, stored)
        found = store.local(written[1])
        assert found is not None
        assert torch.equal(found.strategy["state"][0]["momentum"], torch.ones(3))
        assert store.local(written[0]) is None
    assert sorted(p.name[:10] for p in tmp_path.iterdir()) == ["0000000010", "0000000020"]


def test_every_peer_writes_the_same(tmp_path: Path) -> None:
    stores = [SnapshotStore(tmp_path / name, RUN) for name in "ab"]
    a, b = (write(store, 5, LocalState(5, {"x": i})) for i, store in enumerate(stores))
    assert a == b
    assert a.n_bytes == len(read(stores[0], a.manifest)) + stores[0].load(a)[0].n_bytes


def test_the_oldest_are_pruned_but_not_one_that_is_being_downloaded(tmp_path: Path) -> None:
    now_s = 0.0
    store = SnapshotStore(tmp_path, RUN, keep=2, clock=lambda: now_s)
    first, second = (write(store, r, n_chunks=0.1) for r in (1, 2))
    write(store, 3, n_chunks=0.1)
    assert rounds(store) == [2, 3]
    with pytest.raises(KeyError):
        store.open(first.manifest)
    store.open(second.manifest)
    for r in (4, 5):
        store.open(write(store, r, n_chunks=0.1).manifest)
    assert rounds(store) == [2, 4, 5]
    now_s = READING_S + 1
    write(store, 6, n_chunks=0.1)
    assert rounds(store) == [5, 6] == rounds(SnapshotStore(tmp_path, RUN))
    late = write(store, 1, n_chunks=0.1)  # downloaded, or made again: not pruned at once
    assert late in store.stored()


def test_manifests_and_chunks_are_served_and_stay_readable_when_pruned(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, RUN, keep=1)
    stored = write(store, 1)
    manifest, _ = store.load(stored)
    assert len(manifest.chunks) == 3
    data = (only_folder(tmp_path) / "data.safetensors").read_bytes()
    assert b"".join(read(store, digest) for digest in manifest.chunks) == data
    file, n_bytes = store.open(manifest.chunks[2])
    write(store, 2)
    assert store.stored()[-1].round == 2
    store.discard(stored)
    assert file.read() == data[2 * CHUNK_BYTES :]
    assert n_bytes == len(data) - 2 * CHUNK_BYTES
    for digest in (stored.manifest, manifest.chunks[0], bytes(32)):
        with pytest.raises(KeyError):
            store.open(digest)


def test_what_a_later_snapshot_differs_from_is_the_newest_one_here_of_its_length(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, RUN, keep=3)
    manifests = [
        store.load(write(store, round_, n_chunks=n))[0] for round_, n in ((1, 2.5), (2, 2.5), (3, 1.5))
    ]
    assert manifests[0].n_bytes == manifests[1].n_bytes
    found = store.earlier_chunk(2, manifests[0])
    assert found is not None
    assert found.digest == manifests[1].chunks[2] == digest_of(found.data)
    assert store.earlier_chunk(0, manifests[2]) is None, "it is the only one that long"


def test_a_chunk_that_two_snapshots_share_is_served_until_both_are_gone(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, RUN)
    same = {"a": torch.zeros(3 * N_ELEMENTS)}
    a, b = (store.write(same, round=r, commit=bytes(32), fingerprint=bytes(8)) for r in (1, 2))
    digest = store.load(a)[0].chunks[1]
    for stored in (b, a):
        assert len(read(store, digest)) == CHUNK_BYTES
        store.discard(stored)
    with pytest.raises(KeyError):
        store.open(digest)
    store.discard(a)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found_named_and_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = SnapshotStore(tmp_path, RUN)
    stored = write(store, 1, LocalState(1, {"a": 1}))
    manifest, _ = store.load(stored)
    path = only_folder(tmp_path) / "data.safetensors"
    whole = path.read_bytes()
    for position in (0, CHUNK_BYTES, 2 * CHUNK_BYTES + 5, len(whole) - 1):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([whole[position] ^ 0x10]))
        i = position // CHUNK_BYTES
        with pytest.raises(ReplicaDiverged, match=f"chunk {i} of 3"):
            store.load(stored)
        with pytest.raises(KeyError):
            store.open(manifest.chunks[i])
        assert f"chunk {i} of the snapshot of round 1 is damaged" in caplog.text
        path.write_bytes(whole)
    path.write_bytes(whole[: CHUNK_BYTES + 9])
    with pytest.raises(ReplicaDiverged, match=r"chunk 1 of 3.* has 9 bytes"):
        store.load(stored)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ReplicaDiverged, match="more bytes"):
        store.load(stored)
    local = path.with_name("local")
    local.write_bytes(local.read_bytes()[:-1])
    with pytest.raises(BadLocalState):
        store.local(stored)


def test_what_is_no_whole_snapshot_of_the_run_is_left_alone_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other_run = tmp_path / "other"
    write(SnapshotStore(other_run, bytes(32)), 9)
    folder = tmp_path / "snapshots"
    store = SnapshotStore(folder, RUN)
    names = {r: sorted(folder.iterdir())[-1] for r in (1, 2, 3) if write(store, r)}
    data = names[1] / "data.safetensors"
    with data.open("r+b") as file:
        file.truncate(CHUNK_BYTES)
    manifest = names[2] / "manifest"
    manifest.write_bytes(manifest.read_bytes()[:-1] + b"\0")
    renamed = folder / names[3].name.replace("0000000003", "0000000004")
    shutil.copytree(names[3], renamed)
    shutil.copytree(names[3], folder / f"0000000005-{'0' * 64}")
    (folder / f"0000000006-{'0' * 64}").mkdir()
    shutil.move(only_folder(other_run), folder)
    (folder / "notes.txt").write_text("mine")
    before = sorted(p.name for p in folder.rglob("*"))
    with caplog.at_level(logging.WARNING):
        store = SnapshotStore(folder, RUN)
    assert rounds(store) == [3]
    assert_round(store, store.stored()[0])
    assert sorted(p.name for p in folder.rglob("*")) == before
    for words in (
        "data.safetensors has 4194304 bytes, not",
        "manifest does not match the digest in its name",
        "its manifest is of round 3",
        "No such file",
        "of another run, 0000",
        "notes.txt is left out: no snapshot has such a name",
    ):
        assert words in caplog.text
    assert len(caplog.records) == 7
    write(store, 1)  # the damaged one of the same name makes room for it
    assert rounds(SnapshotStore(folder, RUN)) == [1, 3]


def test_a_snapshot_that_is_here_already_is_replaced_and_keeps_its_local_state(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, RUN)
    first = write(store, 1, LocalState(1, {"a": 1}))
    assert write(store, 1) == first
    assert store.stored() == [first]
    local = store.local(first)
    assert local is not None
    assert local.strategy == {"a": 1}
    write(store, 1, LocalState(1, {"a": 2}))
    local = store.local(first)
    assert local is not None
    assert local.strategy == {"a": 2}
    assert only_folder(tmp_path).name.startswith("0000000001-")
    # A crash after the old one made room and before the new one came:
    only_folder(tmp_path).rename(tmp_path / f".replaced-{only_folder(tmp_path).name}")
    store = SnapshotStore(tmp_path, RUN)
    assert_round(store, store.stored()[0])


# --------------------------------------------------------------------------------------- downloads


def source(folder: Path) -> tuple[SnapshotStore, Stored, list[bytes]]:
    store = SnapshotStore(folder, RUN)
    stored = write(store, 7)
    return store, stored, [read(store, digest) for digest in store.load(stored)[0].chunks]


def test_a_download_survives_a_restart_and_becomes_a_snapshot(tmp_path: Path) -> None:
    donor, stored, chunks = source(tmp_path / "donor")
    manifest = read(donor, stored.manifest)
    store = SnapshotStore(tmp_path / "joiner", RUN)
    incoming = store.incoming(manifest)
    assert incoming.missing == [0, 1, 2]
    incoming.put(2, chunks[2])
    with pytest.raises(ValueError, match="2 chunks"):
        incoming.finish()
    assert store.stored() == []
    with pytest.raises(KeyError):
        store.open(donor.load(stored)[0].chunks[2])

    store = SnapshotStore(tmp_path / "joiner", RUN)
    incoming = store.incoming(manifest)
    assert incoming.missing == [0, 1]
    for i in (0, 1):
        incoming.put(i, chunks[i])
    assert incoming.finish() == stored
    for again in (store, SnapshotStore(tmp_path / "joiner", RUN)):
        assert again.stored() == [stored]
        assert_round(again, stored)
        assert read(again, stored.manifest) == manifest
    assert (tmp_path / "joiner").joinpath(only_folder(tmp_path / "joiner").name, "manifest").exists()


def test_what_lies_there_after_a_restart_is_verified(tmp_path: Path) -> None:
    donor, stored, chunks = source(tmp_path / "donor")
    manifest = read(donor, stored.manifest)
    folder = tmp_path / "joiner"
    for i, chunk in enumerate(chunks):
        incoming = SnapshotStore(folder, RUN).incoming(manifest)
        incoming.put(i, chunk)
    path = only_folder(folder) / "data.safetensors"
    data = bytearray(path.read_bytes())
    data[CHUNK_BYTES + 77] ^= 1
    path.write_bytes(data + b"more than there should be")
    (only_folder(folder) / "manifest").write_bytes(b"half of")
    store = SnapshotStore(folder, RUN)
    incoming = store.incoming(manifest)
    assert incoming.missing == [1]
    incoming.put(1, chunks[1])
    assert_round(store, incoming.finish())


def test_a_corrupted_chunk_is_rejected_a_hundred_times_of_a_hundred(tmp_path: Path) -> None:
    donor, stored, chunks = source(tmp_path / "donor")
    incoming = SnapshotStore(tmp_path / "joiner", RUN).incoming(read(donor, stored.manifest))
    incoming.put(0, chunks[0])
    path = only_folder(tmp_path / "joiner") / "data.safetensors"
    rejected = 0
    for n in range(100):
        i = n % 3
        position = (n * 40_961) % len(chunks[i])
        flipped = (
            chunks[i][:position] + bytes([chunks[i][position] ^ (1 << n % 8)]) + chunks[i][position + 1 :]
        )
        bad = [flipped, chunks[i][:position], chunks[i] + bytes(n + 1), chunks[(i + 1) % 3]][n // 3 % 4]
        with pytest.raises(ReplicaDiverged, match=f"chunk {i} of 3"):
            incoming.put(i, bad)
        rejected += 1
        assert incoming.missing == [1, 2]
    assert rejected == 100
    assert path.read_bytes() == chunks[0]


def test_only_the_newest_download_is_kept_and_foreign_manifests_are_refused(tmp_path: Path) -> None:
    donor, stored, chunks = source(tmp_path / "donor")
    other = write(donor, 8)
    store = SnapshotStore(tmp_path / "joiner", RUN)
    store.incoming(read(donor, stored.manifest)).put(0, chunks[0])
    with pytest.raises(ReplicaDiverged, match="cannot be read"):
        store.incoming(read(donor, stored.manifest)[:-1])
    foreign = SnapshotStore(tmp_path / "foreign", bytes(32))
    with pytest.raises(ReplicaDiverged, match="another run"):
        store.incoming(read(foreign, write(foreign, 1).manifest))
    assert store.incoming(read(donor, stored.manifest)).missing == [1, 2]
    assert store.incoming(read(donor, other.manifest)).missing == [0, 1, 2]
    assert only_folder(tmp_path / "joiner").name == f".incoming-{other.manifest.hex()}"
    store.give_up_incoming()
    assert list((tmp_path / "joiner").iterdir()) == []


def test_a_verified_download_replaces_a_damaged_snapshot(tmp_path: Path) -> None:
    donor, stored, chunks = source(tmp_path / "donor")
    store = SnapshotStore(tmp_path / "mine", RUN)
    write(store, 7, LocalState(7, {"mine": 1}))
    path = only_folder(tmp_path / "mine") / "data.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ReplicaDiverged, match="chunk 0"):
        store.load(stored)
    incoming = store.incoming(read(donor, stored.manifest))
    for i, chunk in enumerate(chunks):
        incoming.put(i, chunk)
        with pytest.raises(ReplicaDiverged, match="chunk 0"):
            store.load(stored)  # until the replacement is whole
    assert incoming.finish() == stored
    assert_round(store, stored)
    local = store.local(stored)
    assert local is not None
    assert local.strategy == {"mine": 1}


# --------------------------------------------------------------------------------------- crashes, full disks

CHILD = """
import os, resource, signal, sys
from pathlib import Path
import torch
from thinwire.node.snapshots.store import SnapshotStore

def write(store, round, n_chunks=2.5):
    b = torch.arange(int(2**20 * n_chunks), dtype=torch.float32) + round
    return store.write({"b": b, "a": torch.tensor([[float(round)]])}, round=round,
                       commit=bytes([round]) * 32, fingerprint=bytes([round]) * 8)

store = SnapshotStore(Path(sys.argv[1]), bytes(range(32)))
"""


def child(folder: Path, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_a_kill_between_aside_and_rename_leaves_a_usable_store(tmp_path: Path, event: str) -> None:
    """The interpreter tells of each file that is opened and renamed: there the process kills itself."""
    process = child(
        tmp_path,
        f"""
write(store, 1)
def kill(event, arguments):
    if event == {event!r} and "manifest" in str(arguments[0]) + " manifest" * (event == "os.rename"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
write(store, 2)
print("not killed")
""",
    )
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (-signal.SIGKILL, ""), err
    assert [p.name[:9] for p in tmp_path.iterdir() if p.name.startswith(".")] == [".writing-"]
    store = SnapshotStore(tmp_path, RUN)
    assert rounds(store) == [1]
    assert_round(store, store.stored()[0])
    assert only_folder(tmp_path).name.startswith("0000000001-")
    write(store, 2)
    assert rounds(store) == [1, 2]


def test_kills_at_any_time_leave_whole_snapshots_only(tmp_path: Path) -> None:
    for n in range(5):
        process = child(
            tmp_path,
            f"""
write(store, {n * 40 + 1})
print("ready", flush=True)
for i in range({n * 40 + 2}, 250):
    write(store, i)
""",
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.037 * n)
        process.kill()
        process.communicate()
        store = SnapshotStore(tmp_path, RUN)
        assert store.stored()[-1].round > n * 40
        for stored in store.stored():
            assert_round(store, stored)
        assert len(list(tmp_path.iterdir())) == len(store.stored())


def test_a_full_disk_leaves_nothing_half_written_and_the_earlier_snapshots(tmp_path: Path) -> None:
    """A limit on the size of files is what the kernel enforces for any user on any file system: like a full
    disk, it gives a short write first, and then an OSError."""
    process = child(
        tmp_path / "mine",
        """
first = write(store, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 2**20, 5 * 2**20))
try:
    write(store, 2)
except OSError as e:
    print(type(e).__name__, e.errno)
print([s.round for s in store.stored()], sorted(p.name[:10] for p in Path(sys.argv[1]).iterdir()))
store.load(first)
manifest = store.open(first.manifest)[0].read()
chunks = [store.open(d)[0].read() for d in store.load(first)[0].chunks]
joiner = SnapshotStore(Path(sys.argv[1]) / ".." / "joiner", bytes(range(32)))
incoming = joiner.incoming(manifest)
incoming.put(0, chunks[0])
try:
    incoming.put(1, chunks[1])
except OSError as e:
    print(type(e).__name__, e.errno, incoming.missing)
print(write(store, 3, n_chunks=0.5).round)
""",
    )
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert out.splitlines() == ["OSError 27", "[1] ['0000000001']", "OSError 27 [1, 2]", "3"]


def test_a_download_that_has_no_room_is_refused_before_it_begins(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, RUN)
    stored = write(store, 1, n_chunks=0.1)
    n_chunks = 2**18  # 1 TiB
    if shutil.disk_usage(tmp_path).free >= n_chunks * CHUNK_BYTES:
        pytest.skip("this disk has room for 1 TiB")
    huge = store.load(stored)[0].model_copy(
        update={"n_bytes": n_chunks * CHUNK_BYTES, "chunks": (bytes(32),) * n_chunks}
    )
    with pytest.raises(OSError, match="1099511627776 bytes needed"):
        store.incoming(encode_record(huge))


def test_of_a_manifest_no_more_is_read_than_one_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder from elsewhere may have anything in its place: a device without an end, too."""
    monkeypatch.setattr(stores, "MAX_CHUNKS", 1)
    data = bytes(max_manifest_bytes(CHUNK_BYTES) + 2)
    folder = tmp_path / f"{3:010d}-{digest_of(data).hex()}"
    folder.mkdir()
    (folder / "manifest").write_bytes(data)
    with caplog.at_level(logging.WARNING, logger="thinwire"):
        assert SnapshotStore(tmp_path, RUN).stored() == []
    assert "does not match the digest in its name" in caplog.text
