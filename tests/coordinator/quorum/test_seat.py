"""A seat by itself, and three of them told message by message."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coordinator.quorum.stand_ins import RUN, Body, Disk, Key, Records
from tests.coordinator.quorum.world import MILD
from thinwire.coordinator.protocol.messages import (
    MAX_SEAL_BYTES,
    MAX_SEATS,
    MAX_WORK_BYTES,
    BadMessage,
    digest_of,
    encode_message,
)
from thinwire.coordinator.protocol.trust.seals import Committee, Seal, Sealed
from thinwire.coordinator.quorum.catching_up import CatchingUp
from thinwire.coordinator.quorum.events import (
    DiskFailed,
    Evidence,
    Leads,
    NewRecord,
    Role,
    SeatEvent,
    StepsDown,
    Timing,
)
from thinwire.coordinator.quorum.patience import Patience
from thinwire.coordinator.quorum.proposal import Proposal
from thinwire.coordinator.quorum.seat import Seat
from thinwire.coordinator.quorum.words import (
    BATCH,
    BATCH_BYTES,
    MAX_RECORD_BYTES,
    MAX_WORD_BYTES,
    Accepted,
    Aye,
    Batch,
    Canvass,
    Follow,
    Nack,
    Ping,
    Prepare,
    Promise,
    Propose,
    Sealing,
    Voted,
    Word,
    decode_word,
)

NAMES = ("seat-0", "seat-1", "seat-2")


class Table:
    """Seats whose messages are delivered one by one."""

    def __init__(self, n: int = 3, n_onlookers: int = 0) -> None:
        committee = Committee.majority(0, NAMES[:n])
        self.disks = {name: Disk(committee, me=name) for name in NAMES[: n + n_onlookers]}
        self.queue: list[tuple[str, str, Word]] = []
        self.now_s = 0.0
        self.is_here = dict.fromkeys(NAMES, True)
        """Whether a seat has what records name."""
        self.ahead_s = dict.fromkeys(NAMES, 0.0)
        """How wrong a seat's clock is."""
        self.seats = {name: self._seat(name) for name in self.disks}

    def _seat(self, name: str) -> Seat:
        def send(to: str, word: Word) -> None:
            self.queue.append((name, to, word))

        rng = random.Random(name)
        records = Records(lambda: self.is_here[name])
        disk, wall_ms = self.disks[name], lambda: int(1e12 + 1000 * (self.now_s + self.ahead_s[name]))
        return Seat(RUN, Key(name), disk, records, send, self.now_s, rng=rng, timing=MILD, wall_ms=wall_ms)

    def wakes(self, name: str) -> None:
        self.now_s = max(self.now_s, self.seats[name].wake_s)
        self.seats[name].tick(self.now_s)

    def deliver(self, which: Callable[[str, str, Word], bool] = lambda *_: True) -> None:
        """All that is on its way, and what follows from it; what is not `which` is lost."""
        while self.queue:
            sender, to, word = self.queue.pop(0)
            if to in self.seats and which(sender, to, word):
                self.seats[to].receive(sender, word, self.now_s)

    def events(self, name: str) -> list[SeatEvent]:
        events = list(self.seats[name].events)
        self.seats[name].events.clear()
        return events

    def record(self, number: int) -> bytes:
        disk = max(self.disks.values(), key=lambda disk: disk.head)
        return Body(disk.head + 1, disk.head_digest, number).packed()


def test_one_seat_is_a_coordinator_alone() -> None:
    table = Table(1)
    table.wakes("seat-0")
    assert table.events("seat-0") == [Leads()]
    table.seats["seat-0"].propose(table.record(1), table.now_s)
    assert table.events("seat-0") == [NewRecord(1)]
    assert table.queue == []


def test_three_seats_elect_one_and_seal() -> None:
    table = Table()
    table.wakes("seat-1")
    table.deliver()
    assert table.events("seat-1") == [Leads()]
    record = table.record(1)
    table.seats["seat-1"].propose(record, table.now_s)
    table.deliver()
    assert {name: disk.head for name, disk in table.disks.items()} == dict.fromkeys(NAMES, 1)
    sealed = table.disks["seat-2"].records[0]
    committee = Committee.majority(0, NAMES)
    assert sealed.record == record
    assert committee.has_sealed(RUN, 1, record, sealed.seal, Key("").check)
    assert not committee.has_sealed(RUN, 2, record, sealed.seal, Key("").check)
    assert not committee.has_sealed(b"another run", 1, record, sealed.seal, Key("").check)


