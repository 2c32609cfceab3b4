"""The run's configuration: what a run.toml may say, with defaults and clear refusals.

Precedence: command line > environment (THINWIRE_SECTION__KEY) > file > default. Unknown keys are refused with
the nearest name. The whole of it goes into record 0 of the ledger, so a joiner needs no file.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from ..compression.errors import ConfigError, nearest
from ..coordinator.protocol.identity import public_key_of
from ..coordinator.protocol.settings import Keep
from .run_files.edges import with_edges

ENV_PREFIX = "THINWIRE_"

DEFAULT_STRATEGY = "decoupled"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Run(Section):
    """The run as a whole."""

    name: Annotated[str, Field(min_length=1, max_length=100)] = "run"
    """What people call the run; folders are named after it."""
    rounds: Annotated[int, Field(ge=1, le=2**31)] = 200
    """The run ends after this many rounds."""
    min_peers: Annotated[int, Field(ge=1, le=1024)] = 2
    """The first round waits for this many peers."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Seed of the initial weights."""
    eval_every: Annotated[int, Field(ge=0)] = 10
    """Rounds between evaluations on the held-out text; 0: none, as of a task that holds nothing out."""
    verify_every: Annotated[int, Field(ge=1)] = 10
    """Rounds between fingerprint reports."""
    snapshot_every: Annotated[int, Field(ge=1)] = 50
    """Rounds between the snapshots that nodes write to disk and serve; a multiple of verify_every."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the replicas. bfloat16 takes half the memory; updates are rounded to it stochastically, on all peers
    alike."""
    base: str | None = None
    """Base weights, a safetensors file; without it the exact initialisation from `seed`."""

    keep: Annotated[str | int, Field(exclude=True)] = "snapshots"
    """What the coordinator keeps of counted payloads: "snapshots", as far back as a joining node can need
    them; "all", so that the run can be replayed from round 0; or as much as fits into e.g. "20GB", a quota
    that is never exceeded. It may differ from one start of the coordinator to the next."""

    @field_validator("keep")
    @classmethod
    def _that_is_known(cls, value: str | int) -> str:
        try:
            Keep.parse(str(value))
        except ConfigError as e:
            raise ValueError(str(e)) from e
        return str(value)

    @field_validator("snapshot_every")
    @classmethod
    def _with_a_fingerprint(cls, value: int, info: ValidationInfo) -> int:
        verify_every = info.data.get("verify_every", 1)
        if value % verify_every:
            nearest = max(1, round(value / verify_every)) * verify_every
            raise ValueError(f"a multiple of verify_every is needed, e.g. {nearest}")
        return value


