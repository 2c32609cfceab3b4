"""The commands that look at a run, a machine or a strategy. What they do is loaded when they run."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from ...compression.errors import ConfigError, ThinwireError
from ..system.output import to_stdout
from ..system.places import refuse_below, refuse_file, refuse_folder
from ..system.stopping import Stop, stop_on_signals
from .arguments import optional, overrides_of, read_ticket

if TYPE_CHECKING:
    from .run_command import Guard, What


@dataclass
class Status:
    """Show a run: peers, round, losses, bytes, fingerprints. Needs only the ticket, or a state folder."""

    ticket: Annotated[Positional[str], arg(metavar="TICKET|STATE")]
    """The line that the coordinator printed; - reads it from standard input, @FILE from a file. Or a state
    folder, without a network: the coordinator that runs there says how it stands, else the ledger."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object on stdout (with --watch: one a line)."""
    watch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Again and again until the run ends or Ctrl-C."""

    def run(self) -> int:
        from .view import show_status

        with stop_on_signals() as stop:
            show_status(
                _ticket_or_state(self.ticket), as_json=self.json, watch=self.watch, stopped=stop.is_set
            )
        return 128 + stop.signal if stop.signal else 0


@dataclass
class Ledger:
    """Save a run's whole ledger as one file, or verify such a file.

    While it reads from a coordinator, it is admitted to the swarm like a node that never trains; nobody
    waits for it.
    """

    ticket: Annotated[Positional[str | None], optional(metavar="TICKET|STATE")] = None
    """The line that the coordinator printed; - reads it from standard input, @FILE from a file. Or a state
    folder, a node's or a coordinator's: then no server and no network is needed."""
    output: Annotated[Path | None, optional(aliases=["-o"], metavar="FILE")] = None
    """Write the ledger here: signed records, and the payloads that they name."""
    check: Annotated[Path | None, optional(metavar="FILE")] = None
    """Verify this file (or state folder), without a network, and name its first bad record."""

    def run(self) -> int:
        from .ledger_command import check_ledger, save_ledger, save_ledger_of_state
        from .offline import state_folder

        if self.check is not None:
            if self.ticket is not None or self.output is not None:
                raise ConfigError("--check FILE takes neither a ticket nor -o")
            check_ledger(self.check)
            return 0
        if self.ticket is None or self.output is None:
            raise ConfigError(
                "write it as thinwire ledger TICKET -o FILE, with a state folder in place of the ticket, "
                "or thinwire ledger --check FILE"
            )
        refuse_file("-o", self.output)
        if (folder := state_folder(self.ticket)) is not None:
            save_ledger_of_state(folder, self.output)
            return 0
        with stop_on_signals() as stop:
            try:
                save_ledger(read_ticket(self.ticket), self.output, stop)
            except ThinwireError:
                if not stop.is_set():
                    raise
        return 128 + stop.signal if stop.signal else 0


@dataclass
class Replay:
    """Rebuild the model from its base weights and a ledger file, and verify everything on the way."""

    file: Annotated[Positional[Path], arg(metavar="FILE|STATE")]
    """What `thinwire ledger` wrote, or a state folder that holds all payloads."""
    base: Annotated[Path | None, optional(metavar="FILE")] = None
    """The base weights (safetensors), if the run began with some."""
    task: Annotated[str | None, optional(metavar="MODULE:FUNCTION")] = None
    """The run's custom task, importable here."""
    output: Annotated[Path | None, optional(aliases=["-o"], metavar="FILE")] = None
    """Write the weights here (safetensors), once all is verified."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object with the result on stdout."""

    def run(self) -> int:
        from .replay import replay

        refuse_file("-o", self.output)
        with stop_on_signals() as stop:
            result = replay(
                self.file, base=self.base, import_path=self.task, output=self.output, stopped=stop.is_set
            )
        if result is None:
            return 128 + stop.signal
        if self.json:
            to_stdout(json.dumps(dataclasses.asdict(result)))
        return 0


