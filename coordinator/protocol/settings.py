"""What the coordinator reads of a run's config, and how the ledger changes it; all else is opaque here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...compression.errors import ConfigError
from .messages import MAX_CHANGES, Change, Changes, CommitBody, Value


class _Section(BaseModel):
    # The node's own model refuses unknown keys; the coordinator passes on what it does not read.
    model_config = ConfigDict(frozen=True, extra="ignore")


class RunSection(_Section):
    """`rounds`, and after how many of them each thing happens; the first round waits for `min_peers`.
    `eval_every` 0: nothing is evaluated."""

    name: str
    rounds: Annotated[int, Field(ge=1, le=2**32 - 1)]
    min_peers: Annotated[int, Field(ge=1)]
    eval_every: Annotated[int, Field(ge=0)]
    verify_every: Annotated[int, Field(ge=1)]
    snapshot_every: Annotated[int, Field(ge=1)]

    def is_over(self, head: int) -> bool:
        """Whether the run is over once the round `head` is committed: everybody who asks, asks this."""
        return head >= self.rounds


class PolicySection(_Section):
    name: Literal["deadline", "all", "fastest", "async"]
    every_s: Annotated[float | None, Field(gt=0)] = None

    @model_validator(mode="after")
    def _async_has_a_pace(self) -> Self:
        if self.name == "async" and self.every_s is None:
            raise ValueError("the policy async needs every_s")
        return self


class ScheduleSection(_Section):
    name: Literal["constant", "linear", "cosine", "power", "batch"]
    warmup_rounds: Annotated[int, Field(ge=0)]
    final_factor: Annotated[float, Field(ge=0, le=1)]
    batch_samples: Annotated[int | None, Field(ge=1)] = None

    @model_validator(mode="after")
    def _batch_has_samples(self) -> Self:
        if self.name == "batch" and self.batch_samples is None:
            raise ValueError("the schedule batch needs batch_samples")
        return self


class NetworkSection(_Section):
    heartbeat_s: Annotated[float, Field(gt=0, le=60)]


class EvalSection(_Section):
    every: Annotated[int, Field(ge=1)]


class AuditsSection(_Section):
    """See `Standing`."""

    rate: Annotated[float, Field(ge=0, le=1)]
    failures: Annotated[int, Field(ge=1)]
    window_rounds: Annotated[int, Field(ge=1, le=2**20)]
    own_data_auditors: bool = True
    newcomers_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    newcomers_budget: Annotated[float, Field(ge=0, le=1000)] = 0.0
    flood_failures: Annotated[int, Field(ge=0, le=8)] = 0


class TaskSection(_Section):
    name: str = "custom"
    prompt: str | None = None

    @property
    def loss_unit(self) -> str:
        """Of the built-in tasks; what another one's is, nobody can know here."""
        if self.name == "hf":
            return "nats/token" if self.prompt is None else "nats/example"
        return "nats/byte" if self.name == "text" else "nats"


class RunSettings(_Section):
    """Of one run, as they stand in record 0; see `Course` for what records change."""

    run: RunSection
    task: TaskSection = TaskSection()
    policy: PolicySection
    schedule: ScheduleSection
    network: NetworkSection
    eval: EvalSection | None = None
    audits: AuditsSection | None = None

    @property
    def silence_s(self) -> float:
        """A peer is gone after this long without a sign of life."""
        return max(10.0, 5 * self.network.heartbeat_s)


def parse_settings(config: str) -> RunSettings:
    """From `GenesisBody.config`. Raises ConfigError."""
    try:
        return RunSettings.model_validate_json(config)
    except ValidationError as e:
        raise _refusal("the run's config", e) from e


RUN_KEYS: Final = (
    "run.paused",
    "run.rounds",
    "schedule.batch_samples",
    "schedule.final_factor",
    "schedule.name",
    "schedule.warmup_rounds",
)
"""What records of a ledger may change of a run, beside options of its strategy ("strategy.lr")."""


