"""Which strategies `thinwire compare` trains, with which options, and for how many rounds.

decoupled                       as the run file says, if that is its strategy; else the defaults
decoupled:random_k              with another compressor
decoupled:dct_topk(k=8, bits=2) with options of the compressor
spsa(lr=1e-3, probes=4):...     with options of the strategy, written as in TOML
ddp                             data-parallel AdamW: whole gradients in 32 bits, every step
alone                           the same AdamW on one peer, which exchanges nothing
more.toml                       a table per strategy, as in a run file's [strategy]
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, Literal, cast

from ...compression.errors import ConfigError, nearest
from ...compression.registry import COMPRESSORS, complete_compressor, compressor_of_new_run
from ...optim.options import REQUIRED
from ...optim.registry import STRATEGIES, complete_new_run, strategy_class
from ..config import RunConfig, literal

MIN_ROUNDS: Final = 5
"""A fitted strategy has at least so many rounds, where there are as many micro-batches."""

BASELINES: Final = ("alone", "ddp")

DDP_OPTIONS: Final = frozenset(
    ("lr", "weight_decay", "accumulate", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_eps")
)
"""What there is to choose of data-parallel AdamW."""

DDP: Final[dict[str, Any]] = {
    "name": "decoupled",
    "base": "adamw",
    "sign": False,
    "beta": 0.0,
    "clip": 1e9,
    "bound": 0.0,
    "lr": 3e-3,
    "adam_beta2": 0.95,
    "compressor": {"name": "dense", "bits": 32},
}
"""Nothing is kept back and nothing is clipped: the mean gradient of all peers goes into AdamW."""


@dataclass(frozen=True, slots=True)
class ComparePlan:
    """One strategy's training: `options` are complete; `n_batches` micro-batches per peer and round;
    `baseline`: what it is compared with."""

    label: str
    options: dict[str, Any]
    rounds: int
    n_batches: int
    baseline: Literal["alone", "ddp"] | None = None

    @property
    def is_alone(self) -> bool:
        """One peer, whatever the others have."""
        return self.baseline == "alone"


def plans(specs: str, run: RunConfig) -> list[ComparePlan]:
    """Plans for the same number of micro-batches: those of `run.run.rounds` rounds of the run's strategy.

    Raises ConfigError.
    """
    own = complete_new_run(run.strategy)
    n_total = run.run.rounds * batches_per_round(own)
    found = [_plan(*strategy, own, n_total) for strategy in _strategies(specs, run.strategy)]
    labels = [plan.label for plan in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--strategies: {label} is named twice")
    return found


def with_baselines(found: Sequence[ComparePlan], run: RunConfig) -> list[ComparePlan]:
    """`alone` and `ddp` in front, those that are not there already."""
    named = {plan.baseline for plan in found}
    missing = [name for name in BASELINES if name not in named]
    return [*(plans(",".join(missing), run) if missing else []), *found]


def batches_per_round(options: Mapping[str, Any]) -> int:
    """Micro-batches that a peer draws in a round, of complete `options`. Raises ConfigError where the clock
    decides on that, and for numbers that are none."""
    facts = strategy_class(options["name"]).facts
    if facts.seconds is not None and options[facts.seconds]:
        raise ConfigError(
            f"{facts.seconds} leaves it to the clock how many tokens a round has: leave it out here"
        )
    counts = [options[key] for key in facts.batches]
    if not all(isinstance(n, int) and n > 0 for n in counts):
        raise ConfigError(f"{', '.join(facts.batches)}: whole numbers from 1 on, not {counts}")
    return prod(counts)


def batches_per_step(run: RunConfig) -> int:
    """Micro-batches per peer that data-parallel training would take between two exchanges of gradients."""
    options = complete_new_run(run.strategy)
    return prod(int(options[key]) for key in strategy_class(options["name"]).facts.batches_per_step)


def notable(options: Mapping[str, Any]) -> str:
    """The options that are not what they are by default, and what always matters: 'lr=0.003, beta=0.95'."""
    in_order = {**{k: v for k, v in options.items() if k != "compressor"}, **options}  # the compressor last
    fitted_option = strategy_class(options["name"]).facts.fitted
    return ", ".join(_changed(in_order, complete_new_run(_bare(options)), always=("lr", fitted_option)))


def _changed(
    options: Mapping[str, Any], defaults: Mapping[str, Any], always: Collection[str | None]
) -> list[str]:
    """'key=value' of the options that are in `always` or not in `defaults` with this value."""
    found = []
    for key, value in options.items():
        if key == "compressor":
            bare = complete_compressor(compressor_of_new_run({"name": value["name"]}))
            inner = _changed(value, bare, ("k", "rate", "bits"))
            found.append(f"compressor={value['name']}({', '.join(inner)})")
        elif key != "name" and (key in always or value != defaults[key]):
            found.append(f"{key}={_shown(value)}")
    return found


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _bare(options: Mapping[str, Any]) -> dict[str, Any]:
    """The strategy's name and what it does not go without, its compressor's name too."""
    defaults = strategy_class(options["name"]).facts.options.defaults()
    needed = {key: options[key] for key, default in defaults.items() if default is REQUIRED}
    if "compressor" in needed:
        needed["compressor"] = {"name": needed["compressor"]["name"]}
    return {"name": options["name"], **needed}


def _plan(
    label: str,
    baseline: Literal["alone", "ddp"] | None,
    options: dict[str, Any],
    own: Mapping[str, Any],
    n_total: int,
) -> ComparePlan:
    """`own`: the run's strategy, complete. `n_total`: micro-batches per peer in the whole comparison."""
    facts = strategy_class(options["name"]).facts
    said = {*options, *(own if options["name"] == own["name"] else ())}
    if facts.fitted is not None and facts.fitted not in said:
        default = facts.options.defaults()[facts.fitted]
        options = {**options, facts.fitted: fitted(n_total, default)}
    complete = complete_new_run(options)
    n_batches = batches_per_round(complete)
    return ComparePlan(label, complete, max(1, round(n_total / n_batches)), n_batches, baseline)