def test_a_record_that_one_seat_has_voted_for_is_proposed_again_by_the_next_leader() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver()
    table.events("seat-0")
    record = table.record(1)
    table.seats["seat-0"].propose(record, table.now_s)
    table.deliver(lambda _sender, to, word: isinstance(word, Propose) and to == "seat-1")
    assert table.disks["seat-1"].vote.accepted is not None
    del table.seats["seat-0"]
    table.wakes("seat-2")
    table.deliver()
    assert table.disks["seat-2"].records[0].record == record
    assert table.events("seat-2") == [NewRecord(1), Leads()]


def test_a_leader_without_a_majority_steps_down() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver()
    table.events("seat-0")
    table.now_s += 10 * MILD.patience_s
    table.wakes("seat-0")
    assert table.events("seat-0") == [StepsDown("no majority")]
    assert table.seats["seat-0"].role is Role.CANVASSING
    with pytest.raises(RuntimeError, match="only a leader proposes"):
        table.seats["seat-0"].propose(table.record(1), table.now_s)


def test_a_leader_that_is_only_heard_says_when_it_leads_no_more() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver()
    led_s = table.now_s
    while table.seats["seat-0"].role is Role.LEADING:
        table.wakes("seat-0")
        table.deliver(lambda _sender, to, _word: to != "seat-0")
    given_up_s = table.now_s
    assert given_up_s == pytest.approx(led_s + MILD.patience_s)
    assert {table.seats[name].leader for name in NAMES} == {None}
    name = min(NAMES[1:], key=lambda name: table.seats[name].wake_s)
    table.wakes(name)
    table.deliver(lambda _sender, to, _word: to != "seat-0")
    assert table.seats[name].role is Role.LEADING
    assert table.now_s - given_up_s <= 2 * MILD.beat_s


def test_a_leader_that_hears_again_that_nobody_leads_is_followed_first() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver()
    table.events("seat-0")
    table.now_s += 10 * MILD.patience_s
    table.wakes("seat-0")
    table.deliver()
    assert table.events("seat-0") == [StepsDown("no majority"), Leads()]
    assert {table.seats[name].leader for name in NAMES} == {"seat-0"}


def test_what_a_leader_asked_before_it_led_deposes_nobody() -> None:
    table = Table()
    asked: list[Word] = []

    def note(_sender: str, _to: str, word: Word) -> bool:
        asked.extend([word] if isinstance(word, Canvass) else [])
        return True

    table.wakes("seat-0")
    table.deliver(note)
    table.seats["seat-1"].receive("seat-0", asked[0], table.now_s)
    assert table.seats["seat-1"].leader == "seat-0"


def test_two_records_for_one_ballot_are_evidence_and_get_one_vote() -> None:
    table = Table()
    seat, disk = table.seats["seat-1"], table.disks["seat-1"]
    ballot = disk.committee.ballot_above(0, "seat-0")
    for number in (1, 2):
        seat.receive("seat-0", Propose(ballot=ballot, round=1, record=table.record(number)), 0.0)
    assert table.events("seat-1") == [Evidence("seat-0", "two records")]
    assert disk.vote.accepted == Accepted(ballot=ballot, round=1, record=table.record(1))


def test_what_is_not_sealed_is_not_taken() -> None:
    table = Table()
    seat = table.seats["seat-1"]
    ballot = table.disks["seat-1"].committee.ballot_above(0, "seat-0")
    seal = Seal(ballot, {0: bytes(64)}).to_bytes()
    seat.receive("seat-0", Batch(head=1, sealed=(Sealed(record=table.record(1), seal=seal),)), 0.0)
    assert table.events("seat-1") == [Evidence("seat-0", "bad seal")]
    assert table.disks["seat-1"].head == 0


