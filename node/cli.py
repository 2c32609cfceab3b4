"""The command line. Heavy modules load inside the commands, so that --help is quick.

Exit codes: 0 ok, 1 failed, 2 usage, 3 swarm unreachable, 4 incompatible, 130 and 143 on signals.
Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from thinwire.compression.errors import ConfigError, ThinwireError
from thinwire.node.processes import end_with_parent

if TYPE_CHECKING:
    from thinwire.coordinator.addresses import HttpAddress

log = logging.getLogger("thinwire.cli")


@dataclass
class Demo:
    """A swarm on this machine: a coordinator and some nodes as processes, real text, a live table.

    One node is killed at a third of the way and started again; the others go on without it.
    Ends by itself (2 minutes on 2 cores). Nothing is downloaded and nothing is left behind.
    """

    strategy: Literal["decoupled", "spsa"] = "decoupled"
    """decoupled: train from scratch, sending the fast part of the momentum. spsa: train like that for a
    moment, then fine-tune on other text with one byte per probe."""
    peers: Annotated[int, arg(metavar="N")] = 4
    rounds: Annotated[int | None, arg(metavar="N")] = None
    """Rounds to train. Default: 150 (decoupled), 55 (spsa)."""
    ranks: Annotated[str, arg(metavar="N,M,...")] = "1"
    """Ranks of the nodes, over and over: with 1,2 every other node shards its model over two processes."""
    faults: bool = True
    """Kill one node on the way and start it again."""
    http: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Serve the swarm's own page here while it runs; and /metrics, /sd and /healthz for Prometheus. Port 0: a
    free one."""
    http_token: Annotated[str | None, arg(metavar="TOKEN")] = None
    """Whoever asks must show it: Authorization: Bearer TOKEN, or once /?token=TOKEN in a browser. Default:
    $THINWIRE_HTTP_TOKEN, or none"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object with the results on stdout."""

    def run(self) -> int:
        from thinwire.node.demo import Plan, run_demo

        if not 1 <= self.peers <= 32:
            raise ConfigError("--peers: between 1 and 32 on one machine")
        if self.rounds is not None and self.rounds < 5:
            raise ConfigError("--rounds: at least 5, or there is nothing to see")
        rounds = self.rounds or {"decoupled": 150, "spsa": 55}[self.strategy]
        http = _http(self.http, self.http_token)
        with stop_on_signals() as stop:
            plan = Plan(self.strategy, self.peers, rounds, self.faults, _ranks(self.ranks), http)
            result = run_demo(plan, stop.is_set)
        if stop.signal:
            return 128 + stop.signal
        if self.json:
            print(json.dumps(result))  # noqa: T201 - data goes to stdout
        return 0


@dataclass
class Coordinator:
    """Start a run, or continue it: keeps the ledger, opens and closes rounds, prints one ticket.

    Give the ticket to everybody who is to join. Stop it with Ctrl-C and start it again with the same
    command: nodes wait, reconnect and go on.
    """

    run_file: Annotated[Positional[Path], arg(metavar="RUN.toml")]
    state: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where ledger, key, token and payloads are kept. Default: ./NAME-coordinator"""
    host: str = "0.0.0.0"
    port: int = 0
    """TCP port; 0 picks a free one at the first start and keeps it."""
    announce: UseAppendAction[tuple[str, ...]] = ()
    """An address that others reach this machine by (/ip4/1.2.3.4/tcp/4001); may be repeated."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """section.key=value, instead of what the file says; may be repeated."""
    task: Annotated[str | None, arg(metavar="MODULE:FUNCTION")] = None
    """A task of your own, importable here; nodes need the same."""
    ticket_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the ticket here, too, readable by this user alone: nodes on the same disk join @FILE."""
    ban: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="PEER")] = ()
    """Never let this peer in again (its id is in thinwire status); may be repeated. Kept in DIR/banned."""
    rotate_token: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make a new ticket: those given out so far let nobody in any more."""
    http: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Serve the swarm's own page here; and for Prometheus /metrics, /sd (every node as a target), /healthz,
    /readyz."""
    http_token: Annotated[str | None, arg(metavar="TOKEN")] = None
    """Whoever asks must show it: Authorization: Bearer TOKEN, or once /?token=TOKEN in a browser. Default:
    $THINWIRE_HTTP_TOKEN, or none"""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def run(self) -> int:
        from thinwire.node.coordinate import coordinate

        with stop_on_signals() as stop:
            coordinate(
                run_file=self.run_file,
                state=self.state,
                host=self.host,
                port=self.port,
                announce=self.announce,
                overrides=_overrides(self.set),
                import_path=self.task,
                ticket_file=self.ticket_file,
                rotate_token=self.rotate_token,
                ban=self.ban,
                http=_http(self.http, self.http_token),
                stop=stop,
            )
        return 128 + stop.signal if stop.signal else 0


