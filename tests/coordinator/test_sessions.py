"""What waits for a slow node: bounded, and what it can do without is left out first."""

from __future__ import annotations

import asyncio

from thinwire.coordinator.protocol.messages import Head, Heartbeat, Message, Offered, Refused
from thinwire.coordinator.protocol.streams import FROM_COORDINATOR, Meter, Stream
from thinwire.coordinator.sessions import MAX_QUEUED, MAX_QUEUED_HINTS, Session


def offered(peer: int) -> Offered:
    return Offered(round=1, holder=f"peer {peer}", digest=bytes(32), n_bytes=5000)


def sent(*posted: Message, reasons: int = 1) -> tuple[list[Message], list[bool]]:
    """What comes out at the other end of a socket after the session has ended, and what `post` answered."""

    async def run() -> tuple[list[Message], list[bool]]:
        answers: list[bool] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            session = Session("a", 1, Stream(reader, writer, Meter()))
            answers.extend([session.post(message) for message in posted])
            for n in range(reasons):
                session.end(Refused(error="SwarmUnreachable", text=f"reason {n}"))
            await session.write(lambda _after, _limit: [])
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            stream = Stream(*await asyncio.open_connection(*server.sockets[0].getsockname()), Meter())
            received = []
            try:
                while True:
                    received.append(await stream.receive_message(FROM_COORDINATOR))
            except EOFError:
                stream.close()
                return received, answers

    return asyncio.run(run())


def test_a_swarm_full_of_offers_does_not_close_a_session() -> None:
    hints = [offered(peer) for peer in range(MAX_QUEUED + 10)]
    received, answers = sent(*hints, Head(round=1))
    assert all(answers)
    assert received == [
        *hints[:MAX_QUEUED_HINTS],
        Head(round=1),
        Refused(error="SwarmUnreachable", text="reason 0"),
    ]


def test_whoever_takes_too_little_is_told_apart() -> None:
    _, answers = sent(*(Head(round=n) for n in range(MAX_QUEUED + 1)))
    assert answers == [True] * MAX_QUEUED + [False]


def test_of_some_messages_only_the_newest_counts_and_of_reasons_the_first() -> None:
    beats = [Heartbeat(round=n, sent_bytes=0, received_bytes=0, payload_bytes=0) for n in range(3)]
    received, _ = sent(*beats, reasons=2)
    assert received == [beats[-1], Refused(error="SwarmUnreachable", text="reason 0")]