def test_a_seat_whose_votes_are_lost_gives_none() -> None:
    table = Table()
    table.disks["seat-1"].rests = bytes(16)
    ballot = table.disks["seat-1"].committee.ballot_above(0, "seat-0")
    seat = table.seats["seat-1"]
    seat.receive("seat-0", Canvass(highest=0, head=0), 100.0)
    seat.receive("seat-0", Prepare(ballot=ballot, head=0), 100.0)
    seat.receive("seat-0", Propose(ballot=ballot, round=1, record=table.record(1)), 100.0)
    assert table.queue == []


def test_nobody_follows_a_ballot_of_another_seat_or_epoch() -> None:
    table = Table()
    committee = table.disks["seat-1"].committee
    seat = table.seats["seat-1"]
    others = committee.ballot_above(0, "seat-2")
    old = Committee.majority(7, NAMES).ballot_above(0, "seat-0")
    for ballot in (others, old):
        seat.receive("seat-0", Ping(ballot=ballot, head=0), 0.0)
        seat.receive("seat-0", Prepare(ballot=ballot, head=0), 0.0)
    assert seat.leader is None
    assert not any(isinstance(word, Promise) for _, _, word in table.queue)


def test_a_seat_that_rests_is_known_however_quickly_records_follow() -> None:
    table = Table()
    table.disks["seat-2"].rests = bytes(16)
    table.wakes("seat-0")
    table.deliver()
    for number in range(3):
        table.seats["seat-0"].propose(table.record(number), table.now_s)
        table.deliver(lambda _sender, to, _word: to != "seat-2")
        assert table.seats["seat-0"].resting == {"seat-2": bytes(16)}


@pytest.mark.parametrize(
    ("ahead_s", "time_s", "jumped_s"),
    [
        ((3600, 0, 1), 1, 1),
        ((0, 3600, 3600), 0, 3600),
        ((-3600, 0, 0), -3600, 0),
        ((3600, -99, 0), 0, 0),
        ((0, -99, 0), 0, 0),
    ],
)
def test_a_leader_s_time_is_not_later_than_half_of_the_clocks(
    ahead_s: tuple[float, ...], time_s: float, jumped_s: float
) -> None:
    table = Table()
    table.ahead_s.update(zip(NAMES, ahead_s, strict=False))
    table.wakes("seat-0")
    table.deliver()
    leader = table.seats["seat-0"]
    assert leader.role is Role.LEADING
    for _ in range(2):  # from the promises on; then by the answers
        table.now_s += 1
        assert leader.time_ms(table.now_s) == pytest.approx(
            1e12 + 1000 * (table.now_s + time_s), abs=2, rel=0
        )
        table.wakes("seat-0")
        table.deliver()
    table.ahead_s["seat-0"] = 7200
    assert leader.time_ms(table.now_s) == pytest.approx(1e12 + 1000 * (table.now_s + jumped_s), abs=2, rel=0)


def test_a_leader_that_lacks_what_an_open_record_names_has_the_others_vote() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver()
    table.seats["seat-0"].propose(table.record(1), table.now_s)
    table.deliver(lambda _sender, to, word: isinstance(word, Propose) and to == "seat-1")
    table.is_here["seat-2"] = False
    table.wakes("seat-2")
    table.deliver(lambda sender, to, _word: "seat-0" not in (sender, to))
    assert table.seats["seat-2"].role is Role.RECOVERING
    assert table.disks["seat-2"].head == 0
    table.is_here["seat-2"] = True
    table.now_s += 1.01 * MILD.retry_s
    table.wakes("seat-2")
    assert table.events("seat-2") == [NewRecord(1), Leads()]


def test_a_seat_that_is_behind_never_promises_less_than_before() -> None:
    """A word of a later epoch, which is void here, is no reason to begin with the first ballot again."""
    table = Table()
    seat, disk = table.seats["seat-1"], table.disks["seat-1"]
    ballot = disk.committee.ballot_above(disk.committee.ballot_above(0, "seat-0"), "seat-0")
    seat.receive("seat-0", Prepare(ballot=ballot, head=0), 0.0)
    later = Committee.majority(5, NAMES).ballot_above(0, "seat-2")
    seat.receive("seat-2", Nack(promised=later, head=5), 0.0)
    table.wakes("seat-1")
    seat.receive("seat-0", Aye(highest=later), table.now_s)
    assert seat.role is Role.PREPARING
    assert disk.vote.promised > ballot


