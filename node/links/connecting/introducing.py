"""The first words of a session, from the node's end: Hello, and what comes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from ....compression.errors import Incompatible, LedgerCorrupt, SwarmUnreachable
from ....coordinator.protocol.identity import is_signed_by
from ....coordinator.protocol.messages import (
    PROTOCOL_VERSION,
    BadMessage,
    Commit,
    Elsewhere,
    Follow,
    Hello,
    Message,
    Refused,
    Welcome,
    digest_of,
    is_readable,
)
from ....coordinator.protocol.streams import FROM_COORDINATOR, Stream

ANSWER_TIMEOUT_S = 15.0
"""Without a byte for this long, a coordinator that was just reached counts as not answering."""

QUICK_ANSWER_S = 5.0
"""The same where there are other seats to ask."""

MissingCommits = Callable[[int, int], Iterator[Commit]]
"""Commits after the one round up to the other: for a coordinator that has lost them."""


async def introduce(
    stream: Stream,
    hello: Hello,
    missing: MissingCommits,
    tell: Callable[[str, bool], None],
    wait_s: float = ANSWER_TIMEOUT_S,
) -> Welcome | Elsewhere:
    """Says Hello on a new stream, and gives back what the coordinator has lost. Raises SwarmUnreachable,
    BadMessage, ConfigError, Incompatible or LedgerCorrupt."""
    try:
        await stream.send_message(hello)
        answer = await _answer(stream, wait_s)
        if isinstance(answer, Follow) and hello.head_round is not None:
            after, head = answer.after, hello.head_round
            tell(
                f"the coordinator has lost rounds {after + 1} to {head}: giving them back from this node's "
                f"copy",
                True,
            )
            answer = await _return_commits(stream, missing(after, head), wait_s)
    except (OSError, EOFError) as e:
        raise SwarmUnreachable(f"the coordinator closed the connection at once ({e})") from e
    if isinstance(answer, Elsewhere):
        return answer
    return _checked(hello.run_id, answer)


async def _return_commits(stream: Stream, commits: Iterator[Commit], wait_s: float) -> Message:
    """The coordinator was restored from an older copy: sends what it has lost; returns its answer."""

    async def send() -> None:
        for commit in commits:
            await stream.send_message(commit)
            stream.heard_s = time.monotonic()  # it is silent while it takes what is sent

    sending = asyncio.create_task(send())
    try:
        return await _answer(stream, wait_s)  # a refusal may come before everything is sent
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def _answer(stream: Stream, wait_s: float) -> Message:
    """The first message; slow ones are waited for as long as bytes keep coming."""
    task = asyncio.create_task(stream.receive_message(FROM_COORDINATOR))
    stream.heard_s = time.monotonic()
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=1.0)
            if not task.done() and time.monotonic() - stream.heard_s > wait_s:
                raise SwarmUnreachable(f"the coordinator is reached but says nothing for {wait_s:g} s")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return task.result()


def _checked(run_id: bytes, answer: Message) -> Welcome:
    """A Welcome to the run, whose record 0 is signed by the coordinator that it names."""
    if isinstance(answer, Refused):
        raise answer.as_error()
    if not isinstance(answer, Welcome):
        raise BadMessage(f"Welcome is expected, not {type(answer).__name__}")
    if digest_of(answer.genesis) != run_id:
        raise Incompatible("the coordinator serves another run than the ticket's: ask for a new ticket")
    body = answer.body
    if not is_signed_by(body.coordinator, answer.signature, answer.genesis):
        raise LedgerCorrupt("record 0: its signature is not the coordinator's")
    if not is_readable(body.protocol):
        raise Incompatible(f"the run has protocol version {body.protocol}, this thinwire {PROTOCOL_VERSION}")
    return answer
