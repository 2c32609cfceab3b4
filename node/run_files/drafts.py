"""`thinwire init`: a commented run file to begin with, for each of the usual purposes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from ...compression.errors import ConfigError, nearest
from ...coordinator.protocol.files import write_aside
from ..config import config_of_toml
from ..system.output import to_stderr
from .toml import toml_value

Kind = Literal["bytes", "text", "lora", "classify", "slow"]

KINDS: Final[Mapping[Kind, str]] = {
    "bytes": "a small GPT on bytes of text, from scratch: nothing to download",
    "text": "a model of transformers on text of your own, all of its weights",
    "lora": "adapters of low rank beside a model of transformers",
    "classify": "a model of transformers classifies by label words, one byte per probe",
    "slow": "a small GPT over slow links: some kilobytes every few minutes (DiLoCo)",
}

Ask = Callable[[str, str], str]
"""Question and default -> answer."""

T = TypeVar("T")


class WrongAnswer(ConfigError):
    """A value of one flag or answer that will not do."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What goes into a run file. `model`, `prompt` and `labels` (value of a label -> its words) are for
    models of transformers."""

    kind: Kind
    name: str
    corpus: str
    model: str
    rounds: int
    peers: int
    prompt: str = "{text} It was"
    labels: tuple[tuple[str, str], ...] = (("0", " terrible"), ("1", " great"))

    @property
    def is_hf(self) -> bool:
        return self.kind in ("text", "lora", "classify")


DEFAULTS: Final[Mapping[Kind, Draft]] = {
    "bytes": Draft("bytes", "my-bytes", "pydoc", "", 1000, 2),
    "text": Draft("text", "my-text", "pydoc", "HuggingFaceTB/SmolLM2-135M", 1000, 2),
    "lora": Draft("lora", "my-lora", "pydoc", "HuggingFaceTB/SmolLM2-135M", 500, 2),
    "classify": Draft("classify", "my-labels", "reviews.jsonl", "Qwen/Qwen2.5-0.5B", 5000, 2),
    "slow": Draft("slow", "my-slow-links", "stdlib", "", 500, 2),
}


def init(path: Path, draft: Draft, *, force: bool) -> str:
    """Writes the file and returns what to do next. Raises ConfigError: it is there, or cannot be written."""
    refuse_to_write_over(path, force=force)
    if not str(path).isprintable():
        raise ConfigError(f"{str(path)!r}: a name with odd characters; name another file")
    text = run_file(draft, path)
    config_of_toml(text, f"what would be written to {path}")
    try:
        write_aside(path, text.encode())
    except UnicodeEncodeError as e:
        raise ConfigError(f"{path}: what you gave is not text: {e.object[e.start : e.end]!r}") from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e
    return _next_steps(draft, path)


def refuse_to_write_over(path: Path, *, force: bool) -> None:
    """Raises ConfigError."""
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already: name another file, or --force to write over it")


def asked(kind: Kind | None, given: Mapping[str, str], ask: Ask) -> Draft:
    """The draft that the answers to questions make; nothing is asked that was `given`. What will not do is
    asked for again. Raises ConfigError for what was given."""
    chosen: Kind = _asked_kind(ask) if kind is None else kind
    answers = dict(given)
    for key, question in _questions(chosen).items():
        if key in given:
            filled(chosen, {key: given[key]})
            continue

        def answer(key: str = key, question: str = question) -> str:
            text = _trimmed(key, ask(question, _shown(DEFAULTS[chosen], key)))
            filled(chosen, {key: text})
            return text

        answers[key] = _until_right(answer)
    return filled(chosen, answers)


def _asked_kind(ask: Ask) -> Kind:
    for name, meaning in KINDS.items():
        to_stderr(f"  {name:9} {meaning}")
    return _until_right(lambda: kind_of(ask("What is to be trained", "bytes").strip()))


def _questions(kind: Kind) -> dict[str, str]:
    """What a person is asked: key -> question."""
    questions = {"name": "Name of the run", "corpus": "Text: a file, a folder, pydoc or stdlib"}
    if DEFAULTS[kind].is_hf:
        questions["model"] = "Model: a folder, or a name on the hub"
    if kind == "classify":
        questions |= {"corpus": "Examples: a file of JSON lines", "prompt": "Prompt before the label's words"}
        questions["labels"] = "Labels and their words"
    return {**questions, "rounds": "Rounds", "peers": "Machines that the first round waits for"}


def _until_right(answer: Callable[[], T]) -> T:
    """Asks again after an answer that will not do; the others stay."""
    while True:
        try:
            return answer()
        except WrongAnswer as e:
            to_stderr(str(e))


def _trimmed(key: str, text: str) -> str:
    """Spaces count in prompts and labels only."""
    return text if key in ("prompt", "labels") else text.strip()


def filled(kind: Kind, given: Mapping[str, str]) -> Draft:
    """The defaults of the kind, and what was given instead. Raises ConfigError."""
    draft = DEFAULTS[kind]
    strange = [key for key in given if not draft.is_hf and key in ("model", "prompt", "labels")]
    if strange:
        raise ConfigError(f"--{strange[0]}: a run of kind {kind!r} has none")
    values: dict[str, Any] = {**given}
    for key in ("rounds", "peers"):
        if key in given:
            values[key] = _whole(key, given[key])
    if "labels" in given:
        values["labels"] = labels_of(given["labels"])
    return replace(draft, **values)


def kind_of(text: str) -> Kind:
    """Raises ConfigError."""
    for kind in KINDS:
        if kind == text:
            return kind
    raise WrongAnswer(f"--kind {text}: {nearest(text, KINDS)}")


def labels_of(text: str) -> tuple[tuple[str, str], ...]:
    """'0= terrible,1= great' -> value and words of each. Raises ConfigError."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if len(pairs) < 2 or not all(value.strip() and words for value, _, words in pairs):
        raise WrongAnswer(
            f"--labels {text!r}: write it as VALUE=WORDS,VALUE=WORDS, e.g. 0= terrible,1= great"
        )
    return tuple((value.strip(), words) for value, _, words in pairs)


