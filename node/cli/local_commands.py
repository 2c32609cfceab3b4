"""The commands around a run, which need no swarm. What they do is loaded when they run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from ...compression.errors import ConfigError
from ..system.devices import chosen_device
from ..system.output import to_stderr, to_stdout
from ..system.stopping import stop_on_signals
from .arguments import optional, overrides_of


def print_version() -> None:
    """The release, what it understands, and the machine's parts that matter."""
    from importlib.metadata import PackageNotFoundError, version

    from ...coordinator.protocol.messages import PROTOCOL_VERSION

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    python = ".".join(map(str, sys.version_info[:3]))
    parts = f"protocol {PROTOCOL_VERSION}, Python {python}, torch {of('torch')}"
    to_stdout(f"thinwire {of('thinwire')} ({parts})")


@dataclass
class Config:
    """What a run file may say."""

    reference: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Every key with its type, default, range and meaning, as a page in Markdown."""

    def run(self) -> int:
        from ..run_files.reference import reference

        if not self.reference:
            raise ConfigError("write it as thinwire config --reference; thinwire init writes a run file")
        to_stdout(reference(), end="")
        return 0


@dataclass
class Init:
    """Write a commented run file to begin with. On a terminal it asks; with --kind it takes the flags.

    bytes: a small GPT from scratch; text: a model of transformers on your own text; lora: adapters beside
    one; classify: label words, one byte per probe; slow: a small GPT over slow links.
    """

    file: Annotated[Positional[Path], arg(metavar="RUN.toml")] = Path("run.toml")
    """What is written."""
    kind: Annotated[
        tyro.conf.DisallowNone[Literal["bytes", "text", "lora", "classify", "slow"] | None], optional()
    ] = None
    """What is to be trained. Default: asks."""
    name: Annotated[str | None, optional(metavar="NAME")] = None
    """What people call the run."""
    corpus: Annotated[str | None, optional(metavar="FILE")] = None
    """pydoc, stdlib, or text of your own: a file, a folder, JSON lines, a data set of the hub."""
    model: Annotated[str | None, optional(metavar="DIR")] = None
    """text, lora, classify: a model's folder, or its name on the hub."""
    rounds: Annotated[int | None, optional(metavar="N")] = None
    peers: Annotated[int | None, optional(metavar="N")] = None
    """The first round waits for so many machines."""
    prompt: Annotated[str | None, optional(metavar="TEXT")] = None
    """classify: what stands before the label's words, with fields in braces: "{text} It was"."""
    labels: Annotated[str | None, optional(metavar="VALUE=WORDS,...")] = None
    """classify: values of the label and their words: "0= terrible,1= great"."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write over a file that is there."""

    def run(self) -> int:
        from ..run_files.drafts import KINDS, asked, filled, init, refuse_to_write_over

        names = ("name", "corpus", "model", "rounds", "peers", "prompt", "labels")
        given = {n: str(v) for n in names if (v := getattr(self, n)) is not None}
        refuse_to_write_over(self.file, force=self.force)
        if self.kind is not None:
            draft = filled(self.kind, given)
        elif sys.stdin.isatty():
            draft = asked(None, given, _ask)
        else:
            raise ConfigError(f"nobody to ask: name a --kind, one of {', '.join(KINDS)}")
        to_stderr(init(self.file, draft, force=self.force))
        return 0


def _ask(question: str, default: str) -> str:
    to_stderr(f"{question} [{default}]: ", end="")
    line = sys.stdin.readline()
    if not line:
        print(file=sys.stderr)  # noqa: T201 - the question's line has no end yet
        raise ConfigError("the answers ended before the questions: nothing was written")
    return line.strip("\n") or default


@dataclass
class Runs:
    """List the runs whose state is on this machine: what, where, how far, size on disk, running or not."""

    folders: Annotated[Positional[tuple[Path, ...]], optional(metavar="FOLDER")] = ()
    """Look here, and below. Default: the user's state directory (~/.local/state/thinwire) and what is in the
    working directory."""
    clean: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Remove the state of those that are over. What is running is never touched."""
    all: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With --clean: also of those that could go on. Their weights and keys are gone then."""
    yes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Do not ask before something is removed."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON list on stdout."""

    def run(self) -> int:
        from .runs import clean_runs, list_runs

        if self.all and not self.clean:
            raise ConfigError("--all belongs to --clean")
        if self.clean and not self.yes and not sys.stdin.isatty():
            raise ConfigError("--clean: nobody to ask; add --yes")
        runs = list_runs(self.folders, as_json=self.json)
        if self.clean:
            clean_runs(runs, everything=self.all, ask=lambda question: self.yes or _agreed(question))
        return 0


