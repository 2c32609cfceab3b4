"""Whom the next committee record names."""

from __future__ import annotations

import pytest

from thinwire.coordinator.seats.naming import next_seats, told


@pytest.mark.parametrize(
    ("seats", "ready", "n_seats", "drops", "wanted"),
    [
        ("a", "", 3, "", None),
        ("a", "b", 3, "", None),  # one record for both: two seats would be worse than one
        ("a", "bc", 3, "", "abc"),
        ("a", "bcd", 3, "", "abc"),
        ("a", "b", 2, "", "ab"),
        ("a", "bc", 0, "", None),
        ("abc", "", 0, "c", None),
        ("abc", "d", 0, "c", "abd"),
        ("abc", "d", 3, "a", "dbc"),
        ("abc", "c", 0, "b", None),  # a seat is not its own successor
        ("abc", "d", 5, "", None),
        ("abc", "de", 5, "", "abcde"),
        ("abcde", "", 3, "", None),  # whom to drop nobody has said
        ("abcde", "", 3, "de", "abc"),
        ("abcde", "f", 4, "de", "abce"),
        ("abce", "f", 4, "de", "abcf"),
        ("a", "b", 0, "a", "b"),
        ("a", "", 0, "a", None),
        ("abc", "d", 0, "x", None),
    ],
)
def test_the_next_committee(seats: str, ready: str, n_seats: int, drops: str, wanted: str | None) -> None:
    found = next_seats(seats, ready, n_seats, drops)
    assert (None if found is None else "".join(found)) == wanted


def test_people_hear_what_is_missing_and_which_command_helps() -> None:
    assert told("abc", "b", "a", "D") == ""
    text = told("abc", "", "a", "D")
    assert "1 of 3 coordinators reachable; training waits until 2 are. Missing: b, c" in text
    assert "thinwire coordinator --state D --recover" in text