@dataclass
class Join:
    """Start a node: join the run that a ticket names and train until its last round.

    The run's configuration, model and base weights come from the swarm. Ctrl-C leaves cleanly.
    """

    ticket: Annotated[Positional[str], arg(metavar="TICKET")]
    """The line that the coordinator printed; - reads it from standard input, @FILE from a file."""
    data: Annotated[Path | None, arg(metavar="FILE")] = None
    """Train on your own text (a file or a folder) instead of the run's. It stays on this machine."""
    task: Annotated[str | None, arg(metavar="MODULE:FUNCTION")] = None
    """The run's custom task, importable here."""
    state: Annotated[Path | None, arg(metavar="DIR")] = None
    """Identity, ledger and snapshots are kept here: after a restart the node is the same peer and goes on
    where it was. Default: the first of ~/.local/state/thinwire/node-0, node-1, ... that nobody uses."""
    device: str = "auto"
    """Where to train: cpu, cuda (all GPUs), cuda:1, ...; auto: cuda if there is a GPU."""
    ranks: Annotated[int | None, arg(metavar="N")] = None
    """Processes among which the model is sharded (FSDP), each with a GPU or on the CPU. Default: one for each
    GPU, or 1 on the CPU. The others in the swarm cannot tell."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of local work; what is kept and sent stays what it is. auto: torch.autocast to bfloat16 on GPUs that
    have it, but for spsa. bf16: forward and backward wholly in bfloat16."""
    activation_checkpointing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compute each block again in the backward pass: less memory, more time."""
    cpu_offload: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep parameters in the machine's memory instead of the GPU's."""
    restart: Annotated[int, arg(metavar="N")] = 0
    """Start the node again, from its snapshot, up to N times when it breaks."""
    threads: Annotated[int | None, arg(metavar="N")] = None
    """CPU threads for training, of each rank. Default: all cores, dealt among the ranks."""
    host: str = "0.0.0.0"
    port: int = 0
    announce: UseAppendAction[tuple[str, ...]] = ()
    """An address that others reach this machine by; may be repeated."""
    max_upload: Annotated[str | None, arg(metavar="RATE")] = None
    """Never send more than this, e.g. 20kB/s, 1.5MB/s or 8Mbit/s, over any ten seconds."""
    patience_s: float = 600.0
    """Seconds to keep trying when the coordinator does not answer any more."""
    http: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Serve Prometheus here: /metrics, /healthz, /readyz. The coordinator's gateway has a node's metrics also
    without it."""
    http_token: Annotated[str | None, arg(metavar="TOKEN")] = None
    """Whoever asks must show it: Authorization: Bearer TOKEN, or once /?token=TOKEN in a browser. Default:
    $THINWIRE_HTTP_TOKEN, or none"""
    track: UseAppendAction[tuple[Literal["tensorboard", "wandb"], ...]] = ()
    """Records of this node's rounds for TensorBoard (in its state folder) or Weights & Biases, too; may be
    repeated. JSON lines are always there: track.jsonl."""
    save: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the trained weights here (safetensors) after the last round."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object with the result on stdout."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def run(self) -> int:
        from thinwire.node.join import Options, join

        with stop_on_signals() as stop:
            result = join(
                Options(
                    ticket=_read_ticket(self.ticket),
                    data=self.data,
                    import_path=self.task,
                    state=self.state,
                    device=self.device,
                    threads=self.threads,
                    host=self.host,
                    port=self.port,
                    announce=self.announce,
                    max_upload=self.max_upload,
                    patience_s=self.patience_s,
                    http=_http(self.http, self.http_token),
                    save=self.save,
                    ranks=self.ranks,
                    precision=self.precision,
                    activation_checkpointing=self.activation_checkpointing,
                    cpu_offload=self.cpu_offload,
                    restart=self.restart,
                    track=self.track,
                ),
                stop,
            )
        if stop.signal or result is None:
            return 128 + stop.signal
        if self.json:
            print(json.dumps(dataclasses.asdict(result)))  # noqa: T201 - data goes to stdout
        return 0


@dataclass
class Status:
    """Show a run: peers, round, losses, bytes, fingerprints. Needs only the ticket."""

    ticket: Annotated[Positional[str], arg(metavar="TICKET")]
    """The line that the coordinator printed; - reads it from standard input, @FILE from a file."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object on stdout (with --watch: one a line)."""
    watch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Again and again until the run ends or Ctrl-C."""

    def run(self) -> int:
        from thinwire.node.view import show_status

        with stop_on_signals() as stop:
            show_status(_read_ticket(self.ticket), as_json=self.json, watch=self.watch, stopped=stop.is_set)
        return 128 + stop.signal if stop.signal else 0


@dataclass
class Ledger:
    """Save a run's whole ledger as one file, or verify such a file.

    While it reads, it is admitted to the swarm like a node that never trains; nobody waits for it.
    """

    ticket: Annotated[Positional[str | None], arg(metavar="TICKET")] = None
    """The line that the coordinator printed; - reads it from standard input, @FILE from a file."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="FILE")] = None
    """Write the ledger here: signed records, and the payloads that they name."""
    check: Annotated[Path | None, arg(metavar="FILE")] = None
    """Verify this file, without a network, and name its first bad record."""

    def run(self) -> int:
        from thinwire.node.ledger_command import check_ledger, save_ledger

        if self.check is not None:
            if self.ticket is not None or self.output is not None:
                raise ConfigError("--check FILE takes neither a ticket nor -o")
            check_ledger(self.check)
            return 0
        if self.ticket is None or self.output is None:
            raise ConfigError("write it as thinwire ledger TICKET -o FILE, or thinwire ledger --check FILE")
        with stop_on_signals() as stop:
            try:
                save_ledger(_read_ticket(self.ticket), self.output, stop)
            except ThinwireError:
                if not stop.is_set():
                    raise
        return 128 + stop.signal if stop.signal else 0


