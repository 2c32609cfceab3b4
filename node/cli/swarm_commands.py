"""The commands that start swarms, and those that take part in one. What they do is loaded when they run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from ...compression.errors import ConfigError
from ...coordinator.protocol.files import refuse_in_use
from ..founding.child import Child
from ..system.folder import folder_of_run
from ..system.output import to_stdout
from ..system.places import refuse_below, refuse_folder, refuse_http
from ..system.stopping import Stop, stop_on_signals
from .arguments import http_address, optional, overrides_of, read_ticket, seconds_of


@dataclass
class Demo:
    """A swarm on this machine: a coordinator and some nodes as processes, real text, a live table.

    One node is killed at a third of the way and started again; the others go on without it.
    Ends by itself (about a minute on 2 idle cores). Nothing is downloaded and nothing is left behind.
    """

    strategy: Literal["decoupled", "spsa", "gossip"] = "decoupled"
    """decoupled: train from scratch, sending the fast part of the momentum. spsa: train like that for a
    moment, then fine-tune on other text with one byte per probe. gossip: every peer has a model of its own,
    which it mixes with its neighbours'."""
    peers: Annotated[int, arg(metavar="N")] = 4
    rounds: Annotated[int | None, optional(metavar="N")] = None
    """Rounds to train. Default: 120 (decoupled), 55 (spsa), 60 (gossip, of 4 steps each)."""
    ranks: Annotated[str, arg(metavar="N,M,...")] = "1"
    """Ranks of the nodes, over and over: with 1,2 every other node shards its model over two processes."""
    coordinators: Annotated[int, arg(metavar="N")] = 1
    """How many order the run: of 3 the one that leads is killed on the way, too, and the others go on."""
    faults: bool = True
    """Kill one node on the way and start it again; of several coordinators the one that leads, too."""
    http: Annotated[str | None, optional(metavar="HOST:PORT")] = None
    """Serve the swarm's own page here while it runs; and /metrics, /sd and /healthz for Prometheus. Port 0: a
    free one."""
    http_token: Annotated[str | None, optional(metavar="TOKEN")] = None
    """Whoever asks must show it: Authorization: Bearer TOKEN, or once /?token=TOKEN in a browser. Default:
    $THINWIRE_HTTP_TOKEN, or none"""
    http_host: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME")] = ()
    """Answer requests by this name, too: those by an IP address, this machine's name or a name without dots
    are answered anyhow; may be repeated."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object with the results on stdout."""

    def run(self) -> int:
        from ..demo.command import run_demo
        from ..demo.plan import DemoPlan

        if not 1 <= self.peers <= 32:
            raise ConfigError("--peers: between 1 and 32 on one machine")
        if self.coordinators not in (1, 3, 5):
            raise ConfigError("--coordinators: 1, 3 (go on when one is lost) or 5 (when two are)")
        if self.rounds is not None and self.rounds < 5:
            raise ConfigError("--rounds: at least 5, or there is nothing to see")
        rounds = self.rounds or {"decoupled": 120, "spsa": 55, "gossip": 60}[self.strategy]
        http = http_address(self.http, self.http_token, self.http_host)
        refuse_http(http)
        with stop_on_signals() as stop:
            ranks = _ranks(self.ranks)
            plan = DemoPlan(self.strategy, self.peers, rounds, self.faults, ranks, http, self.coordinators)
            result = run_demo(plan, stop.is_set)
        if stop.signal:
            return 128 + stop.signal
        if self.json:
            to_stdout(json.dumps(result))
        return 0