def _agreed(question: str) -> bool:
    to_stderr(f"{question} [y/N]: ", end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@dataclass
class Completion:
    """Print the script that completes thinwire's commands and options in a shell.

    bash: source <(thinwire completion bash) in ~/.bashrc. zsh: as _thinwire in a folder of $fpath. fish: as
    ~/.config/fish/completions/thinwire.fish.
    """

    shell: Annotated[Positional[Literal["bash", "zsh", "fish"]], arg(metavar="SHELL")]
    """bash, zsh or fish."""

    def run_with(self, commands: Any) -> int:
        """`commands`: the union of all of them."""
        from .completion import commands_of, completion

        to_stdout(completion(self.shell, commands_of(commands)), end="")
        return 0


@dataclass
class Generate:
    """Continue a text with what a run has learnt: a byte GPT, or a model of transformers.

    thinwire export TICKET -o out && thinwire generate out --prompt "Once upon"
    """

    source: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """A node's or a coordinator's state folder, a snapshot, or what thinwire export or join --save wrote."""
    prompt: str = ""
    """The beginning of the text."""
    tokens: Annotated[int, arg(metavar="N")] = 200
    """How many to draw (of a byte GPT: bytes), at most."""
    temperature: float = 0.8
    """0: always the likeliest; 1: as the model says."""
    seed: int = 0
    """The same seed, the same text, on the same machine."""
    run_file: Annotated[Path | None, optional(name="run", metavar="RUN.toml")] = None
    """What the model is, where nothing beside its weights says so."""
    base: Annotated[Path | None, optional(metavar="DIR")] = None
    """The folder of the model that adapters belong to."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda if there is a GPU."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object on stdout."""

    def run(self) -> int:
        from .generate import generate

        generate(
            self.source,
            prompt=self.prompt,
            tokens=self.tokens,
            temperature=self.temperature,
            seed=self.seed,
            run_file=self.run_file,
            base=self.base,
            device=self.device,
            as_json=self.json,
        )
        return 0


@dataclass
class Plan:
    """Say before a run starts what a round will cost: bytes, memory, time by phase, and which strategy fits.

    Real steps of the run's model are measured on this machine, for some seconds per strategy; what the link
    takes is computed. The run's strategy is as the file says, the others have options for small models.
    """

    run_file: Annotated[Positional[Path], arg(metavar="RUN.toml")]
    """What is to be trained; thinwire init writes one."""
    peers: Annotated[int | None, optional(metavar="N")] = None
    """Nodes, all like this machine. Default: the run's min_peers, but two at least."""
    link: Annotated[str, arg(metavar="RATE")] = "100Mbit"
    """What each of them has in either direction: 10Mbit, 1.5MB/s, ..."""
    upload: Annotated[str, arg(metavar="RATE")] = "100Mbit"
    """What the coordinator's line sends, as `thinwire coordinator --upload` says."""
    rtt_ms: Annotated[float, arg(metavar="MS")] = 50.0
    """There and back between a node and the coordinator, in milliseconds."""
    strategies: Annotated[str | None, optional(metavar="A,B,...")] = None
    """Default: the run's own, and then the others."""
    seconds: Annotated[float, arg(metavar="S")] = 10.0
    """To measure each strategy for, once its model is loaded."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda if there is a GPU."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """section.key=value, instead of what the file says; may be repeated."""
    task: Annotated[str | None, optional(metavar="MODULE:FUNCTION")] = None
    """A task of your own, importable here."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One JSON object on stdout."""

    def run(self) -> int:
        from ..planning.command import plan

        with stop_on_signals() as stop:
            plan(
                self.run_file,
                peers=self.peers,
                link=self.link,
                upload=self.upload,
                rtt_ms=self.rtt_ms,
                seconds=self.seconds,
                device=chosen_device(self.device),
                strategies=self.strategies,
                overrides=overrides_of(self.set),
                import_path=self.task,
                as_json=self.json,
                stopped=stop.is_set,
            )
        return 128 + stop.signal if stop.signal else 0