@dataclass
class Export:
    """Save a run's newest weights (model.safetensors) and what they are (config.json): of a live run by its
    ticket, of any run from a state folder.

    Of a model of transformers: a folder that transformers loads, or peft if adapters were trained.
    """

    ticket: Annotated[Positional[str], arg(metavar="TICKET|STATE")]
    """The line that the coordinator printed; - reads it from standard input, @FILE from a file. Or a state
    folder, a node's or a coordinator's: then no server and no network is needed."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="DIR")]
    task: Annotated[str | None, optional(metavar="MODULE:FUNCTION")] = None
    """The run's custom task, importable here."""
    own: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Of a node's state folder, in gossip: the node's own model, not the reference model."""
    merged: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Of a run that trains adapters: the whole model with them in its weights, if that says the same."""

    def run(self) -> int:
        from .ledger_command import export, export_state
        from .offline import state_folder

        refuse_folder("-o", self.output)
        if (folder := state_folder(self.ticket)) is not None:
            export_state(folder, self.output, self.task, self.own, self.merged)
            return 0
        if self.own:
            raise ConfigError("--own: a node's own model is in its state folder: name that, not a ticket")
        with stop_on_signals() as stop:
            try:
                export(read_ticket(self.ticket), self.output, self.task, stop, self.merged)
            except ThinwireError:
                if not stop.is_set():
                    raise
        return 128 + stop.signal if stop.signal else 0


_What = Literal[
    "set", "extend", "pause", "resume", "stop", "ban", "unban", "rotate-token", "open", "invited", "listed",
    "seats", "replace", "remove",
]  # fmt: skip
_GUARDING = ("ban", "unban", "rotate-token", "open", "invited", "listed")


@dataclass
class Run:
    """Change a run for everybody, while it trains or after its end, by a signed record of its ledger.

      thinwire run STATE extend --rounds 100                 a running or finished run has more rounds
      thinwire run STATE set strategy.lr=0.001               from the next round on, the same on all nodes
      thinwire run STATE pause | resume | stop
      thinwire run STATE ban | unban 12D3Koo...              by its peer id, of thinwire status --json
      thinwire run STATE rotate-token                        a new ticket; older ones let nobody new in
      thinwire run STATE open | invited | listed PEER ...    who comes in from now on, as [admission] says
      thinwire run STATE seats 3                             so many coordinators, see coordinator --replica
      thinwire run STATE replace | remove 12D3Koo...         one of its coordinators

    It needs the coordinator's state folder (the key in it), on its machine; a ticket does not suffice.
    Without a running coordinator the record is written at once, and holds when it is started again. Bans and
    tokens stand in the state folder instead of the ledger, and hold at once.
    """

    state: Annotated[Positional[Path], arg(metavar="STATE")]
    """The coordinator's state folder."""
    what: Annotated[Positional[_What], arg(metavar="WHAT")]
    """set KEY=VALUE ..., extend --rounds N, resume, and after the open round: pause, stop; ban PEER ...,
    unban PEER ..., rotate-token; open, invited, listed PEER ...; seats N, replace PEER, remove PEER."""
    settings: Annotated[Positional[tuple[str, ...]], optional(metavar="KEY=VALUE|PEER")] = ()
    """run.rounds, schedule.name, schedule.warmup_rounds, schedule.final_factor, schedule.batch_samples, and
    of the strategy its lr, weight_decay and what else acts in a round only."""
    rounds: Annotated[int | None, optional(metavar="N")] = None
    """With extend: so many more."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """section.key=value, changed by the same record as extend; may be repeated."""

    def run(self) -> int:
        with stop_on_signals() as stop:
            try:
                to_stdout(self._done(stop))
            except ThinwireError:
                if not stop.is_set():
                    raise
        return 128 + stop.signal if stop.signal else 0

    def _done(self, stop: Stop) -> str:
        from .run_command import change_run, guard_run, seat_run

        if self.what == "seats" or self.what == "replace" or self.what == "remove":  # noqa: PLR1714 - narrows
            if self.rounds is not None or self.set:
                raise ConfigError(f"{self.what} takes neither --rounds nor --set")
            return seat_run(self.state, self.what, self.settings, stop)
        if self.what in _GUARDING:
            if self.rounds is not None or self.set:
                raise ConfigError(f"{self.what} takes neither --rounds nor --set")
            return guard_run(self.state, cast("Guard", self.what), self.settings, stop)
        settings = overrides_of((*self.settings, *self.set))
        return change_run(self.state, cast("What", self.what), self.rounds, settings, stop)


@dataclass
class Doctor:
    """Check this machine: arithmetic, devices, kernels, memory, disk, ports. With a ticket, also whether it
    can reach that run's coordinator and take part.

    A tick or a remedy per line; exit code 1 if something must be mended. Nothing is left behind.
    """

    ticket: Annotated[Positional[str | None], optional(metavar="TICKET")] = None
    """The line that the coordinator printed; - reads it from standard input, @FILE from a file."""
    state: Annotated[Path | None, optional(metavar="DIR")] = None
    """Where a node or a coordinator would keep its state. Default: ~/.local/state/thinwire"""
    host: str = "0.0.0.0"
    port: int = 0
    """The TCP port that it would listen on; 0 takes a free one."""
    announce: UseAppendAction[tuple[str, ...]] = ()
    """An address that others would reach this machine by; may be repeated."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object on stdout."""

    def run(self) -> int:
        from ..doctor.command import doctor

        with stop_on_signals() as stop:
            is_ok = doctor(
                None if self.ticket is None else read_ticket(self.ticket),
                state=self.state,
                host=self.host,
                port=self.port,
                announce=self.announce,
                as_json=self.json,
                stopped=stop.is_set,
            )
        return 128 + stop.signal if stop.signal else int(not is_ok)


