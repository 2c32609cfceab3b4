"""What the coordinator reads of a run's config; all else in it is opaque here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...compression.errors import ConfigError


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
    name: Literal["deadline", "all", "fastest"]


class ScheduleSection(_Section):
    name: Literal["constant", "linear", "cosine"]
    warmup_rounds: Annotated[int, Field(ge=0)]
    final_factor: Annotated[float, Field(ge=0, le=1)]


class NetworkSection(_Section):
    heartbeat_s: Annotated[float, Field(gt=0, le=60)]


class RunSettings(_Section):
    """Of one run, the same for its life: it stands in record 0."""

    run: RunSection
    policy: PolicySection
    schedule: ScheduleSection
    network: NetworkSection

    @property
    def silence_s(self) -> float:
        """A peer is gone after this long without a sign of life."""
        return max(10.0, 5 * self.network.heartbeat_s)


def parse_settings(config: str) -> RunSettings:
    """From `GenesisBody.config`. Raises ConfigError."""
    try:
        return RunSettings.model_validate_json(config)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(x) for x in first["loc"])
        raise ConfigError(f"the run's config: {where}: {first['msg']}") from e