def _whole(key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise WrongAnswer(f"--{key} {text}: a whole number from 1")
    return int(text)


def _shown(draft: Draft, key: str) -> str:
    if key == "labels":
        return ",".join(f"{value}={words}" for value, words in draft.labels)
    return str(getattr(draft, key))


def run_file(draft: Draft, path: Path) -> str:
    """The text of the run file. `path`: how its first lines call it."""
    parts = [_head(draft, path), _run(draft), _task(draft), _STRATEGY[draft.kind], _SCHEDULE[draft.kind]]
    return "\n".join(parts)


def _head(draft: Draft, path: Path) -> str:
    extra = "# All machines need pip install 'thinwire[hf]'.\n" if draft.is_hf else ""
    return (
        f"# {KINDS[draft.kind][0].upper()}{KINDS[draft.kind][1:]}.\n{extra}"
        f"#   thinwire coordinator {path}    starts the run and prints a ticket\n"
        f"#   thinwire join TICKET    on every machine\n"
        f"# Every key: thinwire config --reference. What is left out has its default.\n"
    )


def _run(draft: Draft) -> str:
    eval_every = {"slow": 5, "classify": 100}.get(draft.kind, 20)
    snapshot_every = {"slow": 10, "classify": 500}.get(draft.kind, 100)
    lines = (
        ("name", draft.name, "what people call it"),
        ("rounds", draft.rounds, "the run ends after so many"),
        ("min_peers", draft.peers, "the first round waits for so many; later ones may come and go"),
        ("eval_every", eval_every, "rounds between held-out losses, by one node"),
        ("verify_every", eval_every, "rounds between comparisons of all replicas' fingerprints"),
        ("snapshot_every", snapshot_every, "rounds between snapshots, from which a late node begins"),
    )
    return "[run]\n" + "".join(f"{f'{key} = {toml_value(value)}':<22} # {why}\n" for key, value, why in lines)


def _task(draft: Draft) -> str:
    corpus = f"corpus = {toml_value(draft.corpus)}"
    if draft.kind in ("bytes", "slow"):
        return _BYTES.format(corpus=corpus, context=256 if draft.kind == "slow" else 128)
    model = f"model = {toml_value(draft.model)}"
    if draft.kind == "classify":
        labels = f"labels = {toml_value(dict(draft.labels))}"
        prompt = f"prompt = {toml_value(draft.prompt)}"
        return _CLASSIFY.format(model=model, corpus=corpus, prompt=prompt, labels=labels)
    return _HF.format(model=model, corpus=corpus) + (_LORA if draft.kind == "lora" else "")


_BYTES: Final = """\
[task]
name = "text"
{corpus:<22} # "pydoc", "stdlib", a file or a folder of text; a node may bring its own with --data
layers = 4
width = 256
heads = 8              # width is a multiple of it
context = {context}          # bytes that a sequence predicts
batch = 8              # sequences of a micro-batch: as many as the smallest machine's memory takes
held_out_bytes = 32768 # off the end of the text, for evaluation
"""

_HF: Final = """\
[task]
name = "hf"
{model:<22} # a folder (config.json, safetensors, tokenizer), or a hub name
{corpus:<22} # a text file, a folder of them, JSON lines (task.field), or a data set (task.split)
context = 256          # tokens of a sequence
batch = 4              # sequences of a micro-batch: as many as the smallest machine's memory takes
held_out = 64          # sequences off the end, for evaluation
"""

_LORA: Final = """\

[task.lora]
r = 8                  # the rank
alpha = 16.0           # what an adapter adds is scaled by alpha / r
# targets = ["q_proj", "v_proj"]   # or ["all-linear"]; left out: what suits the model's type
"""

_CLASSIFY: Final = """\
[task]
name = "hf"
{model:<22} # a folder (config.json, safetensors, tokenizer), or a hub name
{corpus:<22} # JSON lines like {{"text": "a fine film", "label": 1}}, or a data set (task.split)
context = 128          # tokens; longer prompts lose their beginning
batch = 16             # examples of a probe
held_out = 64          # examples that are drawn, for evaluation
{prompt:<22} # fields of a line in braces; the label's words follow
{labels:<22} # value of label_field -> its words
label_field = "label"
"""

_DECOUPLED: Final = """\
[strategy]
name = "decoupled"     # DeMo: of the momentum only what moves fast is sent
lr = {lr:<17} # of sign updates: begin at a third of what you give AdamW
beta = 0.999           # slow parts stay in the momentum and are sent later
sign = true

[strategy.compressor]
name = "dct_topk"
k = 32                 # of group_size coefficients: more is nearer to plain training, and more bytes
group_size = 4096
bits = 1
indices = "rice"
"""

_SPSA: Final = """\
[strategy]
name = "spsa"          # forward passes only: a node needs the memory of inference
lr = 1e-6
eps = 1e-3
probes = 1             # bytes that a peer sends in a round; each takes two forward passes
"""

_DILOCO: Final = """\
[strategy]
name = "diloco"        # nodes train on their own and meet once a round
lr = 4e-4              # of the inner AdamW, whose state never travels
inner_steps = 200      # at most; fewer on machines that do not manage them in round_s
mean = "senders"       # of each element, over those that sent it, and no outer momentum (SparseLoCo)
outer_lr = 1.0
outer_momentum = 0.0
feedback_decay = 0.95  # what was not sent waits, and fades

[strategy.compressor]
name = "topk"
k = 64                 # of group_size elements
group_size = 4096
bits = 2
indices = "rice"

[work]
round_s = 300          # seconds; every machine does as much as fits

[network]
heartbeat_s = 10.0     # a peer counts as gone after five of them
"""

_STRATEGY: Final[Mapping[Kind, str]] = {
    "bytes": _DECOUPLED.format(lr="3e-3"),
    "text": _DECOUPLED.format(lr="1e-4"),
    "lora": _DECOUPLED.format(lr="1e-3"),
    "classify": _SPSA,
    "slow": _DILOCO,
}

_LINEAR: Final = """\
[schedule]
name = "linear"
warmup_rounds = {warmup}     # the learning rate rises for so long
final_factor = 0.1     # and falls to this share of it
"""

_CONSTANT: Final = """\
[schedule]
name = "constant"
warmup_rounds = 0
"""

_SCHEDULE: Final[Mapping[Kind, str]] = {
    "bytes": _LINEAR.format(warmup=20),
    "text": _LINEAR.format(warmup=50),
    "lora": _LINEAR.format(warmup=20),
    "classify": _CONSTANT,
    "slow": _LINEAR.format(warmup=5),
}


def _next_steps(draft: Draft, path: Path) -> str:
    steps = {
        f"thinwire plan {path} --peers 8 --link 10Mbit": "bytes, memory and time of a round, measured here",
        f"thinwire coordinator {path}": "starts the run and prints a ticket",
        "thinwire join TICKET": "on every machine",
    }
    width = max(map(len, steps))
    return "\n".join([f"wrote {path}. What next:", *(f"  {c:{width}}   {why}" for c, why in steps.items())])