@dataclass
class Replay:
    """Rebuild the model from its base weights and a ledger file, and verify everything on the way."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """What `thinwire ledger` wrote."""
    base: Annotated[Path | None, arg(metavar="FILE")] = None
    """The base weights (safetensors), if the run began with some."""
    task: Annotated[str | None, arg(metavar="MODULE:FUNCTION")] = None
    """The run's custom task, importable here."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="FILE")] = None
    """Write the weights here (safetensors), once all is verified."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object with the result on stdout."""

    def run(self) -> int:
        from thinwire.node.replay import replay

        with stop_on_signals() as stop:
            result = replay(
                self.file, base=self.base, import_path=self.task, output=self.output, stopped=stop.is_set
            )
        if result is None:
            return 128 + stop.signal
        if self.json:
            print(json.dumps(dataclasses.asdict(result)))  # noqa: T201 - data goes to stdout
        return 0


@dataclass
class Export:
    """Save the newest weights of a live run (model.safetensors) and what they are (config.json).

    Of a model of transformers: a folder that transformers loads, or peft if adapters were trained.
    """

    ticket: Annotated[Positional[str], arg(metavar="TICKET")]
    """The line that the coordinator printed; - reads it from standard input, @FILE from a file."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="DIR")]
    task: Annotated[str | None, arg(metavar="MODULE:FUNCTION")] = None
    """The run's custom task, importable here."""

    def run(self) -> int:
        from thinwire.node.ledger_command import export

        with stop_on_signals() as stop:
            try:
                export(_read_ticket(self.ticket), self.output, self.task, stop)
            except ThinwireError:
                if not stop.is_set():
                    raise
        return 128 + stop.signal if stop.signal else 0


