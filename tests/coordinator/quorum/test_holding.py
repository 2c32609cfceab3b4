"""Which payloads a record may name: those that the same seats hold, enough of them."""

from __future__ import annotations

from thinwire.coordinator.quorum.holding import MAX_UNDER_WAY, PROMPT_S, Holding

A, B, C = (bytes([i]) * 32 for i in range(3))


def holding(n_seats: int, *announced: bytes) -> Holding:
    found = Holding([f"seat-{i}" for i in range(1, n_seats)], n_seats // 2 + 1)
    for digest in announced:
        found.announce(digest)
    return found


def test_alone_everything_is_held() -> None:
    assert holding(1, A).is_held(B)


def test_one_other_seat_of_three_is_enough() -> None:
    seats = holding(3, A)
    assert not seats.is_held(A)
    assert seats.keeps("seat-2", A) == [A]
    assert seats.keeps("seat-1", A) == []
    assert seats.is_held(A)


def test_two_payloads_are_held_by_the_same_seats() -> None:
    """Else neither of the two could vote for a record that names both."""
    seats = holding(3, A, B)
    assert seats.keeps("seat-1", A) == [A]
    assert seats.keeps("seat-2", B) == []
    assert seats.keeps("seat-2", A) == [B]


def test_two_other_seats_of_five() -> None:
    seats = holding(5, A, B)
    assert seats.keeps("seat-1", B) == []
    assert seats.keeps("seat-1", A) == []
    assert seats.keeps("seat-2", A) == [A]
    assert seats.keeps("seat-3", B) == []
    assert seats.keeps("seat-2", B) == [B]


def test_what_nobody_asked_for_changes_nothing() -> None:
    seats = holding(3, A)
    assert seats.keeps("seat-1", B) == []
    assert seats.keeps("somebody", A) == []
    assert not seats.is_held(B)
    seats.forget(A)
    assert seats.keeps("seat-1", A) == []


def test_a_seal_settles_what_was_held() -> None:
    seats = holding(3, A)
    seats.keeps("seat-1", A)
    seats.announce(B)
    assert seats.keeps("seat-2", B) == []
    seats.sealed()
    assert not seats.is_held(A)
    assert seats.keeps("seat-2", B) == [B]


def test_what_has_left_for_a_prompt_seat_is_held() -> None:
    seats = holding(3, A, B, C)
    assert seats.given("seat-1", A, 100, now_s=0.0) == []
    seats.answered("seat-1", A, now_s=0.2)
    assert seats.keeps("seat-1", A) == [A]
    assert seats.given("seat-2", B, 100, now_s=0.3) == [], "it has not answered yet"
    assert seats.given("seat-1", B, 100, now_s=0.3) == [B]
    seats.answered("seat-1", B, now_s=0.3 + 2 * PROMPT_S)
    assert seats.given("seat-1", C, 100, now_s=3.0) == [], "it was late"


def test_what_does_not_come_soon_is_waited_for() -> None:
    seats = holding(3, A, B, C)
    seats.given("seat-1", A, 100, now_s=0.0)
    seats.answered("seat-1", A, now_s=0.1)
    seats.keeps("seat-1", A)
    assert seats.given("seat-1", B, 100, now_s=1.0) == [B]
    assert seats.given("seat-1", C, 100, now_s=1.1 + PROMPT_S) == [], "the one before is still under way"
    assert seats.keeps("seat-1", C) == [C]


def test_too_much_under_way_is_waited_for() -> None:
    seats = holding(3, A, B)
    seats.given("seat-1", A, 100, now_s=0.0)
    seats.answered("seat-1", A, now_s=0.1)
    assert seats.given("seat-1", B, MAX_UNDER_WAY + 1, now_s=0.1) == []


def test_what_was_under_way_to_a_seat_that_is_gone_is_not_there() -> None:
    seats = holding(3, A, B, C)
    seats.given("seat-1", A, 100, now_s=0.0)
    seats.answered("seat-1", A, now_s=0.1)
    seats.keeps("seat-1", A)
    assert seats.given("seat-1", B, 100, now_s=0.1) == [B]
    seats.gone("seat-1")
    assert seats.given("seat-1", C, 100, now_s=0.2) == []
    assert seats.keeps("seat-1", C) == [], "it lacks the one that was held before"
    assert seats.keeps("seat-1", B) == [C]
    assert seats.given("somebody", C, 100, now_s=0.2) == []


def test_what_was_given_while_it_came_and_has_not_come_whole_stands_in_nobody_s_way() -> None:
    """Else the other seat, which never gets it, could not stand in for the one that was given it."""
    seats = holding(3, A)
    seats.given("seat-1", A, 10, 0.0)
    seats.answered("seat-1", A, 0.1)
    assert seats.keeps("seat-1", A) == [A]
    seats.sealed()
    seats.announce(B)
    assert seats.given("seat-1", B, 10, 1.0) == [B], "it was prompt"
    seats.announce(C)
    assert seats.keeps("seat-2", C) == []
    assert seats.lost(B) == [C]
    seats.announce(B)
    assert not seats.is_held(B)