class Lora(Section):
    """Adapters of low rank beside frozen weights (LoRA, arXiv 2106.09685); only they are trained and sent."""

    kind: Literal["lora", "hadamard"] = "lora"
    """What an adapter adds: a product of low rank, or the Hadamard product of two such (FedPara; peft's
    LoHa), whose rank is up to `r` squared from twice the numbers."""
    r: Annotated[int, Field(ge=1, le=4096)] = 8
    """The rank."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """What an adapter adds is scaled by alpha / r."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the linear layers that get one, or "all-linear"; none: what peft knows to be right
    for the model's type."""
    parameters: tuple[str, ...] = ()
    """Ends of the names of parameters that get one and belong to no linear layer, as experts' do;
    "all-linear" finds them by itself."""
    ranks: dict[str, Annotated[int, Field(ge=1, le=2**16)]] = {}
    """Another rank than `r` for layers whose names end so (peft's rank_pattern)."""
    alphas: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Another `alpha` for layers whose names end so (peft's alpha_pattern)."""

    @model_serializer(mode="wrap")
    def _without_the_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Record 0 of a run without them is what it was before there were any."""
        unused = {key for key in ("parameters", "ranks", "alphas") if not getattr(self, key)}
        unused |= {"kind"} if self.kind == "lora" else set()
        found: dict[str, Any] = plain(self)
        return {key: value for key, value in found.items() if key not in unused}


class Task(Section):
    """What is trained: the built-in `text`, a model of transformers (`hf`), or `custom` (then every node
    names it with --task). Options belong to the task that they stand under; another one refuses them."""

    name: Literal["text", "hf", "custom"] = "text"
    """`text`: next bytes, by a small GPT; `hf`: a model of transformers; `custom`: a task of your own."""
    corpus: str = "pydoc"
    """`pydoc`: the language reference that ships with Python; `stdlib`: the source of Python's standard
    library; else a file or a folder of text files. A node may bring its own with --data. `hf` takes
    JSON Lines, JSON, CSV, Parquet and Arrow, packed too (.gz, .bz2, .xz), and data sets of the hub."""
    context: Annotated[int, Field(ge=2, le=2**16)] = 64
    """Bytes (`hf`: tokens) that a sequence predicts; longer prompts lose their beginning."""
    batch: Annotated[int, Field(ge=1, le=2**16)] = 8
    """Sequences in one micro-batch of a peer."""

    # text
    held_out_bytes: Annotated[int, Field(ge=1024, le=2**24)] = 32768
    """Bytes taken off the corpus's end for evaluation; every node evaluates on the same ones."""
    layers: Annotated[int, Field(ge=1, le=200)] = 3
    """`text`: blocks of the GPT."""
    width: Annotated[int, Field(ge=8, le=16384)] = 128
    """`text`: width of the GPT, a multiple of heads."""
    heads: Annotated[int, Field(ge=1, le=256)] = 4
    """`text`: heads of attention."""
    fedpara: Annotated[float | None, Field(ge=0, le=1)] = None
    """`text`: the matrices of blocks are products of factors, which are trained and sent in their place
    (FedPara): 0: as few numbers as can still make any matrix's rank, 1: as many as the matrix has. Files of
    weights have the matrices."""

    # hf
    model: str | None = None
    """A folder with config.json, safetensors and a tokenizer, or a model's name on the hub."""
    revision: str | None = None
    """Of a model on the hub: a commit, tag or branch."""
    lora: Lora | None = None
    """Train adapters; without it all weights are trained."""
    adapter: Annotated[str | None, Field(exclude=True)] = None
    """A folder with adapters of this model, as peft or an export of thinwire has them: training goes on from
    them, and `lora` is what they are."""
    field: Annotated[str, Field(min_length=1)] = "text"
    """The field of a JSONL line or of a data set's row that holds a document: text, or the messages of a
    chat, which the model's chat template makes text of."""
    subset: str | None = None
    """Of a data set of the hub: its configuration."""
    split: str = "train"
    """Of a data set of the hub, or a part of it: "train[:10000]"."""
    held_out_split: str | None = None
    """Evaluate on the beginning of this split instead of a part of what is trained on ("": the latter)."""
    held_out_from: Annotated[Literal["shuffled", "end"] | None, Field(exclude=True)] = None
    """Of labelled data without a held_out_split: which examples are held out, some that are drawn (the same
    for every run) or the last ones. Text is always held out from its end."""
    held_out: Annotated[int, Field(ge=1, le=2**20)] = 64
    """Sequences for evaluation (of `context` tokens, or prompts): every node evaluates on the same ones."""
    prompt: str | None = None
    """Classify: what stands before the label's words, with fields in braces: "{text} It was". A field inside
    of another is {review.text}; {{ and }} are braces that are text."""
    labels: dict[str, str] = {}
    """Value of `label_field` -> its words: { 0 = " terrible", 1 = " great" }."""
    label_field: Annotated[str, Field(min_length=1)] = "label"
    """The field that holds an example's label."""
    loss: Literal["words", "candidates"] = "words"
    """Cross entropy of the right label's words, or of the right label among all of them (a forward pass for
    each)."""
    architecture: str | None = None
    """Written by the coordinator: the model's config.json, from which nodes build it."""

    @model_serializer(mode="wrap")
    def _without_the_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Record 0 of a run without it is what it was before there was any."""
        return {k: v for k, v in plain(self).items() if k != "fedpara" or v is not None}


class Policy(Section):
    """When a round closes."""

    name: Literal["deadline", "all", "fastest", "async"] = "deadline"
    """`deadline`: some time after the usual one; `all`: with the last awaited peer; `fastest`: with as many
    offers as are worth most per second, so that nobody waits for stragglers (backup workers); `async`: every
    `every_s`, with what is there, and who needs longer offers its work in a later round."""
    every_s: Annotated[float | None, Field(gt=0, le=86400, validate_default=True)] = None
    """`async`: seconds from the opening of a round to its end, at most: it ends earlier where all have
    offered."""

    @field_validator("every_s")
    @classmethod
    def _of_async(cls, value: float | None, info: ValidationInfo) -> float | None:
        if "name" in info.data and (info.data["name"] == "async") != (value is not None):
            raise ValueError('name = "async" needs every_s, e.g. 10.0, and the other policies have none')
        return value

    @model_serializer(mode="wrap")
    def _without_the_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Record 0 of a run without it is what it was before there was any."""
        return {key: value for key, value in plain(self).items() if value is not None}


class Schedule(Section):
    """The learning-rate factor of each round."""

    name: Literal["constant", "linear", "cosine", "power", "batch"] = "linear"
    """`constant`: 1 after the warm-up; `linear`: the line down to `final_factor`; `cosine`: half a
    cosine down to it; `power`: the root of `warmup_rounds` / round, so that nobody need know how long the run
    will be (about the power scheduler's, arXiv 2408.13359); `batch`: `constant` with `batch_samples`."""
    warmup_rounds: Annotated[int, Field(ge=0)] = 10
    """Rounds in which the factor rises to 1, in a line."""
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The factor of the last round; `constant`, `batch` and `power` have no use for it."""
    batch_samples: Annotated[int | None, Field(ge=1, le=2**40, validate_default=True)] = None
    """Samples of a round, of all peers, from which on the learning rate is what the strategy says: with fewer
    (a mean of the last 8 rounds) it is taken times the root of their share, under every name. So it follows
    peers as they come and go. Without it samples make no difference."""

    @field_validator("batch_samples")
    @classmethod
    def _of_batch(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None and info.data.get("name") == "batch":
            raise ValueError(
                'name = "batch" needs batch_samples: how many samples a round has when all peers are there'
            )
        return value

    @model_serializer(mode="wrap")
    def _without_the_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """See `Policy`."""
        return {key: value for key, value in plain(self).items() if value is not None}


class Work(Section):
    """How much a node does in a round."""

    round_s: Annotated[float, Field(ge=0, le=86400)] = 0.0
    """Seconds that a round should take: every node measures itself and its link, and does as many batches,
    steps or probes as fit (at most what the strategy says), and sends as much as fits. 0: all do all."""


class LimitsSection(Section):
    """What one offer may carry."""

    max_peers: Annotated[int, Field(ge=1, le=1024)] = 64
    """Peers that are in the swarm at once."""
    max_payload_bytes: Annotated[int, Field(ge=64, le=2**32)] = 64 * 2**20
    """Of one offer's payload."""
    max_samples: Annotated[int, Field(ge=1, le=2**20)] = 2**16
    """Of one offer's local work."""


class Admission(Section):
    """Who may come into the run; not in record 0: the next start of the coordinator may say something else,
    and what `thinwire run` has said holds until then."""

    mode: Literal["open", "invited", "listed"] = "open"
    """`open`: whoever has a ticket; `invited`: who has an invitation (thinwire invite), and those who are in
    the ledger already; `listed`: the identities in `peers`, and nobody else."""
    peers: Annotated[tuple[str, ...], Field(max_length=4096, validate_default=True)] = ()
    """`listed`: the peer ids that may take part; thinwire identity prints a machine's."""

    @field_validator("peers")
    @classmethod
    def _that_are_peers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for peer_id in value:
                public_key_of(peer_id)
        except ConfigError as e:
            raise ValueError(str(e)) from e
        return value

    @field_validator("peers", mode="after")
    @classmethod
    def _or_nobody_could_come(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.data.get("mode") == "listed" and not value:
            raise ValueError(
                'mode = "listed" lets in these only: name one at least (thinwire identity prints it)'
            )
        return value


class Network(Section):
    """How often nodes say that they live."""

    heartbeat_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    """Seconds between signs of life; after five of them without one, ten seconds at least, a peer is gone."""


class Eval(Section):
    """An evaluation of the exported weights every so many rounds, by a node that was started with --evaluate,
    in a process of low priority beside its training. Without the table there is none."""

    function: Annotated[str, Field(pattern=r"^(lm-eval|[\w.]+:\w+)$", max_length=200)]
    """`package.module:function`, importable where it runs: gets the folder that `thinwire export` writes and
    gives numbers by name. Or `lm-eval`: EleutherAI's harness."""
    every: Annotated[int, Field(ge=1)] = 100
    """Rounds between evaluations; the last round's weights are evaluated, too."""
    tasks: Annotated[tuple[str, ...], Field(validate_default=True)] = ()
    """`lm-eval`: its tasks, for example ["hellaswag", "arc_easy"]."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """`lm-eval`: examples of each task, at most."""
    timeout_s: Annotated[float, Field(gt=0, le=7 * 86400)] = 3600.0
    """Seconds after which an evaluation is given up; training goes on meanwhile."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it computes; a GPU is then shared with training."""

    @field_validator("tasks")
    @classmethod
    def _of_lm_eval(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if (info.data.get("function") == "lm-eval") != bool(value):
            raise ValueError("lm-eval needs tasks, and a function takes none")
        return value


class Audits(Section):
    """Peers do the work of others again, drawn by lot; the offers of those who fail do not count any more."""

    rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the swarm's work that goes into audits; 0: none. On top comes one offer in ten of newcomers,
    until an audit has passed, and of peers that have failed one."""
    failures: Annotated[int, Field(ge=1, le=1000)] = 2
    """So many of a peer's last audits have failed (of the last 4 x `failures`, within `window_rounds`), and
    no fewer than have passed: its offers weigh nothing for `window_rounds`, and for twice as long each time
    again."""
    window_rounds: Annotated[int, Field(ge=1, le=2**20)] = 1000
    """How long a failure is remembered."""
    own_data_auditors: bool | None = None
    """Whether peers with data of their own are drawn as auditors, too, who never report: false in new runs,
    true in those that are older."""
    newcomers_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the first 20 offers of a peer that is audited until an audit has passed: 1 in new runs, one
    in ten in those that are older."""
    newcomers_budget: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Audits of newcomers take at most so many times `rate` of the auditors' work, over time: 10 in new runs;
    those that are left over wait, and whose last audit has failed weighs nothing until one passes. Auditors
    are then peers whose own audits have passed, where there are three. 0: none of that, as in older runs."""
    flood_failures: Annotated[int, Field(ge=0, le=8)] | None = None
    """With `newcomers_budget`: while so many of the last eight newcomers, of 200 rounds at most, have failed
    their first audit, others weigh nothing until theirs has passed: 6 in new runs; 0: not so, as in older
    ones."""


class RunConfig(Section):
    run: Run = Run()
    task: Task = Task()
    strategy: dict[str, Any] = {"name": DEFAULT_STRATEGY}
    policy: Policy = Policy()
    schedule: Schedule = Schedule()
    work: Work = Work()
    limits: LimitsSection = LimitsSection()
    network: Network = Network()
    admission: Annotated[Admission, Field(exclude=True)] = Admission()
    eval: Eval | None = None
    audits: Audits | None = None

    @field_validator("strategy")
    @classmethod
    def _named(cls, value: dict[str, Any]) -> dict[str, Any]:
        return value if "name" in value else {"name": DEFAULT_STRATEGY, **value}

    @field_validator("eval")
    @classmethod
    def _of_a_model_it_takes(cls, value: Eval | None, info: ValidationInfo) -> Eval | None:
        task: Task = info.data.get("task", Task())
        if value is not None and value.function == "lm-eval" and task.name != "hf":
            raise ValueError(f"lm-eval takes models of transformers (task hf), not the task {task.name}")
        return value

    def to_json(self) -> str:
        """As record 0 has it: a table that came later and is not used leaves it what it was."""
        whole = self.model_dump(exclude={name for name in ("eval", "audits") if getattr(self, name) is None})
        if self.audits is not None:
            whole["audits"] = self.audits.model_dump(exclude_none=True)
        return json.dumps(whole, sort_keys=True)


def load_config(
    path: Path | None, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
) -> RunConfig:
    """Reads a run.toml. `overrides`: dotted key -> value, from the command line. Raises ConfigError, which
    blames what said it: the file, a variable of the environment or --set."""
    data = {} if path is None else _read(path)
    said: dict[str, str] = {}
    for name, text in environ.items():
        if name.startswith(ENV_PREFIX) and "__" in name:
            key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            said[key] = f"the environment's {name}={text}"
            _put(data, key, literal(text), said[key])
    for key, value in (overrides or {}).items():
        if value is not None:
            said[key] = "configuration" if path is None else f"--set {key}={_as_typed(value)}"
            _put(data, key, value, said[key])
    if isinstance(strategy := data.get("strategy"), dict):
        data["strategy"] = with_edges(strategy)
    return _validated(data, str(path) if path else "configuration", said)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. thinwire init writes one; deploy/runs/pydoc-gpt.toml is an example."
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as TOML: {e}") from e
    if not data:
        raise ConfigError(f"{path}: says nothing; thinwire init writes a run file, with comments")
    return data


def parse_config(text: str) -> RunConfig:
    """The configuration in a ledger's record 0."""
    return _validated(json.loads(text), "the run's configuration")


def config_of_toml(text: str, where: str) -> RunConfig:
    """Of a run file's text, as it stands there. Raises ConfigError that begins with `where`."""
    try:
        return _validated(tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{where}: cannot be read as TOML: {e}") from e


def _validated(data: dict[str, Any], where: str, said: Mapping[str, str] | None = None) -> RunConfig:
    """`said`: dotted key -> what gave it its value, where that was not `where`."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as e:
        found: dict[str, list[str]] = {}
        for error in e.errors():
            found.setdefault(_blamed(error, said or {}) or where, []).append(_explain(error))
        raise ConfigError("; ".join(f"{who}: {'; '.join(what)}" for who, what in found.items())) from e


def _blamed(error: Any, said: Mapping[str, str]) -> str | None:
    """Who gave the value of this error, or a value inside of it: whoever came last."""
    key = ".".join(str(part) for part in error["loc"]) + "."
    given = [who for name, who in said.items() if key.startswith(f"{name}.") or f"{name}.".startswith(key)]
    return given[-1] if given else None


def _as_typed(value: Any) -> str:
    """As it stands in a run file."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"
    model: type[BaseModel] = RunConfig
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation
        sections = [a for a in (annotation, *get_args(annotation)) if is_section(a)]
        model = sections[0] if sections else model
    return f"unknown key {key!r}; {nearest(location[-1], model.model_fields)}"


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _put(data: dict[str, Any], key: str, value: Any, who: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{who}: {section} is a value, not a section")
        data = inner
    data[name] = value


def literal(text: str) -> Any:
    """A TOML value if it reads as one, else the text itself."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text