@dataclass
class Doctor:
    """Check this machine: arithmetic, devices, kernels, memory, disk, ports. With a ticket, also whether it
    can reach that run's coordinator and take part.

    A tick or a remedy per line; exit code 1 if something must be mended. Nothing is left behind.
    """

    ticket: Annotated[Positional[str | None], arg(metavar="TICKET")] = None
    """The line that the coordinator printed; - reads it from standard input, @FILE from a file."""
    state: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where a node or a coordinator would keep its state. Default: ~/.local/state/thinwire"""
    host: str = "0.0.0.0"
    port: int = 0
    """The TCP port that it would listen on; 0 takes a free one."""
    announce: UseAppendAction[tuple[str, ...]] = ()
    """An address that others would reach this machine by; may be repeated."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object on stdout."""

    def run(self) -> int:
        from thinwire.node.doctor import doctor

        with stop_on_signals() as stop:
            is_ok = doctor(
                None if self.ticket is None else _read_ticket(self.ticket),
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

    ticket: Annotated[Positional[str | None], arg(metavar="TICKET")] = None
    """The line that the coordinator printed; - reads it from standard input. Left out with --coordinator."""
    folder: Annotated[Positional[Path | None], arg(metavar="FOLDER")] = None
    """Default: ./NAME-monitoring"""
    coordinator: Annotated[str | None, arg(metavar="URL")] = None
    """Where the coordinator's HTTP is reached from here."""
    http_token: Annotated[str | None, arg(metavar="TOKEN")] = None
    """What the coordinator's --http-token says. Default: $THINWIRE_HTTP_TOKEN, or none"""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write over what is in the folder; alertmanager.yml and data are kept."""

    def run(self) -> int:
        from thinwire.node.monitor import how_to_start, monitor

        ticket, folder = self.ticket, self.folder
        if self.coordinator is not None and folder is None and ticket is not None:
            folder, ticket = Path(ticket), None
        token = self.http_token or os.environ.get("THINWIRE_HTTP_TOKEN") or None
        ticket = None if ticket is None else _read_ticket(ticket)
        with stop_on_signals() as stop:
            written, address = monitor(ticket, self.coordinator, folder, token, force=self.force)
        print(how_to_start(written, address))  # noqa: T201 - what the user does next
        return 128 + stop.signal if stop.signal else 0


@dataclass
class Compare:
    """Train a run's model with several strategies, one after another, on the same data for the same number of
    tokens, and compare: held-out loss, bytes, time. All peers are threads of this process.

    strategies: NAME or NAME:COMPRESSOR, each with options if need be, as in a run file:
    decoupled:topk(k=8,bits=2), diloco(lr=1e-3,inner_steps=20), spsa(probes=4). ddp is data-parallel AdamW. A
    FILE.toml has a table for each strategy. The run file's options are those of the strategy that it names.
    """

    run_file: Annotated[Positional[Path], arg(metavar="RUN.toml")]
    strategies: Annotated[str, arg(metavar="A,B,...")] = "ddp,decoupled,diloco,spsa"
    rounds: Annotated[int | None, arg(metavar="N")] = None
    """Of the run file's strategy; the others have as many as take the same tokens. Default: the run's."""
    peers: Annotated[int | None, arg(metavar="N")] = None
    """Default: the run's min_peers, but two at least."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """section.key=value, instead of what the file says; may be repeated."""
    task: Annotated[str | None, arg(metavar="MODULE:FUNCTION")] = None
    """A task of your own, importable here."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="FILE.png")] = None
    """The picture: loss against bytes and against steps. Default: ./NAME-compare.png"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object on stdout instead of the table."""

    def run(self) -> int:
        from thinwire.node.compare_view import compare_command

        with stop_on_signals() as stop:
            code = compare_command(
                self.run_file,
                self.strategies,
                rounds=self.rounds,
                peers=self.peers,
                overrides=_overrides(self.set),
                import_path=self.task,
                output=self.output,
                as_json=self.json,
                stopped=stop.is_set,
            )
        return 128 + stop.signal if stop.signal else code


@dataclass
class Ray:
    """Train on a Ray cluster: coordinator and peers are actors, a placement group for each peer. Connects to
    the cluster of this machine, or starts one for this run alone.

    thinwire and its extra [ray] must be installed on every machine of the cluster. Ctrl-C leaves cleanly; the
    same command continues the run from its state folder. Prints the folder of the trained weights.
    """

    run_file: Annotated[Positional[Path], arg(metavar="RUN.toml")]
    peers: Annotated[int | None, arg(metavar="N")] = None
    """Peers of the same kind. Default: 2, or those of --peer."""
    gpus_per_peer: Annotated[int, arg(metavar="N")] = 0
    """Each with a rank of its own, all on one machine. Default: peers train on CPUs."""
    cpus_per_peer: Annotated[float | None, arg(metavar="N")] = None
    """Default: 1 for each rank. On a small machine less than 1 lets more peers share it."""
    ranks_per_peer: Annotated[int | None, arg(metavar="N")] = None
    """Processes among which a peer's model is sharded. Default: one for each GPU, or 1."""
    accelerator_type: Annotated[str | None, arg(metavar="TYPE")] = None
    """As Ray calls it: H100, A100, L4, T4, ..."""
    peer: UseAppendAction[tuple[str, ...]] = ()
    """More peers of another kind, COUNT:gpus=N,type=NAME,cpus=N,ranks=N; may be repeated."""
    address: Annotated[str | None, arg(metavar="ADDRESS")] = None
    """auto, HOST:PORT, or local for a cluster of this command's own. Default: $RAY_ADDRESS, else auto, else
    local."""
    state: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where the coordinator keeps the ledger, on this machine. Default: ./NAME-ray"""
    node_state: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where peers keep snapshots, on their machines; a shared folder where machines come and go. Default:
    ~/.local/state/thinwire/ray"""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="DIR")] = None
    """Where the trained weights go. Default: weights in the state folder"""
    rounds: Annotated[int | None, arg(metavar="N")] = None
    """Instead of run.rounds."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """section.key=value, instead of what the file says; may be repeated."""
    task: Annotated[str | None, arg(metavar="MODULE:FUNCTION")] = None
    """A task of your own, importable here and on every machine of the cluster."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of local work; see thinwire join."""
    wait: Annotated[float | None, arg(metavar="SECONDS")] = None
    """For room in a cluster that grows by itself. Default: 20, and none if it is too small."""
    restarts: Annotated[int, arg(metavar="N")] = 10
    """How often the actor of a peer is started again after it died; -1: always."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object with the result on stdout."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the logs of the actors, too."""

    def run(self) -> int:
        from thinwire.node.ray_command import Asked, ray_command

        kinds = (self.gpus_per_peer, self.cpus_per_peer, self.ranks_per_peer, self.accelerator_type)
        rounds = {} if self.rounds is None else {"run.rounds": self.rounds}
        with stop_on_signals() as stop:
            ray_command(
                self.run_file,
                Asked(self.peers, *kinds, self.peer),
                overrides={**rounds, **_overrides(self.set)},
                as_json=self.json,
                stop=stop,
                address=self.address,
                state=self.state,
                node_state=self.node_state,
                output=self.output,
                task=self.task,
                precision=self.precision,
                wait_s=self.wait,
                restarts=self.restarts,
                verbose=self.verbose,
            )
        return 128 + stop.signal if stop.signal else 0


