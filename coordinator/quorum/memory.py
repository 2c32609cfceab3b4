"""What only a leader has seen of a run, for its successor: bounded JSON, from one seat to the others.

It decides nothing that the ledger does: how long offers take, so that the successor has a deadline at once;
losses, evaluations and what the page shows. A seat that lies here spoils figures.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..derived_state import DerivedState
from ..ledger import Ledger
from ..observe.page_history import MAX_SAVED_BYTES
from ..policy import EVALUATIONS, KEPT_ROUNDS, Measured, OfferTimes
from ..protocol.messages import MAX_FIGURES, MAX_NAME, MAX_PEERS, MAX_ROUND, BadMessage
from ..rounds import Rounds

MAX_MEMORY_BYTES: Final = 2**20
MAX_TIMES: Final = 8192
MAX_HELD_OUT: Final = 500
MAX_EVALUATIONS: Final = 20
MAX_TIME_S: Final = 86_400.0
"""Of one offer: nobody waits for a longer one."""

_Round = Annotated[int, Field(ge=1, le=MAX_ROUND)]
_Index = Annotated[int, Field(ge=0, lt=2**16)]
_Seconds = Annotated[float, Field(ge=0, le=MAX_TIME_S)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


def _printable(figures: dict[str, float]) -> dict[str, float]:
    if not all(map(str.isprintable, figures)):
        raise ValueError("names are printable")
    return figures


_Figures = Annotated[dict[_Name, _Number], Field(max_length=MAX_FIGURES), AfterValidator(_printable)]
_Time = tuple[
    _Round, _Index, _Seconds, Annotated[int, Field(ge=0, le=2**20)], Literal["come", "offered", "missing"]
]
"""Round, peer, seconds, samples: see `Measured`."""


class Memory(BaseModel):
    """`head`: the newest round when it was made; `times`, `late_s`: of `OfferTimes`; `unkept`: rounds that a
    peer was awaited in vain, in a row; `durations_s`: of the last rounds; `timed`: rounds and seconds in all;
    `history`: see `DerivedState.history`."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)

    format: Literal[1] = 1
    run_id: str
    head: Annotated[int, Field(ge=0, le=MAX_ROUND)]
    times: Annotated[tuple[_Time, ...], Field(max_length=MAX_TIMES)] = ()
    late_s: Annotated[tuple[_Seconds, ...], Field(max_length=EVALUATIONS)] = ()
    unkept: Annotated[tuple[tuple[_Index, _Round], ...], Field(max_length=MAX_PEERS)] = ()
    durations_s: Annotated[tuple[_Number, ...], Field(max_length=KEPT_ROUNDS)] = ()
    timed: tuple[Annotated[int, Field(ge=0, le=MAX_ROUND)], Annotated[float, Field(ge=0, le=1e12)]] = (0, 0.0)
    held_out: Annotated[tuple[tuple[_Round, _Number], ...], Field(max_length=MAX_HELD_OUT)] = ()
    evaluations: Annotated[tuple[tuple[_Round, _Figures], ...], Field(max_length=MAX_EVALUATIONS)] = ()
    history: Annotated[str, Field(max_length=MAX_SAVED_BYTES)] = ""

    @classmethod
    def parse(cls, data: bytes, run_id: bytes) -> Self:
        """What `packed` gave, of this run. Raises BadMessage."""
        if len(data) > MAX_MEMORY_BYTES:
            raise BadMessage(f"{len(data)} bytes of memory")
        try:
            memory = cls.model_validate(json.loads(data, parse_constant=_no_number))
        except (ValidationError, ValueError, RecursionError) as e:
            raise BadMessage(f"a leader's memory cannot be read: {str(e)[:200]}") from e
        if memory.run_id != run_id.hex():
            raise BadMessage("a leader's memory of another run")
        return memory

    def packed(self) -> bytes:
        """At most MAX_MEMORY_BYTES: the history, and then the times, are left out of what is more."""
        for left_out in ({}, {"history": ""}, {"history": "", "times": ()}):
            found = self.model_copy(update=left_out).model_dump(mode="json")
            data = json.dumps(found, allow_nan=False, separators=(",", ":")).encode()
            if len(data) <= MAX_MEMORY_BYTES:
                return data
        raise AssertionError("what is left is small")

    def offer_times(self, head: int) -> OfferTimes:
        """Those of rounds up to the open one."""
        times, known = OfferTimes(), (row for row in self.times if row[0] <= head + 1)
        times.restore(((r, peer, Measured(s, n, what)) for r, peer, s, n, what in known), self.late_s)
        return times


def memory_of(ledger: Ledger, derived: DerivedState, rounds: Rounds) -> bytes:
    """What a leader knows, packed."""
    statistics, times = derived.statistics, rounds.times
    return Memory(
        run_id=ledger.run_id.hex(),
        head=ledger.head_round,
        times=tuple(
            (round_, peer, _bounded(m.time_s), m.n_samples, m.what) for round_, peer, m in times.measured()
        )[-MAX_TIMES:],
        late_s=tuple(_bounded(late_s) for late_s in times.late_s),
        unkept=tuple(rounds.attendance.unkept().items())[:MAX_PEERS],
        durations_s=tuple(statistics.durations_s),
        timed=(statistics.n_durations, statistics.total_duration_s),
        held_out=tuple(ledger.held_out(MAX_HELD_OUT)),
        evaluations=tuple(ledger.evaluations(MAX_EVALUATIONS)),
        history=derived.history().decode(),
    ).packed()


def _bounded(seconds: float) -> float:
    return min(MAX_TIME_S, max(0.0, seconds)) if math.isfinite(seconds) else MAX_TIME_S


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")
