"""What `thinwire bench NAME` takes: a class for each benchmark, whose help has its own options alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from tyro.conf import UseAppendAction, arg

from ..cli.arguments import optional, overrides_of
from ..system.places import refuse_below


@dataclass
class _Measured:
    repeats: Annotated[int, arg(metavar="N")] = 5
    """How often each is measured."""
    output: Annotated[Path | None, optional(aliases=["-o"], metavar="FILE.png")] = None
    """A picture of the times, or bytes."""
    against: Annotated[str | None, optional(metavar="FILE|DIR|REVISION")] = None
    """What --json printed before: its figures beside the new ones, and which got worse than their noise. Or
    another build, a checkout or a revision of this one: both in turn in one run, ratios with their spread."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    name: ClassVar[str]

    def run(self) -> int:
        from .command import bench_command

        refuse_below("--repeats", self.repeats, 1, "how often each is measured, e.g. 5")
        bench_command(
            self.name,
            n_repeats=self.repeats,
            as_json=self.json,
            picture=self.output,
            against=self.against,
            **self._options(),
        )
        return 0

    def _options(self) -> dict[str, Any]:
        """Further arguments of `bench_command`. Raises ConfigError."""
        return {}


@dataclass
class _Sized(_Measured):
    params: Annotated[str | None, optional(metavar="N,...")] = None
    """Parameters of the model, e.g. 3e7, or 1e6,1e8 for a column each."""

    def _options(self) -> dict[str, Any]:
        from .command import parse_sizes

        return {"sizes": None if self.params is None else parse_sizes(self.params)}


@dataclass
class _OnDevice(_Sized):
    device: Literal["cpu", "cuda"] = "cpu"

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "device": self.device}


@dataclass
class _OnLink(_Measured):
    rate: Annotated[str | None, optional(metavar="RATE")] = None
    """Of every connection, in each direction. Default: 10Mbit"""
    rtt: Annotated[str | None, optional(metavar="TIME")] = None
    """There and back. Default: 50ms"""

    def _options(self) -> dict[str, Any]:
        """What one of the two does not say is `LINK`'s; nothing, if neither was given."""
        if self.rate is None and self.rtt is None:
            return {}
        from ..links.upload_limit import parse_rate
        from .command import LINK
        from .network.link import parse_rtt

        rate = LINK[0] if self.rate is None else parse_rate(self.rate, "--rate")
        return {"link": (rate, LINK[1] if self.rtt is None else parse_rtt(self.rtt))}


@dataclass
class Noise(_OnDevice):
    """What SPSA adds to its forward passes, and its update, beside MeZO's way of doing it."""

    name: ClassVar[str] = "noise"


@dataclass
class Decoupled(_OnDevice):
    """Pack, decode and update of decoupled momentum, beside DeMo's way."""

    name: ClassVar[str] = "decoupled"


@dataclass
class Diloco(_OnDevice):
    """An outer round of DiLoCo with one inner step, beside plain torch."""

    name: ClassVar[str] = "diloco"


@dataclass
class Peers(_OnDevice):
    """What 1 to 256 payloads in a round cost a replica."""

    light: Annotated[str | None, optional(metavar="N,...")] = None
    """Instead: so many peers that compute nothing, e.g. 128,512,1000, with the real coordinator in a process
    of its own; 20 rounds for each of --repeats."""

    name: ClassVar[str] = "peers"

    def _options(self) -> dict[str, Any]:
        from .command import parse_sizes

        light = None if self.light is None else parse_sizes(self.light, "--light")
        return {**super()._options(), "light": light}


@dataclass
class Round(_Measured):
    """A round of 8 peers on loopback: latency and bytes."""

    seats: Annotated[int | None, optional(metavar="N")] = None
    """With so many coordinators, 1 or 3, over links of 0, 50 and 150 ms, inline and 1 MB payloads."""

    name: ClassVar[str] = "round"

    def _options(self) -> dict[str, Any]:
        return {"n_seats": self.seats}


@dataclass
class Upload(_Measured):
    """How often payloads leave a node, by who passes them on."""

    name: ClassVar[str] = "upload"