@dataclass
class Bench:
    """Measure speed and memory, as ratios to a baseline and to the copy bandwidth of this machine."""

    name: Annotated[
        Positional[
            Literal["noise", "decoupled", "diloco", "peers", "round", "join", "wire", "memory", "ray", "all"]
        ],
        arg(metavar="NAME"),
    ]
    """noise (SPSA), decoupled and diloco (pack, decode, update), peers (1 to 256 payloads), round (8 peers on
    loopback), join (process to first offer, catching up), wire (bits per coefficient), memory (of a rank of a
    sharded node), ray (round of 4 actors on a Ray cluster of its own), or all, but for ray."""
    params: Annotated[str | None, arg(metavar="N,...")] = None
    """Parameters of the model, e.g. 3e7, or 1e6,1e8 for a column each."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="FILE.png")] = None
    """A picture of the times, or bytes."""
    repeats: Annotated[int, arg(metavar="N")] = 5
    device: Literal["cpu", "cuda"] = "cpu"
    """Where noise, decoupled, diloco and peers run."""
    against: Annotated[Path | None, arg(metavar="FILE")] = None
    """What --json printed before: its figures beside the new ones, and which got worse than their noise."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def run(self) -> int:
        from thinwire.node.bench import bench_command, parse_sizes

        sizes = None if self.params is None else parse_sizes(self.params)
        bench_command(self.name, sizes, self.repeats, self.json, self.output, self.device, self.against)
        return 0


