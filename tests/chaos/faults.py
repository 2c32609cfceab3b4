"""What can happen to a swarm: a fault is a generator that does harm, and yields what it waits for meanwhile.

When it returns, everything that it broke is there again (processes started, links restored): recovering from
then on is the swarm's own business. It may return what has to be true, too, before that counts as done.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.doomed import EDGES, PHASES
from tests.chaos.harness import Swarm
from tests.chaos.program import Node
from tests.chaos.proxy import MBIT_BYTES_PER_S

Until = Callable[[], bool]
Course = Generator[Until, None, Until | None]

SEEN_WITHIN_S = 20.0
"""An order at an edge that the node does not pass for so long is taken back."""

FLIPPED_BITS = range(12, 23)
"""Of a float32: the number stays finite, and no update rounds the difference away."""


HEALED = "this replica was wrong after round"
"""What a node says when it has healed itself."""


class NotHarmed(Exception):
    """The fault did not come about: there was nothing to break."""


@dataclass(frozen=True, slots=True)
class Kind:
    """`hits_node`: else a coordinator. `is_lethal`: the node's process dies of it; `takes_node`: nodes may
    die beside a coordinator; `is_total`: no coordinator is left that could go on."""

    name: str
    course: Callable[[Swarm, Node], Course]
    hits_node: bool = True
    is_lethal: bool = False
    takes_node: bool = False
    is_total: bool = False


def for_s(seconds: float) -> Until:
    end_s = time.monotonic() + seconds
    return lambda: time.monotonic() >= end_s


def killed(swarm: Swarm, node: Node) -> Course:
    node.kill()
    yield for_s(swarm.rng.choice((0.0, 1.0, 3.0)))
    swarm.start(node)


def frozen(swarm: Swarm, node: Node) -> Course:
    node.freeze()
    yield for_s(swarm.rng.choice((1.0, 4.0, 12.0)))
    node.thaw()


def coordinator_killed(swarm: Swarm, node: Node) -> Course:
    swarm.coordinator.kill()
    yield for_s(swarm.rng.choice((0.0, 2.0)))
    swarm.start_coordinator(wait=False)


def reset(swarm: Swarm, node: Node) -> Course:
    assert node.proxy is not None
    node.proxy.reset()
    yield for_s(0.0)


def cut(swarm: Swarm, node: Node) -> Course:
    """In the middle of something that is being sent."""
    assert node.proxy is not None
    proxy, goal = node.proxy, swarm.rng.randrange(1, 20_000)
    resets = proxy.resets
    proxy.cut_after(goal)
    yield lambda: proxy.resets > resets
    proxy.restore()


def black_hole(swarm: Swarm, node: Node) -> Course:
    assert node.proxy is not None
    node.proxy.black_hole()
    yield for_s(swarm.rng.choice((2.0, 6.0, 14.0)))
    node.proxy.restore()


def delayed(swarm: Swarm, node: Node) -> Course:
    assert node.proxy is not None
    node.proxy.slow(delay_s=0.3)
    yield for_s(5.0)
    node.proxy.restore()


def throttled(swarm: Swarm, node: Node) -> Course:
    assert node.proxy is not None
    node.proxy.slow(rate_bytes_per_s=MBIT_BYTES_PER_S)
    yield for_s(5.0)
    node.proxy.restore()


def bit_flipped(swarm: Swarm, node: Node) -> Course:
    """Healed when it said so, and has reported the same fingerprint as another node since."""
    n_elements = swarm.settings["task.layers"] * swarm.settings["task.width"] ** 2
    element, bit = swarm.rng.randrange(n_elements), swarm.rng.choice(FLIPPED_BITS)
    n_before = node.text().count(HEALED)
    node.order(do="flip", parameter="0.weight", element=element, bit=bit)
    yield _carried_out(node)
    head = swarm.head()
    others = [n for n in swarm.nodes if n is not node]

    def is_healed() -> bool:
        has_said = node.text().count(HEALED) > n_before
        return has_said and any(swarm.agreed_round([node, other], head) for other in others)

    return is_healed


def doomed_at(phase: str, edge: str) -> Callable[[Swarm, Node], Course]:
    """SIGKILL exactly there."""

    def course(swarm: Swarm, node: Node) -> Course:
        node.order(do="die", phase=phase, edge=edge)
        yield _carried_out(node)
        yield lambda: not node.is_running
        swarm.start(node)

    return course


def chunk_corrupted(swarm: Swarm, node: Node) -> Course:
    """Another node's snapshot is damaged on its disk, and this one comes back with its identity alone."""
    holder = swarm.rng.choice([n for n in swarm.nodes if n is not node])
    if not _corrupt_newest(holder, swarm.rng):
        raise NotHarmed(f"{holder.name} has no snapshot")
    node.kill()
    forget(node)
    swarm.start(node)
    yield for_s(0.0)


def snapshots_of(node: Node) -> list[Path]:
    """The data files of its snapshots, the newest last."""
    return sorted(node.state.glob("*/snapshots/0*/data.safetensors"))


def _corrupt_newest(node: Node, rng: random.Random) -> bool:
    """Whether there was one; the node runs, and removes old ones."""
    for path in reversed(snapshots_of(node)):
        with contextlib.suppress(FileNotFoundError):
            corrupt(path, rng.randrange(path.stat().st_size))
            return True
    return False


def corrupt(path: Path, at: int) -> None:
    """Changes one bit of byte `at` of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def forget(node: Node) -> None:
    """Leaves a node that is not running its identity alone."""
    for entry in node.state.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)


def _carried_out(node: Node) -> Until:
    """Raises NotHarmed if it does not come about for a long time."""
    limit_s = time.monotonic() + SEEN_WITHIN_S

    def look() -> bool:
        if node.was_obeyed:
            return True
        if time.monotonic() > limit_s:
            node.orders.unlink(missing_ok=True)
            raise NotHarmed(f"{node.name} did not pass there")
        return False

    return look


NEVER_IN_TRAINING = frozenset({"serve", "pass on"})
"""Phases that come only while somebody joins, or where lines differ."""

KINDS = (
    Kind("killed", killed, is_lethal=True),
    Kind("frozen", frozen),
    Kind("coordinator killed", coordinator_killed, hits_node=False),
    Kind("connection reset", reset),
    Kind("cut in a transfer", cut),
    Kind("black hole", black_hole),
    Kind("delay of 300 ms", delayed),
    Kind("throttled to 1 Mbit/s", throttled),
    Kind("bit flipped", bit_flipped),
    Kind("chunk corrupted", chunk_corrupted, is_lethal=True),
)
EDGE_KINDS = tuple(
    Kind(f"killed {edge} {phase}", doomed_at(phase, edge), is_lethal=True)
    for phase in PHASES
    for edge in EDGES
    if phase not in NEVER_IN_TRAINING
)
"""Every phase edge of a round."""