def test_a_proposal_may_overtake_the_record_before_it() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver()
    table.seats["seat-0"].propose(table.record(1), table.now_s)
    late: list[Word] = []

    def is_early(_sender: str, to: str, word: Word) -> bool:
        if isinstance(word, Sealing) and to == "seat-2":
            late.append(word)
        return to != "seat-1" and not isinstance(word, Sealing | Follow)

    table.deliver(is_early)
    table.seats["seat-0"].propose(table.record(2), table.now_s)
    table.deliver(is_early)
    assert [disk.head for disk in table.disks.values()] == [1, 0, 0]
    table.seats["seat-2"].receive("seat-0", late[0], table.now_s)
    table.deliver(lambda _sender, to, _word: to != "seat-1")
    assert [disk.head for disk in table.disks.values()] == [2, 0, 2]


def test_who_was_asked_is_told_of_the_seal_without_the_record() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver()
    table.is_here["seat-2"] = False  # it could not vote, and takes the record all the same
    table.seats["seat-0"].propose(table.record(1), table.now_s)
    said: list[type[Word]] = []

    def note(_sender: str, _to: str, word: Word) -> bool:
        said.append(type(word))
        return True

    table.deliver(note)
    assert [disk.head for disk in table.disks.values()] == [1, 1, 1]
    assert said == [Propose, Propose, Voted, Sealing, Sealing]
    assert table.disks["seat-2"].records == table.disks["seat-0"].records


def test_who_has_not_got_the_record_of_a_seal_asks_for_it() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver()
    table.seats["seat-0"].propose(table.record(1), table.now_s)
    said: list[type[Word]] = []

    def note(_sender: str, to: str, word: Word) -> bool:
        said.append(type(word))
        return not (isinstance(word, Propose) and to == "seat-2")

    table.deliver(note)
    assert [disk.head for disk in table.disks.values()] == [1, 1, 1]
    assert said == [Propose, Propose, Voted, Sealing, Sealing, Follow, Batch]
    forged = Sealing(head=2, digest=bytes(32), seal=bytes(64))
    table.seats["seat-2"].receive("seat-0", forged, table.now_s)
    assert table.disks["seat-2"].head == 1
    assert table.events("seat-2") == [NewRecord(1)], "of what is not here nothing is known"


def test_a_seal_that_does_not_hold_is_evidence_however_it_comes() -> None:
    table = Table()
    seat, record = table.seats["seat-1"], table.record(1)
    ballot = table.disks["seat-1"].committee.ballot_above(0, "seat-0")
    seat.receive("seat-0", Propose(ballot=ballot, round=1, record=record), 0.0)
    seal = Seal(ballot, {0: bytes(64)}).to_bytes()
    seat.receive("seat-0", Sealing(head=1, digest=digest_of(record), seal=seal), 0.0)
    assert table.events("seat-1") == [Evidence("seat-0", "bad seal")]
    assert table.disks["seat-1"].head == 0


def test_what_one_committee_has_sealed_is_written_at_once() -> None:
    table = Table()
    disk, committee, parent = table.disks["seat-1"], table.disks["seat-1"].committee, RUN
    batch = []
    for round_, seats in enumerate([(), (), NAMES[:2], (), ()], 1):
        record = Body(round_, parent, 1, seats).packed()
        ballot = committee.ballot_above(0, "seat-0")
        data = committee.signed(RUN, ballot, round_, record)
        seal = committee.seal(ballot, {seat: Key(seat).sign(data) for seat in NAMES[:2]})
        batch.append(Sealed(record=record, seal=seal))
        committee = Committee.majority(round_, seats) if seats else committee
        parent = digest_of(record)
    batch[-1] = batch[-1].model_copy(update={"seal": batch[-2].seal})
    written: list[tuple[str, int]] = []
    disk.fate = lambda when: written.append((when, disk.head))
    table.seats["seat-1"].receive("seat-2", Batch(head=5, sealed=tuple(batch)), 0.0)
    assert written == [("before", 0), ("after", 3), ("before", 3), ("after", 4)]
    records = [NewRecord(round_) for round_ in range(1, 5)]
    assert table.events("seat-1") == [*records, Evidence("seat-2", "bad seal")]