Command = Annotated[
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Coordinator, tyro.conf.subcommand("coordinator")]
    | Annotated[Join, tyro.conf.subcommand("join")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Ledger, tyro.conf.subcommand("ledger")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Monitor, tyro.conf.subcommand("monitor")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Ray, tyro.conf.subcommand("ray")]
    | Annotated[Bench, tyro.conf.subcommand("bench")],
    None,
]


@dataclass
class Stop:
    """Set by the first signal; `on_stop` callbacks run in the signal handler."""

    signal: int = 0
    on_stop: list[Callable[[], object]] = field(default_factory=list)

    def is_set(self) -> bool:
        return self.signal != 0


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """The first Ctrl-C, SIGTERM or SIGHUP asks to stop cleanly, the second one stops at once."""
    stop = Stop()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.signal = number
        log.warning("%s: leaving cleanly (again to stop at once)", signal.Signals(number).name)
        for callback in stop.on_stop:
            callback()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _ranks(text: str) -> tuple[int, ...]:
    counts = text.split(",")
    if not all(count.isdigit() and 1 <= int(count) <= 8 for count in counts):
        raise ConfigError(f"--ranks {text}: numbers from 1 to 8 with commas between them, for example 1,2")
    return tuple(int(count) for count in counts)


def _read_ticket(text: str) -> str:
    if text == "-":
        return sys.stdin.readline().strip()
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not text"
        raise ConfigError(
            f"the ticket in {text[1:]}: {why}; thinwire coordinator --ticket-file writes one"
        ) from e


def _http(text: str | None, token: str | None) -> HttpAddress | None:
    from thinwire.coordinator.addresses import HttpAddress

    if text is None:
        if token is not None:
            raise ConfigError("--http-token protects what --http HOST:PORT serves: say that, too")
        return None
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--http {text}: write it as HOST:PORT, for example 127.0.0.1:9100")
    return HttpAddress(host.strip("[]"), int(port), token or os.environ.get("THINWIRE_HTTP_TOKEN") or None)


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    from thinwire.node.config import literal

    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or "." not in key:
            raise ConfigError(f"--set {pair}: write it as section.key=value, for example run.rounds=500")
        overrides[key] = literal(value)
    return overrides


def log_to_stderr(level: int, prefix: str = "") -> None:
    """What thinwire logs, for people to read."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("thinwire")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False


def main(argv: Sequence[str] | None = None) -> int:
    """The `thinwire` command. Returns the exit code."""
    # Before torch is loaded, whose threads else spin while they have nothing to do: where a machine does
    # anything besides, a step of a small model took ten times the CPU time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = tyro.cli(
        Command,
        prog="thinwire",
        description="Train one model on many machines joined by thin, unreliable links.",
        args=argv,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )
    end_with_parent()
    tells_itself = isinstance(command, Bench | Compare | Demo | Doctor | Status)  # shown, not logged
    chatty = logging.DEBUG if getattr(command, "verbose", False) else logging.INFO
    log_to_stderr(logging.WARNING if tells_itself else chatty)
    try:
        code: int = command.run()
    except ThinwireError as e:
        print(f"thinwire: {e}", file=sys.stderr)  # noqa: T201 - the one place where errors are shown
        return e.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code


if __name__ == "__main__":
    sys.exit(main())
