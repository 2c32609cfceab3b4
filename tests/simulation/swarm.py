"""The schedules: what may befall a swarm, step by step, drawn by hypothesis. Run as a program:

    python -m tests.simulation.swarm                                the same schedules every time
    THINWIRE_SIMULATION=5000 python -m tests.simulation.swarm       as many others, twice as long

A failure is printed with the script that led to it. Hypothesis also draws numbers that it finds in the
modules that are loaded; the schedules are the same only because this program loads always the same ones.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.simulation.peer import BLOB_BYTES, Peer, payload_of
from tests.simulation.world import World
from thinwire.coordinator.protocol.messages import Offer, digest_of

LONGER = int(os.environ.get("THINWIRE_SIMULATION", "0"))
PATIENCE_S = 300.0
"""Simulated seconds within which a swarm in which all is well must commit again."""

NAMES = st.sampled_from(["ann", "bob", "cyd", "dan"])
SIZES = st.sampled_from([40, BLOB_BYTES])
FEW = st.integers(0, 4)


class Swarm(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.world: World

    @initialize(
        policy=st.sampled_from(["all", "deadline", "fastest"]),
        min_peers=st.integers(1, 2),
        n_rounds=st.sampled_from([6, 1000]),
        eval_every=st.sampled_from([2, 1000]),
        n_peers=st.integers(1, 3),
    )
    def begin(self, policy: str, min_peers: int, n_rounds: int, eval_every: int, n_peers: int) -> None:
        self.world = World(
            self.folder, policy=policy, min_peers=min_peers, n_rounds=n_rounds, eval_every=eval_every
        )
        for name in ("ann", "bob", "cyd")[:n_peers]:
            self.world.start(name, with_disk=True)
        self.everybody_works(40)

    def awake(self, name: str) -> Iterator[Peer]:
        """The node, if it runs."""
        peer = self.world.peers.get(name)
        if peer is not None and not peer.is_frozen:
            yield peer

    # ----------------------------------------------------------------------------------- nodes at work

    @rule(n_bytes=SIZES)
    def everybody_works(self, n_bytes: int) -> None:
        """What a run is made of: all is delivered, who is awake offers."""
        for peer in list(self.world.peers.values()):
            self.world.connect(peer)
        self.world.flow()
        for name in self.world.peers:
            self.works(name, n_bytes, False)
        self.world.flow()
        self.world.pass_time(0.5)

    @rule(n_rounds=st.integers(1, 6), n_bytes=SIZES)
    def all_goes_well(self, n_rounds: int, n_bytes: int) -> None:
        """The coordinator is up, who froze is awake."""
        if self.world.host.service is None:
            self.world.host.restart()
        for peer in self.world.peers.values():
            peer.is_frozen = False
        for _ in range(n_rounds):
            self.everybody_works(n_bytes)

    @rule(name=NAMES, n_bytes=SIZES, is_common=st.booleans())
    def works(self, name: str, n_bytes: int, is_common: bool) -> None:
        """`is_common`: others offer the very same bytes."""
        for peer in self.awake(name):
            peer.work("everybody" if is_common else f"{name} {peer.life}", n_bytes)

    @rule(name=NAMES)
    def says_it_twice(self, name: str) -> None:
        for peer in self.awake(name):
            peer.resend()

    @rule(name=NAMES, ahead=st.integers(-2, 1), n_bytes=SIZES, is_true=st.booleans(), comes=st.booleans())
    def odd_offer(self, name: str, ahead: int, n_bytes: int, is_true: bool, comes: bool) -> None:
        """Late, early, changed, with a wrong size, without its bytes."""
        for peer in self.awake(name):
            round_ = len(peer.disk.copy) + 1 + ahead
            if round_ < 1 or peer.wire is None:
                continue
            payload = payload_of(f"odd {name} {round_}", n_bytes)
            inline = n_bytes < BLOB_BYTES
            offer = Offer(
                round=round_,
                n_samples=7,
                n_tokens=1,
                loss=None,
                n_bytes=n_bytes if is_true else n_bytes - 1,
                payload=payload if inline else None,
                digest=None if inline else digest_of(payload),
            )
            peer.say(offer)
            if comes and not inline and peer.index is not None:
                peer.wire.uploads.append((digest_of(payload), payload))

    @rule(name=NAMES, is_first=st.booleans())
    def lies_about_size(self, name: str, is_first: bool) -> None:
        """`is_first`: the bytes arrive before the offer."""
        for peer in self.awake(name):
            self.world.flow()
            if peer.wire is not None and peer.index is not None:
                payload = payload_of(f"lie {name} {peer.life} {peer.round}", BLOB_BYTES)
                peer.lie(len(peer.disk.copy) + 1, payload)
                for _ in range(2 if is_first else 1):
                    self.world.desk.deliver_upload(peer.wire)

    @rule(name=NAMES, n_bytes=SIZES)
    def is_replaced(self, name: str, n_bytes: int) -> None:
        """The node offers and dies; its next life is let in before that offer arrives."""
        self.works(name, n_bytes, False)
        if name in self.world.peers:
            self.world.bring_back(self.world.start(name, with_disk=True))

    # ------------------------------------------------------------------------------------- the network

    @rule(
        name=NAMES, up=FEW, down=FEW, uploads=st.integers(0, 2), is_late=st.booleans(), nth=st.integers(1, 2)
    )
    def some_arrive(self, name: str, up: int, down: int, uploads: int, is_late: bool, nth: int) -> None:
        """On the newest connection, or the one before. `is_late`: uploads come after the messages."""
        for wire in [wire for wire in self.world.wires if wire.peer.name == name][-nth:][:1]:
            for _ in range(0 if is_late else uploads):
                self.world.desk.deliver_upload(wire)
            for _ in range(up):
                self.world.desk.deliver_up(wire)
            for _ in range(uploads if is_late else 0):
                self.world.desk.deliver_upload(wire)
            for _ in range(down):
                self.world.deliver_down(wire)

    @rule(newest_first=st.booleans())
    def all_arrive(self, newest_first: bool) -> None:
        """`newest_first`: what was sent on older connections comes last."""
        if newest_first:
            self.world.wires.reverse()
        self.world.flow()
        self.world.wires.sort(key=lambda wire: wire.number or 10**9)

    @rule(name=NAMES, up=FEW, down=FEW)
    def cut(self, name: str, up: int, down: int) -> None:
        for peer in self.awake(name):
            if peer.wire is not None:
                self.world.cut(peer.wire, up, down)

    @rule(name=NAMES)
    def reconnect(self, name: str) -> None:
        for peer in self.awake(name):
            self.world.connect(peer)

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 12.0, 70.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    # -------------------------------------------------------------------------------- what befalls nodes

    @rule()
    def all_start(self) -> None:
        """Whoever does not run."""
        for name in ("ann", "bob", "cyd", "dan"):
            if name not in self.world.peers:
                self.world.start(name, with_disk=True)

    @rule(name=NAMES, with_disk=st.booleans())
    def start(self, name: str, with_disk: bool) -> None:
        self.world.start(name, with_disk=with_disk)

    @rule(name=NAMES, n_rounds=st.integers(0, 9))
    def joins_slowly(self, name: str, n_rounds: int) -> None:
        """From the beginning; says what it needs, then the others go on for a while."""
        self.world.bring_back(self.world.start(name, with_disk=False))
        self.world.flow()
        for peer in self.awake(name):
            peer.is_slow = True
            self.all_goes_well(n_rounds, BLOB_BYTES)
            peer.is_slow = False

    @rule(name=NAMES)
    def crash(self, name: str) -> None:
        self.world.kill(name)

    @rule(name=NAMES)
    def leave(self, name: str) -> None:
        for peer in self.awake(name):
            peer.leave()
            self.world.kill(name)

    @rule(name=NAMES, is_frozen=st.booleans())
    def freeze(self, name: str, is_frozen: bool) -> None:
        if name in self.world.peers:
            self.world.peers[name].is_frozen = is_frozen

    # -------------------------------------------------------------------------- what befalls the coordinator

    @precondition(lambda self: self.world.host.service is not None)
    @rule(is_clean=st.booleans())
    def stop_coordinator(self, is_clean: bool) -> None:
        self.world.host.stop(is_clean=is_clean)

    @precondition(lambda self: self.world.host.service is not None)
    @rule(chances=st.integers(0, 8))
    def power_cut_soon(self, chances: int) -> None:
        """In the midst of what the coordinator does then."""
        self.world.host.fuse = chances

    @precondition(lambda self: self.world.host.service is None)
    @rule()
    def restart_coordinator(self) -> None:
        self.world.host.restart()

    @precondition(lambda self: self.world.host.service is not None)
    @rule()
    def keep_copy(self) -> None:
        """Of the coordinator's disk as it is now."""
        self.world.host.keep_copy()

    @precondition(lambda self: self.world.host.backup is not None)
    @rule(n_rounds=st.integers(0, 4), n_bytes=SIZES)
    def restore(self, n_rounds: int, n_bytes: int) -> None:
        """On the older copy; the node that has seen most comes first and gives back what is missing."""
        self.all_goes_well(n_rounds, n_bytes)
        self.world.restore()
        name = max(self.world.disks, key=lambda name: (len(self.world.disks[name].copy), name))
        seen = list(self.world.disks[name].copy)
        peer = self.world.peers.get(name) or self.world.start(name, with_disk=True)
        self.world.bring_back(peer)
        found = [commit.digest for commit in self.world.host.oracle.ledger]
        if not self.world.is_restored:
            assert found[: len(seen)] == [commit.digest for commit in seen], "a lost round did not come back"
            self.settle()

    @precondition(lambda self: self.world.host.backup is not None)
    @rule()
    def restore_unnoticed(self) -> None:
        """On the older copy; whoever comes first goes on with it, and what others have seen may be forked."""
        self.world.restore()
        self.world.is_restored = True

    # ---------------------------------------------------------------------------------- what the owner does

    @rule(what=st.sampled_from(["set", "pause", "resume"]), warmup=FEW)
    def owner(self, what: str, warmup: int) -> None:
        self.world.host.order(what, warmup)

    # ---------------------------------------------------------------------------------- what must hold

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.settle()
                self.world.host.close()
        finally:
            shutil.rmtree(self.folder)

    def settle(self) -> None:
        """All is well again: the run must go on.

        Nodes that were refused (a fork) start anew. If all disks with an attested snapshot are lost, or all
        copies of a payload are, nobody can go on, and nothing is asked.
        """
        world = self.world
        world.host.fuse = None
        if world.host.service is None:
            world.host.restart()
        assert world.host.service is not None
        for peer in world.peers.values():
            peer.is_frozen = peer.is_slow = False
        for name in sorted({"ann", "bob", *world.disks} - {*world.peers}):
            world.start(name, with_disk=True)
        world.host.order("resume", 0)
        goal = min(world.host.service.head + 2, world.host.n_rounds)
        until_s = world.host.now_s + PATIENCE_S
        while world.host.service.head < goal or (
            goal == world.host.n_rounds and not world.host.service.finished
        ):
            if world.is_lost():
                return
            assert world.host.now_s < until_s, (
                f"no round in {PATIENCE_S} s: {world.host.service.status(world.host.now_s)}"
            )
            for name, peer in list(world.peers.items()):
                if peer.refused is not None:
                    world.start(name, with_disk=False)
            self.everybody_works(40)
            world.check()


SETTINGS = settings(
    max_examples=LONGER or 60,
    stateful_step_count=150 if LONGER else 80,
    derandomize=not LONGER,
    # Shrinking takes minutes: what fails here is told at once, as it was drawn.
    phases=list(Phase) if LONGER else [Phase.generate],
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)

if __name__ == "__main__":
    logging.disable()  # thousands of warnings of what has been done to the coordinator
    run_state_machine_as_test(Swarm, settings=SETTINGS)