def test_a_vote_is_given_as_soon_as_all_is_here() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver()
    table.events("seat-0")
    table.is_here.update({"seat-1": False, "seat-2": False})
    record, seat = table.record(1), table.seats["seat-1"]
    table.seats["seat-0"].propose(record, table.now_s)
    table.deliver()
    assert seat.unvoted == record
    seat.vote_again(table.now_s)
    assert (seat.unvoted, table.queue) == (record, [])
    table.is_here["seat-1"] = True
    seat.vote_again(table.now_s)
    table.deliver()
    assert table.events("seat-0") == [NewRecord(1)], "nobody has waited, and the leader has not asked again"
    assert seat.unvoted is None
    assert table.seats["seat-2"].unvoted is None, "it is sealed without its vote"


def test_what_is_kept_for_later_gets_no_vote_after_another_ballot() -> None:
    table = Table()
    seat, disk = table.seats["seat-1"], table.disks["seat-1"]
    table.is_here["seat-1"] = False
    ballot = disk.committee.ballot_above(0, "seat-0")
    seat.receive("seat-0", Propose(ballot=ballot, round=1, record=table.record(1)), 0.0)
    seat.receive("seat-2", Prepare(ballot=disk.committee.ballot_above(ballot, "seat-2"), head=0), 0.0)
    table.is_here["seat-1"] = True
    table.queue.clear()
    seat.vote_again(0.0)
    assert (table.queue, seat.unvoted, disk.vote.accepted) == ([], None, None)


def test_the_seal_of_a_record_that_is_being_looked_at_is_not_asked_for() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver()
    table.seats["seat-0"].propose(table.record(1), table.now_s)
    held: list[tuple[str, Word]] = []

    def holds(sender: str, to: str, word: Word) -> bool:
        is_held = to == "seat-2" and isinstance(word, Propose)
        if is_held:
            table.seats["seat-2"].hold(sender, word)
            held.append((sender, word))
        return not (is_held or isinstance(word, Follow))

    table.deliver(holds)
    assert table.disks["seat-2"].head == 1
    table.seats["seat-2"].receive(*held[0], table.now_s)
    table.deliver()
    assert table.seats["seat-0"].role is Role.LEADING


def test_one_record_makes_a_committee_of_three_which_is_led_at_once() -> None:
    table = Table(1, n_onlookers=2)
    table.wakes("seat-0")
    table.seats["seat-0"].propose(Body(1, RUN, 1, seats=NAMES).packed(), table.now_s)
    assert table.events("seat-0") == [Leads(), NewRecord(1), StepsDown("the committee has changed")]
    table.deliver()
    assert [disk.committee.epoch for disk in table.disks.values()] == [1, 1, 1]
    sealed_s = table.now_s
    table.wakes("seat-0")
    table.deliver()
    assert table.events("seat-0") == [Leads()]
    assert table.now_s == sealed_s + MILD.beat_s


def test_a_disk_that_fails_makes_a_seat_follow_and_say_nothing() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver()
    table.events("seat-0")
    full = OSError("no space left on device")
    table.disks["seat-0"].fate = table.disks["seat-1"].fate = lambda when: full if when == "before" else None
    table.seats["seat-0"].propose(table.record(1), table.now_s)
    assert table.events("seat-0") == [StepsDown("disk"), DiskFailed(str(full))]
    table.queue = [(sender, to, word) for sender, to, word in table.queue if to == "seat-1"]
    table.seats["seat-1"].receive(*table.queue.pop()[::2], table.now_s)
    assert table.events("seat-1") == [DiskFailed(str(full))]
    assert table.queue == []
    table.disks["seat-1"].fate = lambda _when: None
    table.wakes("seat-2")
    table.deliver()
    assert table.seats["seat-2"].role is Role.LEADING


def test_a_vote_that_nobody_can_have_given_is_evidence() -> None:
    table = Table()
    table.wakes("seat-0")
    table.deliver(lambda _sender, _to, word: not isinstance(word, Promise))
    seat, disk = table.seats["seat-0"], table.disks["seat-0"]
    ballot = disk.vote.promised
    vote = Accepted(ballot=disk.committee.ballot_above(ballot, "seat-2"), round=1, record=table.record(1))
    seat.receive("seat-2", Promise(ballot=ballot, head=0, accepted=vote), table.now_s)
    assert table.events("seat-0") == [Evidence("seat-2", "bad promise")]
    assert seat.role is Role.PREPARING