@dataclass
class Join(_Measured):
    """From the start of a process to its first offer, or to a coordinator's ticket; and catching up."""

    name: ClassVar[str] = "join"


@dataclass
class Wire(_Sized):
    """Bits per coefficient of every compressor, measured and by formula."""

    name: ClassVar[str] = "wire"


@dataclass
class Memory(_Sized):
    """What a rank of a sharded node holds at most in a round."""

    name: ClassVar[str] = "memory"


@dataclass
class Network(_Measured):
    """Rounds of 100 to 10,000 volunteers, in modelled time. With -o curves, of more rounds: minutes."""

    name: ClassVar[str] = "network"


@dataclass
class Ray(_Measured):
    """A round of 4 actors on a Ray cluster of its own."""

    name: ClassVar[str] = "ray"


@dataclass
class Link(_OnLink):
    """Round trips of an exchange on a thin link."""

    name: ClassVar[str] = "link"


@dataclass
class Step(_OnLink):
    """CPU and wall time of a small model's step, with all processes, beside torch's DDP: two minutes."""

    rate: Annotated[str | None, optional(metavar="RATE")] = None
    """Of every connection, in each direction. Default: as much as there is, or with --rtt 10Mbit."""
    rtt: Annotated[str | None, optional(metavar="TIME")] = None
    """There and back. Default: none, or with --rate 50ms."""

    name: ClassVar[str] = "step"


@dataclass
class All(_OnDevice):
    """noise, decoupled, diloco, peers, round, join, wire and memory, one after the other."""

    name: ClassVar[str] = "all"