@dataclass(frozen=True, slots=True)
class Course:
    """The settings that hold after a round of the ledger: those of record 0 as later records changed them.

    `strategy`: the table of options, opaque here but for what is changed; `changes`: all since record 0, the
    last one of each key, in their order.
    """

    settings: RunSettings
    strategy: Mapping[str, Any]
    is_paused: bool = False
    changes: Changes = ()

    @classmethod
    def of(cls, config: str, changes: Changes = ()) -> Course:
        """From `GenesisBody.config`, and what was changed since. Raises ConfigError."""
        settings, strategy = parse_settings(config), json.loads(config).get("strategy")
        return cls(settings, dict(strategy) if isinstance(strategy, dict) else {}).after(changes)

    @property
    def run(self) -> RunSection:
        return self.settings.run

    @property
    def n_rounds(self) -> int:
        """The last round of the run, as far as is known now."""
        return self.settings.run.rounds

    def value(self, key: str) -> Value | None:
        """Of a setting that can be changed; None: the run does not say. Raises ConfigError for others."""
        section, _, name = _parts(key)
        if key == "run.paused":
            return self.is_paused
        found: Value | None = (
            self.strategy.get(name)
            if section == "strategy"
            else getattr(getattr(self.settings, section), name)
        )
        return found

    def after(self, changes: Changes) -> Course:
        """After a record with these changes. Raises ConfigError for what no record may change."""
        if not changes:
            return self
        settings, strategy, is_paused = self.settings.model_dump(), dict(self.strategy), self.is_paused
        for change in changes:
            section, _, name = _parts(change.key)
            if section == "strategy":
                strategy[name] = change.value
            elif change.key == "run.paused":
                is_paused = _truth(change)
            else:
                settings[section][name] = change.value
        known = in_order({c.key: c for c in (*self.changes, *changes)})
        if len(known) > MAX_CHANGES:
            raise ConfigError(f"more than {MAX_CHANGES} settings would be changed")
        return Course(_checked(settings), strategy, is_paused, known)

    def after_all(self, bodies: Iterable[CommitBody]) -> Course:
        """After these records, in order. Raises as `after` does."""
        course = self
        for body in bodies:
            course = course.after(body.changes)
        return course

    def told(self, changes: Changes) -> list[str]:
        """What a record with these changes does, in words. Raises as `after` does."""
        return [self._told(change) for change in changes]

    def _told(self, change: Change) -> str:
        if change.key == "run.paused":
            return "paused" if change.value else "goes on"
        return f"{change.key} {_shown(self.value(change.key))} -> {_shown(change.value)}"


def in_order(changes: Mapping[str, Change]) -> Changes:
    """By key -> as a record has them."""
    return tuple(changes[key] for key in sorted(changes))


def strategy_options(changes: Changes) -> dict[str, Value]:
    """Of the strategy, those that are changed."""
    return {c.key.removeprefix("strategy."): c.value for c in changes if c.key.startswith("strategy.")}


def _parts(key: str) -> tuple[str, str, str]:
    """Of "strategy.lr". Raises ConfigError for what no record may change."""
    parts = key.partition(".")
    if parts[0] != "strategy" and key not in RUN_KEYS:
        raise ConfigError(f"{key} cannot be changed: {', '.join(RUN_KEYS)} can, and strategy.*")
    return parts


def _truth(change: Change) -> bool:
    if not isinstance(change.value, bool):
        raise ConfigError(f"{change.key}: true or false is needed, not {change.value!r}")
    return change.value


def _shown(value: Value | None) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if text.isprintable() else ascii(text)


def _checked(settings: dict[str, Any]) -> RunSettings:
    """Strictly: true is no number of rounds, and neither is "10"."""
    try:
        return RunSettings.model_validate(settings, strict=True)
    except ValidationError as e:
        raise _refusal("a changed setting", e) from e


def _refusal(what: str, error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(x) for x in first["loc"])
    return ConfigError(f"{what}: {where}: {first['msg']}")


MAX_KEEP_CHARS: Final = 40
_UNITS: Final = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS_OF_1024: Final = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE: Final = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?([kMGTKi]{0,2}B|)")


@dataclass(frozen=True, slots=True)
class Keep:
    """What a coordinator keeps of counted payloads: `[run] keep`, an operator's choice for a machine. It
    stands in the state folder and not in the ledger: a restart with another run file changes it.

    `is_lazy`: nothing is deleted before room is needed; `quota_bytes`: what blobs may take, None: there is
    no limit but the disk."""

    is_lazy: bool
    quota_bytes: int | None

    @classmethod
    def parse(cls, text: str) -> Keep:
        """Of "all", "snapshots", or a number of bytes such as "20GB". Raises ConfigError."""
        if text == "snapshots":
            return KEEP_SNAPSHOTS
        if text == "all":
            return cls(is_lazy=True, quota_bytes=None)
        found = _SIZE.fullmatch(text)
        scale = found and {**_UNITS, **_UNITS_OF_1024}.get(found[2])
        if not found or not scale or float(found[1]) * scale < 1:
            raise ConfigError(f'keep = "{text}": write "all", "snapshots" or a size such as "20GB"')
        return cls(is_lazy=True, quota_bytes=round(float(found[1]) * scale))


KEEP_SNAPSHOTS: Final = Keep(is_lazy=False, quota_bytes=None)
"""As far back as a joining node can need them."""