def test_only_a_record_of_the_open_round_is_proposed() -> None:
    table = Table(1)
    table.wakes("seat-0")
    with pytest.raises(ValueError, match="does not follow the head"):
        table.seats["seat-0"].propose(Body(2, RUN, 1).packed(), table.now_s)


def test_records_are_asked_for_once_and_come_in_words_that_are_bounded() -> None:
    long_ = bytes(BATCH_BYTES // 2)
    sealed = Sealed(record=long_, seal=bytes(64))
    full = Disk(Committee.majority(0, NAMES), records=[sealed] * 5)
    sent: list[Word] = []
    CatchingUp(lambda _seat, word: sent.append(word), full, 1.0).give("seat-1", 1)
    batch = Batch(head=5, sealed=(sealed, sealed))
    assert sent == [batch]

    longest = Sealed(record=bytes(MAX_RECORD_BYTES), seal=bytes(MAX_SEAL_BYTES), work=bytes(MAX_WORK_BYTES))
    full.records[0] = longest
    CatchingUp(lambda _seat, word: sent.append(word), full, 1.0).give("seat-1", 0)
    assert sent[1] == Batch(head=5, sealed=(longest,))
    assert len(encode_message(sent[1])) < MAX_WORD_BYTES
    many = Sealed(record=bytes(BATCH_BYTES // BATCH), seal=bytes(MAX_SEAL_BYTES))
    assert len(encode_message(Batch(head=5, sealed=(many,) * BATCH))) < MAX_WORD_BYTES

    asked: list[Word] = []
    empty = Disk(Committee.majority(0, NAMES))
    behind = CatchingUp(lambda _seat, word: asked.append(word), empty, 1.0)
    for now_s in (10.0, 10.5, 10.9):
        behind.heard_of("seat-0", 5, now_s)
    assert asked == [Follow(after=0)]
    behind.heard_of("seat-0", 5, 11.0)
    empty.records.append(sealed)
    behind.heard_of("seat-0", 5, 11.1)
    assert asked[1:] == [Follow(after=0), Follow(after=1)]


def test_a_proposal_is_said_again_at_longer_and_longer_intervals() -> None:
    proposal = Proposal(Propose(ballot=1, round=1, record=b""), 0.0, 1.0)
    said_s = [tenth / 10 for tenth in range(400) if proposal.is_due(tenth / 10)]
    assert said_s == [1.1, 3.2, 7.3, 15.4, 23.5, 31.6, 39.7]


def test_patience_grows_with_what_is_usual_and_comes_back() -> None:
    patience = Patience(Timing(0.5, 3.0, 1.0))
    patience.heard(1, 0.0)
    patience.heard(1, 0.6)
    assert patience.s == 3.0
    patience.heard(2, 92.0)  # another leader: what was between them says nothing
    assert patience.s == 3.0
    patience.heard(1, 100.0)  # one who stood still for longer than any patience: it says nothing either
    assert patience.s == 3.0
    patience.heard(2, 100.5)  # one who was given up speaks again
    assert patience.s == 9.0
    for beat in range(400):
        patience.heard(2, 100.5 + beat / 2)
    assert patience.s == 3.0


@given(st.binary(max_size=300))
def test_any_bytes_are_a_word_or_bad(data: bytes) -> None:
    try:
        word = decode_word(data)
    except BadMessage:
        return
    assert encode_message(word) == data


@given(st.lists(st.text(min_size=1, max_size=3), max_size=9), st.integers(0, 9))
def test_a_committee_has_a_majority(seats: list[str], need: int) -> None:
    is_one = 1 <= len(seats) <= MAX_SEATS and len(set(seats)) == len(seats)
    if is_one and len(seats) // 2 < need <= len(seats):
        committee = Committee(3, tuple(seats), need)
        ballot = committee.ballot_above(0, seats[-1])
        assert committee.owner(ballot) == seats[-1]
        assert committee.ballot_above(ballot, seats[0]) > ballot
    else:
        with pytest.raises(ValueError, match="no committee"):
            Committee(3, tuple(seats), need)