@dataclass
class Monitor:
    """Write a ready configuration of Prometheus, Alertmanager and Grafana for a run into a folder, and say
    how to start them: a dashboard, rules, and alerts that name the next command.

    The coordinator must serve HTTP (thinwire coordinator ... --http HOST:PORT). With a ticket this finds out
    by itself where; nodes need nothing. Run it where Prometheus is to run:

      thinwire monitor tw1-...                                        into ./RUN-monitoring
      thinwire monitor tw1-... swarm --http-token TOKEN               into ./swarm
      thinwire monitor --coordinator http://10.0.0.5:9100 swarm       without a ticket, or through a tunnel
    """

    ticket: Annotated[Positional[str | None], optional(metavar="TICKET")] = None
    """The line that the coordinator printed; - reads it from standard input. Left out with --coordinator."""
    folder: Annotated[Positional[Path | None], optional(metavar="FOLDER")] = None
    """Default: ./NAME-monitoring"""
    coordinator: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="URL")] = ()
    """Where the coordinator's HTTP is reached from here; may be repeated: of several name all."""
    http_token: Annotated[str | None, optional(metavar="TOKEN")] = None
    """What the coordinator's --http-token says. Default: $THINWIRE_HTTP_TOKEN, or none"""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write over what is in the folder; alertmanager.yml and data are kept."""

    def run(self) -> int:
        from .monitor import how_to_start, monitor

        ticket, folder = self.ticket, self.folder
        if self.coordinator and folder is None and ticket is not None:
            folder, ticket = Path(ticket), None
        first, others = (*self.coordinator, None)[0], self.coordinator[1:]
        token = self.http_token or os.environ.get("THINWIRE_HTTP_TOKEN") or None
        ticket = None if ticket is None else read_ticket(ticket)
        with stop_on_signals() as stop:
            written, address = monitor(ticket, first, folder, token, force=self.force, others=others)
        to_stdout(how_to_start(written, address))
        return 128 + stop.signal if stop.signal else 0


@dataclass
class Compare:
    """Train a run's model with several strategies, one after another, on the same data for the same number of
    tokens, and compare: held-out loss, bytes, time. All peers are threads of this process. One peer alone and
    data-parallel AdamW (ddp) are always trained, too, and a sentence says what to take on the link.

    strategies: NAME or NAME:COMPRESSOR, each with options if need be, as in a run file:
    decoupled:topk(k=8,bits=2), diloco(lr=1e-3,inner_steps=20), spsa(probes=4), ddp(lr=1e-3). A FILE.toml has
    a table for each strategy. The run file's options are those of the strategy that it names.
    """

    run_file: Annotated[Positional[Path], arg(metavar="RUN.toml")]
    """What is to be trained; thinwire init writes one."""
    strategies: Annotated[str, arg(metavar="A,B,...")] = "decoupled,diloco,spsa"
    rounds: Annotated[int | None, optional(metavar="N")] = None
    """Of the run file's strategy; the others have as many as take the same tokens. Default: the run's."""
    peers: Annotated[int | None, optional(metavar="N")] = None
    """Default: the run's min_peers, but two at least."""
    link: Annotated[str, arg(metavar="RATE")] = "100Mbit"
    """What each peer would have in either direction, for the losses at equal time: 10Mbit, 1.5MB/s, ..."""
    rtt_ms: Annotated[float, arg(metavar="MS")] = 50.0
    """There and back between a peer and the coordinator, in milliseconds."""
    tune: Annotated[int, arg(metavar="N")] = 1
    """Learning rates tried for every row, each three times the last: all for a quarter of the rounds, the
    better half for twice as long, and so on. 1: the rate as it is."""
    seeds: Annotated[int, arg(metavar="N")] = 1
    """Trainings of every row, each from weights and batches of its own; losses are their means."""
    split: Annotated[str | None, optional(metavar="labels:K|dirichlet:A")] = None
    """Uneven data: every peer sees K classes, or each class is dealt out by Dirichlet(A). Classes are the
    labels, or sections of text. Default: every peer draws from all data."""
    jobs: Annotated[int, arg(metavar="N")] = 1
    """Trainings at a time, each in a process: as many cores are taken. Losses are the same; times are CPU
    time, and a core is slower where all are taken."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """section.key=value, instead of what the file says; may be repeated."""
    task: Annotated[str | None, optional(metavar="MODULE:FUNCTION")] = None
    """A task of your own, importable here."""
    output: Annotated[Path | None, optional(aliases=["-o"], metavar="FILE.png")] = None
    """The picture: loss against bytes and against steps. Default: ./NAME-compare.png"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object on stdout instead of the table."""

    def run(self) -> int:
        from ..compare.view import compare_command

        refuse_below("--rounds", self.rounds, 1, "rounds of the run's own strategy, e.g. 200")
        refuse_below("--peers", self.peers, 1, "threads of this process that train, e.g. 2")
        refuse_below("--tune", self.tune, 1, "learning rates of every row, e.g. 3")
        refuse_below("--seeds", self.seeds, 1, "trainings of every row, e.g. 3")
        refuse_below("--jobs", self.jobs, 1, "trainings at a time, e.g. 8")
        with stop_on_signals() as stop:
            code = compare_command(
                self.run_file,
                self.strategies,
                rounds=self.rounds,
                peers=self.peers,
                overrides=overrides_of(self.set),
                import_path=self.task,
                output=self.output,
                as_json=self.json,
                stopped=stop.is_set,
                link=self.link,
                rtt_ms=self.rtt_ms,
                n_rates=self.tune,
                n_seeds=self.seeds,
                split=self.split,
                n_jobs=self.jobs,
            )
        return 128 + stop.signal if stop.signal else code


def _ticket_or_state(text: str) -> str:
    from .offline import state_folder

    return text if state_folder(text) is not None else read_ticket(text)