@dataclass
class _Trained:
    jobs: Annotated[int | None, optional(metavar="N")] = None
    """Trainings at a time, each a process with one core; the rows are the same. Default: the cores that this
    process may use."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def _n_jobs(self) -> int:
        from ..system.jobs import n_cores

        refuse_below("--jobs", self.jobs, 1, "trainings at a time, e.g. 8")
        return self.jobs or n_cores()


@dataclass
class Audits(_Trained):
    """How often honest peers fail the audits of others."""

    strategies: Annotated[str | None, optional(metavar="NAME,...")] = None
    """Which rows, e.g. decoupled,spsa. Default: all."""
    rounds: Annotated[int | None, optional(metavar="N")] = None
    """Of each swarm. Default: 80"""
    seeds: Annotated[int | None, optional(metavar="N")] = None
    """Swarms of each row, whose losses are averaged, or audits counted. Default: 1"""
    honest: Annotated[int, arg(metavar="N")] = 3
    """Honest peers with the run's text."""
    bad: Annotated[int, arg(metavar="N")] = 1
    """Further honest ones, with other data in every second row."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """section.key=value of the run, e.g. strategy.bound=0; may be repeated."""

    def run(self) -> int:
        from .attacks.honest import audits_command

        return audits_command(self._wanted(), self.json)

    def _wanted(self, attacks: str | None = None, after: int = 0) -> Any:
        from .attacks.bad_peers import ATTACKS
        from .attacks.swarm import STRATEGIES
        from .attacks.table import Wanted, names_of

        _refuse(self.rounds, self.seeds)
        refuse_below("--honest", self.honest, 1, "honest peers of a swarm, e.g. 3")
        refuse_below("--bad", self.bad, 1, "bad peers of a swarm, e.g. 1")
        return Wanted(
            strategies=names_of(self.strategies, list(STRATEGIES), "--strategies"),
            attacks=names_of(attacks, list(ATTACKS), "--attacks"),
            n_rounds=self.rounds or 80,
            n_seeds=self.seeds or 1,
            n_honest=self.honest,
            n_bad=self.bad,
            settings=tuple(overrides_of(self.set).items()),
            after=after,
            n_jobs=self._n_jobs(),
        )


@dataclass
class Attacks(Audits):
    """What bad peers do to a swarm."""

    bad: Annotated[int, arg(metavar="N")] = 1
    """Bad peers."""
    attacks: Annotated[str | None, optional(metavar="NAME,...")] = None
    """Which rows, e.g. flipped,scaled-1e3. Default: all."""
    after: Annotated[int, arg(metavar="N")] = 0
    """So many rounds more, and losses are compared so long after bad peers were found, e.g. 200."""

    def run(self) -> int:
        from .attacks.table import attacks_command

        refuse_below("--after", self.after, 0, "rounds after bad peers were found, e.g. 200")
        return attacks_command(self._wanted(self.attacks, self.after), self.json)


@dataclass
class Learning(_Trained):
    """Strategies beside references in plain torch, each tuned: half an hour of CPU time."""

    strategies: Annotated[str | None, optional(metavar="NAME,...")] = None
    """Which rows. Default: all but for what was only tried, e.g. alone-snoo,decoupled-gpa,lozo."""
    rounds: Annotated[int | None, optional(metavar="N")] = None
    """Of each swarm, of 15 steps each. Default: 40"""
    seeds: Annotated[int | None, optional(metavar="N")] = None
    """Swarms of each row, whose losses are averaged. Default: 3, with --long 1"""
    long: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """ddp, decoupled and muloco, untuned, with 5 million parameters for 2,000 steps."""
    split: Annotated[str | None, optional(metavar="labels:K|dirichlet:A")] = None
    """Uneven data of the peers, as in compare."""
    device: Literal["cpu", "cuda"] = "cpu"
    output: Annotated[Path | None, optional(aliases=["-o"], metavar="FILE")] = None
    """The table as Markdown, or the rows, FILE.json; after every row what there is."""

    def run(self) -> int:
        from ..compare.split import Split
        from ..system.devices import check_device
        from .attacks.table import names_of
        from .learning.methods import IN_LONG, LONG, METHODS, SHAPE
        from .learning.rows import Wanted
        from .learning.table import learning_command
        from .learning.tried import ROWS

        _refuse(self.rounds, self.seeds)
        check_device(self.device)
        shape = LONG if self.long else SHAPE
        default = list(IN_LONG if self.long else METHODS)
        known = default if self.long or self.strategies is None else list(ROWS)
        split = None if self.split is None else Split.parse(self.split)
        wanted = Wanted(
            names=names_of(self.strategies, known, "--strategies"),
            shape=replace(shape, n_rounds=self.rounds or shape.n_rounds, split=split),
            n_seeds=self.seeds or (1 if self.long else 3),
            tuned=not self.long,
            device=self.device,
            n_jobs=self._n_jobs(),
        )
        return learning_command(wanted, as_json=self.json, output=self.output)


def _refuse(n_rounds: int | None, n_seeds: int | None) -> None:
    """Raises ConfigError."""
    refuse_below("--rounds", n_rounds, 1, "rounds of each swarm, e.g. 80")
    refuse_below("--seeds", n_seeds, 1, "swarms of each row, e.g. 3")


@dataclass
class Bench:
    """Measure speed and memory, as ratios to a baseline and to the copy bandwidth of this machine.

    `thinwire bench NAME --help` says what a benchmark takes.
    """

    which: (
        Annotated[Noise, tyro.conf.subcommand("noise")]
        | Annotated[Decoupled, tyro.conf.subcommand("decoupled")]
        | Annotated[Diloco, tyro.conf.subcommand("diloco")]
        | Annotated[Peers, tyro.conf.subcommand("peers")]
        | Annotated[Round, tyro.conf.subcommand("round")]
        | Annotated[Join, tyro.conf.subcommand("join")]
        | Annotated[Wire, tyro.conf.subcommand("wire")]
        | Annotated[Memory, tyro.conf.subcommand("memory")]
        | Annotated[All, tyro.conf.subcommand("all")]
        | Annotated[Upload, tyro.conf.subcommand("upload")]
        | Annotated[Network, tyro.conf.subcommand("network")]
        | Annotated[Link, tyro.conf.subcommand("link")]
        | Annotated[Step, tyro.conf.subcommand("step")]
        | Annotated[Ray, tyro.conf.subcommand("ray")]
        | Annotated[Attacks, tyro.conf.subcommand("attacks")]
        | Annotated[Audits, tyro.conf.subcommand("audits")]
        | Annotated[Learning, tyro.conf.subcommand("learning")]
    )

    def run(self) -> int:
        return self.which.run()
