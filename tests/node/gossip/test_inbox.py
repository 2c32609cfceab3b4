"""What a node keeps of what neighbours send it."""

from __future__ import annotations

from thinwire.node.gossip.inbox import MOST_SENDERS, Inbox


def new_inbox() -> Inbox:
    inbox = Inbox()
    inbox.max_bytes = 100
    inbox.began(5, ["a", "b"])
    return inbox


def test_only_members_messages_of_this_round_or_later_that_are_small_enough_are_taken() -> None:
    inbox = new_inbox()
    assert inbox.refusal("a", True, 5, 100) is None
    assert inbox.refusal("a", True, 6, 1) is None
    assert inbox.refusal("a", False, 5, 1) == "stranger"
    assert inbox.refusal("a", True, 4, 1) == "round"
    assert inbox.refusal("a", True, 5, 101) == "size"
    assert inbox.refusal("a", True, 5, 0) == "size"


def test_a_senders_two_newest_messages_are_kept_and_old_rounds_go() -> None:
    inbox = new_inbox()
    assert inbox.missing(5, ["a", "b"]) == ["a", "b"]
    for round_ in (5, 6, 7):
        inbox.put("a", round_, b"%d" % round_)
    inbox.put("b", 5, b"b")
    inbox.put("c", 5, b"c")
    assert inbox.of(5) == [("b", b"b")]
    assert inbox.of(7) == [("a", b"7")]
    assert inbox.missing(5, ["b", "c"]) == []
    inbox.began(7, ["c", "a"])
    assert inbox.of(7) == [("a", b"7")]
    assert inbox.missing(7, ["a", "c"]) == ["c"]


def test_strangers_to_the_round_take_no_more_room_than_there_is() -> None:
    inbox = new_inbox()
    for i in range(MOST_SENDERS):
        assert inbox.refusal(f"other-{i}", True, 5, 1) is None
        inbox.put(f"other-{i}", 5, b"x")
    assert inbox.refusal("one more", True, 5, 1) == "full"
    assert inbox.refusal("a", True, 5, 1) is None
    assert inbox.refusal("other-3", True, 6, 1) is None
