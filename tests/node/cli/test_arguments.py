"""What several commands read from their arguments."""

from __future__ import annotations

import io
import textwrap

import pytest

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.addresses import HttpAddress
from thinwire.coordinator.protocol.identity import new_key, peer_id_of
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.node.cli.arguments import http_address, read_ticket, with_whole_tickets

TICKET = Ticket(
    peer_id=peer_id_of(new_key().public_key()),
    addresses=("/ip4/127.0.0.1/tcp/4001", "/ip4/10.1.2.3/tcp/4001"),
    run_id=bytes(32),
    token="t" * 43,
)
LINE = TICKET.line()
PIECES = [LINE[i : i + 57] for i in range(0, len(LINE), 57)]


@pytest.mark.parametrize(
    "text", ["\r\n    ".join(PIECES), " ".join(PIECES), f"'{LINE}'", f"<{LINE}>\n", "\t".join(LINE)]
)
def test_a_ticket_that_was_wrapped_on_its_way_is_joined_up(text: str) -> None:
    assert Ticket.parse(text) == TICKET


def test_its_pieces_may_come_as_several_arguments() -> None:
    assert with_whole_tickets(["monitor", *PIECES, "folder", "--force"]) == [
        "monitor",
        LINE,
        "folder",
        "--force",
    ]
    assert with_whole_tickets(["join", PIECES[0], "--json"]) == ["join", PIECES[0], "--json"]
    assert with_whole_tickets(["status", LINE, "next"]) == ["status", LINE, "next"]


@pytest.mark.parametrize("more", ["", "not of the ticket\n", "\nnot of the ticket"])
def test_standard_input_is_read_as_far_as_the_ticket_goes(monkeypatch: pytest.MonkeyPatch, more: str) -> None:
    stdin = io.StringIO(textwrap.fill(LINE, 60, break_long_words=True) + "\n" + more)
    monkeypatch.setattr("sys.stdin", stdin)
    assert read_ticket("-") == LINE
    assert stdin.read() == more


def test_where_http_is_served_and_by_which_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THINWIRE_HTTP_TOKEN", raising=False)
    assert http_address("0.0.0.0:9100", None, ("swarm.example",)) == HttpAddress(
        "0.0.0.0", 9100, None, ("swarm.example",)
    )
    assert http_address(None, None) is None
    for name in ("swarm.example:9100", "http://swarm.example", "", "a b"):
        with pytest.raises(ConfigError, match="--http-host"):
            http_address("0.0.0.0:9100", None, (name,))
    with pytest.raises(ConfigError, match="--http HOST:PORT"):
        http_address(None, None, ("swarm.example",))
    address = HttpAddress("127.0.0.1", 1, "secret", ("a", "b"))
    assert HttpAddress.from_plain(["127.0.0.1", 1, "secret", ["a", "b"]]) == address