def fitted(n_total: int, default: int) -> int:
    """Micro-batches per round: near the default, but `MIN_ROUNDS` rounds, and next to nothing left over.

    That is, between the most that this allows and half of it, what brings whole rounds nearest to n_total.
    """
    most = max(1, min(default, n_total // MIN_ROUNDS))
    return min(
        range(most, (most + 1) // 2 - 1, -1), key=lambda n: abs(max(1, round(n_total / n)) * n - n_total)
    )


# ------------------------------------------------------------------------------------------ reading


_Said = tuple[str, Literal["alone", "ddp"] | None, dict[str, Any]]
"""Label, which baseline it is, options that somebody has said."""


def _strategies(specs: str, own: Mapping[str, Any]) -> Iterable[_Said]:
    parts = _split(specs)
    if not parts:
        raise ConfigError("--strategies: name some, for example decoupled,diloco,spsa")
    for part in parts:
        if part.endswith(".toml"):
            yield from _from_file(Path(part))
        else:
            yield part, _baseline(part), _options(part, own)


def _from_file(path: Path) -> Iterable[_Said]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"--strategies {path}: cannot be read as TOML: {e}") from e
    for label, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f'{path}: {label} is no table. Write [{label}] and below it name = "decoupled"')
        yield label, None, {"name": label, **table}


def _baseline(spec: str) -> Literal["alone", "ddp"] | None:
    name, _given = _call(_split_compressor(spec)[0])
    return cast('Literal["alone", "ddp"]', name) if name in BASELINES else None


def _options(spec: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """What is said about one strategy, with `own`, the run file's, or those for small models below it."""
    head, compressor = _split_compressor(spec)
    name, given = _call(head)
    known = {*STRATEGIES, *BASELINES}
    if name not in known:
        raise ConfigError(f"--strategies: unknown strategy {name!r}: {nearest(name, known)}")
    if name in BASELINES:
        if compressor is not None or given.keys() - DDP_OPTIONS:
            raise ConfigError(
                f"--strategies {spec}: {name} is AdamW, ddp on whole gradients of all; "
                f"its options: {', '.join(sorted(DDP_OPTIONS))}"
            )
        return {**DDP, "accumulate": own.get("accumulate", 1), **given}
    small: dict[str, Any] = {"name": name, **strategy_class(name).facts.small_model}
    start = own if name == own.get("name") else small
    options = {**start, **given}
    if compressor is not None:
        options["compressor"] = _compressor(compressor, start.get("compressor"))
    return options


def _compressor(spec: str, own: object) -> dict[str, Any]:
    """The table of 'topk(k=8)'; what is not said stays as in `own`, if that names the same compressor."""
    name, given = _call(spec)
    if name not in COMPRESSORS:
        raise ConfigError(f"--strategies: unknown compressor {name!r}: {nearest(name, COMPRESSORS)}")
    start = own if isinstance(own, Mapping) and own.get("name") == name else {"name": name}
    return {**start, **given}


def _call(text: str) -> tuple[str, dict[str, Any]]:
    """'spsa(lr=1e-3, noise=gauss)' -> ('spsa', {'lr': 0.001, 'noise': 'gauss'})."""
    found = re.fullmatch(r"\s*(\w*)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if found is None:
        raise ConfigError(f"--strategies: {text!r}: write it as NAME, or NAME(option=value, ...)")
    options = {}
    for pair in _split(found[2] or ""):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--strategies: {pair!r} in {text!r}: write it as option=value")
        options[key.strip()] = literal(value.strip())
    return found[1], options


def _split_compressor(spec: str) -> tuple[str, str | None]:
    head, *rest = _split(spec, ":")
    if len(rest) > 1:
        raise ConfigError(f"--strategies: {spec!r}: write it as STRATEGY:COMPRESSOR")
    return head, rest[0] if rest else None


def _split(text: str, separator: str = ",") -> list[str]:
    """At separators outside of brackets and quotes; without empty parts."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if c == separator and depth == 0 and not quote:
            parts.append("")
            continue
        parts[-1] += c
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        else:
            depth += (c in "([{") - (c in ")]}")
    if depth or quote:
        raise ConfigError(f"--strategies: {text!r}: a bracket or a quote stays open")
    return [part.strip() for part in parts if part.strip()]