@dataclass
class Coordinator:
    """Start a run, or continue it: keeps the ledger, opens and closes rounds, prints one ticket.

    Give the ticket to everybody who is to join. Stop it with Ctrl-C and start it again with the same
    command: nodes wait, reconnect and go on. After the last round it serves for a while (--linger).

    Several coordinators on several machines (--seats 3, then --replica there) go on when one of them is lost.
    """

    run_file: Annotated[Positional[Path | None], optional(metavar="RUN.toml")] = None
    """Not needed where --state has a run already, nor for a --replica."""
    seats: Annotated[int | None, optional(metavar="N")] = None
    """How many coordinators are to order the run: 3 go on when one is lost, 5 when two are. This one writes a
    seat ticket into its state folder, goes on alone, and names the others once so many are up to date."""
    replica: Annotated[str | None, optional(metavar="SEAT_TICKET")] = None
    """Become one of a run's coordinators: the seat ticket of another one, as a file or the line itself. It is
    secret: a ticket to join does not suffice."""
    replace: Annotated[str | None, optional(metavar="PEER")] = None
    """The coordinator that is lost, or whose key is not safe any more, is to go: a replica that is up to date
    takes its place. With --seats one less than there are it goes without a successor."""
    blobs: Literal["seats", "leader"] = "seats"
    """seats: an offer counts once a majority of the coordinators holds its payload. leader: once the leading
    one does; the loss of its disk then loses the payloads of the last rounds. The same for all of
    them."""
    restored: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """This state folder is an older copy of itself: what this coordinator has voted for since is not in it,
    so it votes again once the others have let it in. Backups leave the file DIR/vote out, then this is not
    needed."""
    recover: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Most coordinators are lost for ever: go on alone from here, with the run's recovery key. Nodes and
    coordinators that are still there are asked for the newest round first (--recover-wait)."""
    recovery_key: Annotated[Path | None, optional(metavar="FILE")] = None
    """Default: DIR/recovery-key, where the run's first coordinator wrote it."""
    recover_wait: Annotated[str, arg(metavar="TIME")] = "30s"
    state: Annotated[Path | None, optional(metavar="DIR")] = None
    """Where ledger, key, token and payloads are kept. Default:
    ~/.local/state/thinwire/NAME-coordinator"""
    host: str = "0.0.0.0"
    port: int = 0
    """TCP port; 0 picks a free one at the first start and keeps it."""
    announce: UseAppendAction[tuple[str, ...]] = ()
    """An address that others reach this machine by (/ip4/1.2.3.4/tcp/4001); may be repeated."""
    upload: Annotated[str, arg(metavar="RATE")] = "100Mbit/s"
    """What this machine's line sends. Nodes get payloads from here as far as that goes, so that each uploads
    its own once; beyond it they give them to each other, those with wide lines more than those with narrow
    ones."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """section.key=value, instead of what the file says; may be repeated."""
    task: Annotated[str | None, optional(metavar="MODULE:FUNCTION")] = None
    """A task of your own, importable here; nodes need the same."""
    ticket_file: Annotated[Path | None, optional(metavar="FILE")] = None
    """Write the ticket here, too, readable by this user alone: nodes on the same disk join @FILE."""
    seat_ticket_file: Annotated[Path | None, optional(metavar="FILE")] = None
    """Write the secret seat ticket here, too, readable by this user alone: for --replica on the same disk."""
    ban: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="PEER")] = ()
    """Never let this peer in again (its id is in thinwire status); may be repeated. Kept in DIR/banned."""
    linger: Annotated[str, arg(metavar="TIME")] = "10m"
    """How long to go on serving when the run is over, so that the weights can be had (export, join --save):
    90s, 10m, 2h, forever; 0 ends once every node has the last round: one that is lost without a word is
    waited for, for some 10 s, and any for 60 s at most. A coordinator that is started again on a finished run
    serves it, too."""
    rotate_token: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make a new ticket: those given out so far let no newcomer in any more. Peers that were let in before
    stay, unless --ban names them."""
    http: Annotated[str | None, optional(metavar="HOST:PORT")] = None
    """Serve the swarm's own page here; and for Prometheus /metrics, /sd (every node as a target), /healthz,
    /readyz."""
    http_token: Annotated[str | None, optional(metavar="TOKEN")] = None
    """Whoever asks must show it: Authorization: Bearer TOKEN, or once /?token=TOKEN in a browser. Default:
    $THINWIRE_HTTP_TOKEN, or none"""
    http_host: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME")] = ()
    """Answer requests by this name, too: those by an IP address, this machine's name or a name without dots
    are answered anyhow; may be repeated."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def run(self) -> int:
        state = self._folder()
        is_new = self.run_file is not None and state is not None and not (state / "ledger.db").exists()
        with stop_on_signals() as stop, Child(self.task, stop) as founder:
            if is_new:  # torch is loaded over there while the coordinator is loaded here
                founder.begin()
            return self._coordinate(state, founder, stop)

    def _folder(self) -> Path | None:
        """Of its state; None: the seat ticket says which. Raises ConfigError."""
        if self.state is not None or self.run_file is None:
            return self.state
        from ..config import load_config

        return folder_of_run(load_config(self.run_file, overrides_of(self.set)).run.name, "coordinator")

    def _coordinate(self, state: Path | None, founder: Child, stop: Stop) -> int:
        from ..links.upload_limit import parse_rate
        from .coordinator import SeatOptions, coordinate

        is_over = coordinate(
            run_file=self.run_file,
            state=state,
            host=self.host,
            port=self.port,
            announce=self.announce,
            upload_bytes_per_s=parse_rate(self.upload, "--upload"),
            overrides=overrides_of(self.set),
            founder=founder,
            ticket_file=self.ticket_file,
            rotate_token=self.rotate_token,
            ban=self.ban,
            http=http_address(self.http, self.http_token, self.http_host),
            stop=stop,
            linger_s=seconds_of(self.linger, "--linger"),
            seats=SeatOptions(
                n_seats=self.seats,
                replica=self.replica,
                replace=self.replace,
                keeps_payloads=self.blobs == "seats",
                restored=self.restored,
                recover=self.recover,
                recovery_key=self.recovery_key,
                recover_wait_s=seconds_of(self.recover_wait, "--recover-wait"),
                ticket_file=self.seat_ticket_file,
            ),
        )
        return 128 + stop.signal if stop.signal and not is_over else 0


@dataclass
class Join:
    """Start a node: join the run that a ticket names and train until its last round.

    The run's configuration, model and base weights come from the swarm. Ctrl-C leaves cleanly.
    """

    ticket: Annotated[Positional[str | None], optional(metavar="TICKET")] = None
    """The line that the coordinator printed; - reads it from standard input, @FILE from a file. Without one a
    node that was in a run with several coordinators finds them in its --state."""
    data: Annotated[Path | None, optional(metavar="FILE")] = None
    """Train on your own text (a file or a folder) instead of the run's. It stays on this machine."""
    task: Annotated[str | None, optional(metavar="MODULE:FUNCTION")] = None
    """The run's custom task, importable here."""
    state: Annotated[Path | None, optional(metavar="DIR")] = None
    """Identity, ledger and snapshots are kept here: after a restart the node is the same peer and goes on
    where it was. Default: the first of ~/.local/state/thinwire/node-0, node-1, ... that nobody uses."""
    device: str = "auto"
    """Where to train: cpu, cuda (all GPUs), cuda:1, ...; auto: cuda if there is a GPU."""
    ranks: Annotated[int | None, optional(metavar="N")] = None
    """Processes among which the model is sharded (FSDP), each with a GPU or on the CPU. Default: one for each
    GPU, or 1 on the CPU. The others in the swarm cannot tell."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of local work; what is kept and sent stays what it is. auto: torch.autocast to bfloat16 on GPUs that
    have it, but for spsa. bf16: forward and backward wholly in bfloat16."""
    activation_checkpointing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compute each block again in the backward pass: less memory, more time."""
    cpu_offload: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep parameters in the machine's memory instead of the GPU's."""
    offload_idle: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """diloco: what inner steps do not need waits on the disk meanwhile, in the state folder, or with a GPU in
    the machine's memory: 21 bytes per parameter instead of 28, and the same results."""
    restart: Annotated[int, arg(metavar="N")] = 0
    """Start the node again, from its snapshot, up to N times when it breaks."""
    threads: Annotated[int | None, optional(metavar="N")] = None
    """CPU threads for training, of each rank. Default: all cores, dealt among the ranks."""
    host: str = "0.0.0.0"
    port: int = 0
    announce: UseAppendAction[tuple[str, ...]] = ()
    """An address that others reach this machine by; may be repeated."""
    max_upload: Annotated[str | None, optional(metavar="RATE")] = None
    """Never send more than this, e.g. 20kB/s, 1.5MB/s or 8Mbit/s, over any ten seconds."""
    patience_s: float = 600.0
    """Seconds to keep trying when the coordinator does not answer any more."""
    http: Annotated[str | None, optional(metavar="HOST:PORT")] = None
    """Serve Prometheus here: /metrics, /healthz, /readyz. The coordinator's gateway has a node's metrics also
    without it."""
    http_token: Annotated[str | None, optional(metavar="TOKEN")] = None
    """Whoever asks must show it: Authorization: Bearer TOKEN, or once /?token=TOKEN in a browser. Default:
    $THINWIRE_HTTP_TOKEN, or none"""
    http_host: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME")] = ()
    """Answer requests by this name, too: those by an IP address, this machine's name or a name without dots
    are answered anyhow; may be repeated."""
    track: UseAppendAction[tuple[Literal["tensorboard", "wandb"], ...]] = ()
    """Records of this node's rounds for TensorBoard (in its state folder) or Weights & Biases, too; may be
    repeated. JSON lines are always there: track.jsonl."""
    evaluate: Annotated[str | None, optional(metavar="FUNCTION")] = None
    """This node evaluates the weights as the run's [eval] asks for, beside its training: name what that says,
    package.module:function or lm-eval; code never comes over the network."""
    verify: Literal["background", "first", "off"] = "background"
    """Of a snapshot of the swarm's: background: train on it, and replay the ledger up to it meanwhile, at low
    priority, where the payloads still exist; that takes the model's memory once more. first: begin only where
    nobody's word is taken, at the base weights or at what this node has verified. off: take it as it is."""
    coordinate: Annotated[str | None, optional(metavar="SEAT_TICKET")] = None
    """Be one of the run's coordinators, too, in a process beside the node: the seat ticket of another one, as
    a file or the line itself. Its state is in DIR-seat; without --state in
    ~/.local/state/thinwire/run-...-coordinator"""
    coordinate_port: Annotated[int, arg(metavar="PORT")] = 0
    """TCP port of that coordinator; 0 picks a free one at the first start and keeps it."""
    coordinate_announce: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="ADDRESS")] = ()
    """An address that others reach that coordinator by; may be repeated."""
    save: Annotated[Path | None, optional(metavar="FILE")] = None
    """Write the trained weights here (safetensors) after the last round."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object with the result on stdout."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def run(self) -> int:
        from ..beside.seat import Coordinate
        from ..ranks.join import join
        from ..run_node import Options

        seat = None
        if self.coordinate is not None:
            seat = Coordinate(self.coordinate, self.host, self.coordinate_port, self.coordinate_announce)
        elif self.coordinate_port or self.coordinate_announce:
            raise ConfigError("--coordinate-port, --coordinate-announce: of a coordinator, --coordinate")
        with stop_on_signals() as stop:
            result = join(
                Options(
                    ticket=self._ticket(),
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
                    http=http_address(self.http, self.http_token, self.http_host),
                    save=self.save,
                    ranks=self.ranks,
                    precision=self.precision,
                    activation_checkpointing=self.activation_checkpointing,
                    cpu_offload=self.cpu_offload,
                    restart=self.restart,
                    track=self.track,
                    evaluate=self.evaluate,
                    verify=self.verify,
                    offload_idle=self.offload_idle,
                ),
                stop,
                seat,
            )
        if stop.signal or result is None:
            return 128 + stop.signal
        if self.json:
            to_stdout(json.dumps(dataclasses.asdict(result)))
        return 0

    def _ticket(self) -> str:
        from ..states.rejoining import ticket_in

        if self.ticket is not None:
            return read_ticket(self.ticket)
        if self.state is None:
            raise ConfigError("which run? thinwire join TICKET, or thinwire join --state DIR to come back")
        return ticket_in(self.state).line()


@dataclass
class Ray:
    """Train on a Ray cluster: coordinator and peers are actors, a placement group for each peer. Connects to
    the cluster of this machine, or starts one for this run alone.

    With --join TICKET the peers join a swarm that is there, over libp2p, beside volunteers elsewhere: one run
    on a cluster and on the internet.

    thinwire and its extra [ray] must be installed on every machine of the cluster. Ctrl-C leaves cleanly; the
    same command continues the run from its state folder. Prints the folder of the trained weights.
    """

    run_file: Annotated[Positional[Path | None], optional(metavar="RUN.toml")] = None
    """Left out with --join."""
    join: Annotated[str | None, optional(metavar="TICKET")] = None
    """The line that a run's coordinator printed; - reads it from standard input, @FILE from a file."""
    peers: Annotated[int | None, optional(metavar="N")] = None
    """Peers of the same kind. Default: 2, or those of --peer."""
    gpus_per_peer: Annotated[int, arg(metavar="N")] = 0
    """Each with a rank of its own, all on one machine. Default: peers train on CPUs."""
    cpus_per_peer: Annotated[float | None, optional(metavar="N")] = None
    """Default: 1 for each rank. On a small machine less than 1 lets more peers share it."""
    ranks_per_peer: Annotated[int | None, optional(metavar="N")] = None
    """Processes among which a peer's model is sharded. Default: one for each GPU, or 1."""
    accelerator_type: Annotated[str | None, optional(metavar="TYPE")] = None
    """As Ray calls it: H100, A100, L4, T4, ..."""
    peer: UseAppendAction[tuple[str, ...]] = ()
    """More peers of another kind, COUNT:gpus=N,type=NAME,cpus=N,ranks=N; may be repeated."""
    address: Annotated[str | None, optional(metavar="ADDRESS")] = None
    """HOST:PORT, auto for any on this machine, or local for a cluster of this command's own. Default:
    $RAY_ADDRESS, else what ray start has begun here, else local."""
    state: Annotated[Path | None, optional(metavar="DIR")] = None
    """Where the coordinator keeps the ledger, on this machine. Default:
    ~/.local/state/thinwire/NAME-ray"""
    node_state: Annotated[Path | None, optional(metavar="DIR")] = None
    """Where peers keep snapshots, on their machines; a shared folder where machines come and go. Default:
    ~/.local/state/thinwire/ray"""
    output: Annotated[Path | None, optional(aliases=["-o"], metavar="DIR")] = None
    """Where the trained weights go. Default: weights in the state folder"""
    rounds: Annotated[int | None, optional(metavar="N")] = None
    """Instead of run.rounds."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """section.key=value, instead of what the file says; may be repeated."""
    task: Annotated[str | None, optional(metavar="MODULE:FUNCTION")] = None
    """A task of your own, importable here and on every machine of the cluster."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of local work; see thinwire join."""
    wait: Annotated[float | None, optional(metavar="SECONDS")] = None
    """For room in a cluster that grows by itself. Default: 20, and none if it is too small."""
    restarts: Annotated[int, arg(metavar="N")] = 10
    """How often the actor of a peer is started again after it died; -1: always."""
    host: str = "0.0.0.0"
    """--join: where each peer listens on its machine."""
    max_upload: Annotated[str | None, optional(metavar="RATE")] = None
    """--join: what each peer sends at most; see thinwire join."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object with the result on stdout."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the logs of the actors, too."""

    def run(self) -> int:
        from ..on_ray.command import Asked, ray_command, ray_join_command

        self._refuse()
        kinds = (self.gpus_per_peer, self.cpus_per_peer, self.ranks_per_peer, self.accelerator_type)
        asked = Asked(self.peers, *kinds, self.peer)
        options: dict[str, Any] = {
            "address": self.address,
            "node_state": self.node_state,
            "output": self.output,
            "task": self.task,
            "precision": self.precision,
            "wait_s": self.wait,
            "restarts": self.restarts,
            "verbose": self.verbose,
        }
        with stop_on_signals() as stop:
            if self.join is not None:
                options |= {"host": self.host, "max_upload": self.max_upload}
                ray_join_command(read_ticket(self.join), asked, as_json=self.json, stop=stop, **options)
            elif self.run_file is not None:
                rounds = {} if self.rounds is None else {"run.rounds": self.rounds}
                options |= {"overrides": {**rounds, **overrides_of(self.set)}, "state": self.state}
                ray_command(self.run_file, asked, as_json=self.json, stop=stop, **options)
        return 128 + stop.signal if stop.signal else 0

    def _refuse(self) -> None:
        """Raises ConfigError."""
        refuse_folder("--state", self.state)
        refuse_in_use(self.state, "coordinator")
        refuse_folder("-o", self.output)
        refuse_below("--wait", self.wait, 0, "seconds for machines to come, e.g. 300")
        refuse_below("--restarts", self.restarts, -1, "starts again after an actor's death, -1: always")
        if self.join is None and self.run_file is None:
            raise ConfigError("name a run file, or a swarm to --join")
        if self.join is None and self.max_upload is not None:
            raise ConfigError("--max-upload: of peers that --join a swarm")
        of_a_run = (self.run_file, self.state, self.rounds, self.set or None)
        if self.join is not None and any(given is not None for given in of_a_run):
            raise ConfigError("--join takes no run file, --state, --rounds or --set: the run is the swarm's")


def _ranks(text: str) -> tuple[int, ...]:
    counts = text.split(",")
    if not all(count.isdigit() and 1 <= int(count) <= 8 for count in counts):
        raise ConfigError(f"--ranks {text}: numbers from 1 to 8 with commas between them, for example 1,2")
    return tuple(int(count) for count in counts)
