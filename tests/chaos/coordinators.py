"""The coordinators of a swarm as processes: one, or the seats of a committee."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.chaos.book import Book
from tests.chaos.program import Program
from tests.chaos.proxy import Proxy
from tests.support.ports import free_port
from thinwire.coordinator.protocol.identity import load_or_create, peer_id_of
from thinwire.coordinator.seats.ticket import FILE_NAME
from thinwire.coordinator.state import VOTE_NAME

HERE = Path(__file__).parent


class Coordinator(Program):
    """Number 0 has founded the run. `door`: everybody reaches it through this proxy, if there is one."""

    def __init__(self, number: int, folder: Path, env: Mapping[str, str]) -> None:
        super().__init__(f"coordinator{number or ''}", folder, env)
        self.number = number
        self.state = folder / f"state{number or ''}"
        self.port = free_port()
        self.door: Proxy | None = None
        self.is_hidden = False
        """It tells nobody where it listens: who is to go through a proxy finds no other way."""

    @property
    def peer_id(self) -> str:
        return peer_id_of(load_or_create(self.state / "key").public_key())

    @property
    def ledger(self) -> Path:
        return self.state / "ledger.db"

    def begin(self, args: Sequence[str]) -> None:
        """Starts `thinwire coordinator` with these beside what it always has."""
        where = ["--state", str(self.state), "--host", "127.0.0.1", "--port", str(self.port)]
        if self.door is not None:
            where += ["--announce", f"/ip4/127.0.0.1/tcp/{self.door.port}"]
        script = HERE / "hidden.py" if self.is_hidden else None
        self.start(["coordinator", *args, "--linger", "0", *where], script=script)

    def begin_again(self, *args: str) -> None:
        """From its folder alone."""
        self.begin(args)

    def copy(self, to: Path, *, votes: bool = True) -> int:
        """Its state directory as a careful owner saves it while it runs; returns the copy's head. `votes`:
        the whole of it, as an image of the disk has it."""

        def left_out(_: str, names: list[str]) -> list[str]:
            return [
                name
                for name in names
                if name.startswith("ledger.db") or name.endswith(".sock") or (name == VOTE_NAME and not votes)
            ]

        shutil.copytree(self.state, to, ignore=left_out)
        with (
            contextlib.closing(sqlite3.connect(self.ledger)) as db,
            contextlib.closing(sqlite3.connect(to / "ledger.db")) as copy,
        ):
            db.backup(copy)
        return Book(to / "ledger.db").read()

    def put_back(self, copy: Path) -> None:
        """Replaces the state directory while it does not run."""
        assert not self.is_running
        for entry in self.state.iterdir():  # the folder itself may be a disk of its own
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        shutil.copytree(copy, self.state, dirs_exist_ok=True)


class Coordinators:
    """`through_doors`: each is reached through a proxy of its own; `hidden`: none says where it listens."""

    def __init__(
        self, folder: Path, env: Mapping[str, str], n: int, *, through_doors: bool, hidden: bool
    ) -> None:
        self._folder, self._env = folder, env
        self._through_doors, self._hidden = through_doors, hidden
        self.all: list[Coordinator] = []
        self.gone: list[Coordinator] = []
        """That were replaced or removed."""
        self._n = 0
        self.book = Book()
        for _ in range(n):
            self.add()

    @property
    def first(self) -> Coordinator:
        return self.all[0]

    @property
    def seat_ticket(self) -> str:
        return str(self.first.state / FILE_NAME)

    @property
    def ticket_file(self) -> Path:
        """Written by the first one, whenever the committee changes."""
        return self._folder / "ticket"

    def add(self) -> Coordinator:
        """One more; to be begun with `replica`."""
        one = Coordinator(self._n, self._folder, self._env)
        self._n += 1
        one.is_hidden = self._hidden
        if self._through_doors:
            one.door = Proxy(one.port)
        self.all.append(one)
        self.book.paths.append(one.ledger)
        return one

    def replica(self, one: Coordinator, *args: str) -> None:
        """Begins it, or begins it again."""
        one.begin(["--replica", self.seat_ticket, *args])

    def retire(self, one: Coordinator) -> None:
        """It was replaced or removed; its ledger is compared with the others all the same."""
        one.kill()
        self.all.remove(one)
        self.gone.append(one)

    def cut_one_way(self, one: Coordinator, *, hears: bool) -> None:
        """It hears everybody and is heard by nobody, or the other way round; by `heal` again."""
        ports: dict[int, bool] = {}

        def is_from(source: int) -> bool:
            if source not in ports:
                ports[source] = source in _ports_of(one)
            return ports[source]

        for other in self.all:
            assert other.door is not None
            if other is one:
                other.door.cut_one_way(lambda _source, up: up is not hears)
            else:
                other.door.cut_one_way(lambda source, up: up is hears and is_from(source))

    def heal(self) -> None:
        for one in self.all:
            if one.door is not None:
                one.door.restore()

    def leader(self) -> Coordinator:
        """Who had the newest record sealed; the first one where nobody else could."""
        sealer = self.book.sealer
        named = [one for one in self.all if (one.state / "key").exists() and one.peer_id == sealer]
        return named[0] if named else self.first

    def named(self, peer_id: str) -> bool:
        """Whether that is a seat, by the newest record."""
        return self.book.committee is not None and peer_id in self.book.committee.seats

    def seats(self) -> list[Coordinator]:
        """Of the committee, by the newest record."""
        committee = self.book.committee
        if committee is None:
            return [self.first]
        return [o for o in self.all if (o.state / "key").exists() and o.peer_id in committee.seats]

    def close(self) -> None:
        """The proxies."""
        for one in (*self.all, *self.gone):
            if one.door is not None:
                one.door.close()


def _ports_of(program: Program) -> set[int]:
    """Local ones of its connections."""
    found = set()
    for process in program.processes():
        with contextlib.suppress(psutil.Error):
            found |= {c.laddr.port for c in process.net_connections("tcp") if c.laddr}
    return found
