"""A seat's disk: what it has promised and voted for outlives it; lost votes make it rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.committee import KEYS, SEATS, Sealing, entry
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.messages import GenesisBody, Reseated
from thinwire.coordinator.quorum.disk import VoteState
from thinwire.coordinator.quorum.words import Accepted
from thinwire.coordinator.seats.disk import StateDisk
from thinwire.coordinator.state import VOTE_NAME

VOTE = VoteState(1, 42, Accepted(ballot=41, round=2, record=b"r", work=b"w"))


class Place:
    """A seat's folder; `open` as after a restart."""

    def __init__(self, folder: Path, sealing: Sealing, seat: int) -> None:
        self.folder, self.seat = folder, seat
        folder.mkdir()
        Ledger.begin(folder / "ledger.db", sealing.genesis_record, sealing.genesis_signature).close()
        self.ledger: Ledger | None = None

    def open(self, *, is_new: bool = False) -> StateDisk:
        self.close()
        self.ledger = Ledger.open(self.folder / "ledger.db", KEYS[self.seat].public_key())
        return StateDisk(self.folder, self.ledger, SEATS[self.seat], is_new=is_new)

    def close(self) -> None:
        if self.ledger is not None:
            self.ledger.close()


@pytest.fixture
def sealing(make_genesis: Callable[..., GenesisBody]) -> Sealing:
    return Sealing(make_genesis().model_copy(update={"coordinator": SEATS[0]}))


@pytest.fixture
def at(tmp_path: Path, sealing: Sealing) -> Iterator[Callable[[int], Place]]:
    places = []

    def make(seat: int) -> Place:
        places.append(Place(tmp_path / str(seat), sealing, seat))
        return places[-1]

    yield make
    for place in places:
        place.close()


def test_votes_outlive_the_process(at: Callable[[int], Place], sealing: Sealing) -> None:
    place = at(1)
    disk = place.open(is_new=True)
    disk.append(sealing.add(sealing.governing(committee=entry([0, 1, 2]))))
    disk.save_vote(VOTE)
    assert disk.rests is None
    again = place.open()
    assert (again.vote, again.rests, again.head) == (VOTE, None, 1)
    assert again.committee.seats == SEATS[:3]


@pytest.mark.parametrize("spoil", ["missing", "damaged", "cut", "another's"])
def test_lost_votes_make_a_seat_rest_until_a_record_names_its_nonce(
    at: Callable[[int], Place], sealing: Sealing, spoil: str
) -> None:
    place, path = at(1), at(2).folder / VOTE_NAME
    disk = place.open(is_new=True)
    disk.append(sealing.add(sealing.governing(committee=entry([0, 1, 2]))))
    disk.save_vote(VOTE)
    StateDisk(path.parent, place.ledger, SEATS[2], is_new=True)  # type: ignore[arg-type]
    _spoil(place.folder / VOTE_NAME, path.read_bytes(), spoil)
    rests = place.open().rests
    assert rests is not None
    assert place.open().rests == rests, "a nonce stays the same until it is named"
    disk = place.open()
    assert disk.vote == VoteState()
    disk.append(sealing.add(sealing.governing(reseat=(Reseated(seat=SEATS[1], nonce=bytes(16)),))))
    assert disk.rests == rests
    disk.append(sealing.add(sealing.governing(reseat=(Reseated(seat=SEATS[1], nonce=rests),))))
    assert disk.rests is None
    assert place.open().rests is None


def _spoil(path: Path, others: bytes, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "damaged":
            path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
        case "cut":
            path.write_bytes(data[:-1])
        case _:
            path.write_bytes(others)


def test_who_is_alone_does_not_rest_but_an_old_copy_of_it_does_once_others_are_named(
    at: Callable[[int], Place], sealing: Sealing
) -> None:
    place = at(0)
    assert place.open().rests is None
    voted = sealing.add(sealing.body())
    named = sealing.add(sealing.governing(committee=entry([0, 1, 2])))
    disk = place.open()
    disk.save_vote(VoteState(0, 8, Accepted(ballot=8, round=1, record=voted.record)))
    disk.append(voted, named)  # it never voted for the second one: the copy is older than its vote
    assert disk.rests is not None


def test_the_founder_goes_on_with_its_votes_when_it_names_others(
    at: Callable[[int], Place], sealing: Sealing
) -> None:
    place = at(0)
    disk = place.open()
    named = sealing.add(sealing.governing(committee=entry([0, 1])))
    disk.save_vote(VoteState(0, 8, Accepted(ballot=8, round=1, record=named.record)))
    disk.append(named)
    assert disk.rests is None


def test_what_cannot_be_written_did_not_happen(
    at: Callable[[int], Place], sealing: Sealing, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = at(1)
    disk = place.open(is_new=True)
    disk.append(sealing.add(sealing.governing(committee=entry([0, 1, 2]))))
    disk.save_vote(VOTE)
    monkeypatch.setattr("os.fsync", _full)
    with pytest.raises(OSError, match="full"):
        disk.save_vote(VoteState(1, 43, None))
    assert disk.vote == VOTE
    monkeypatch.undo()
    assert place.open().vote == VOTE


def _full(_fd: int) -> None:
    raise OSError("the disk is full")
