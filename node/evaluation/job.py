"""What the process of an evaluation is told, and what it says: files of JSON in a folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ...coordinator.protocol.messages import MAX_FIGURES, MAX_NAME

JOB: Final = "job.json"
RESULT: Final = "result.json"
WEIGHTS: Final = "weights.safetensors"
TOKENS: Final = "held-out"
EXPORT: Final = "export"

LM_EVAL: Final = "lm-eval"
"""In place of a function: EleutherAI's lm-evaluation-harness."""

MAX_RESULT_BYTES: Final = 2**16


class BadResult(ValueError):
    """An evaluation gave something else than figures by name."""


@dataclass(frozen=True, slots=True)
class Job:
    """`config`: of the run, as in record 0; `has_tokens`: whether the folder has the held-out tokens, which
    bring the tokenizer; `fingerprint`: of the weights, in hex."""

    config: str
    run_id: str
    round: int
    fingerprint: str
    function: str
    tasks: tuple[str, ...]
    limit: int | None
    device: str
    import_path: str | None
    has_tokens: bool

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        (folder / JOB).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        plain = json.loads((folder / JOB).read_text(encoding="utf-8"))
        return cls(**{**plain, "tasks": tuple(plain["tasks"])})


def figures_of(value: Any) -> dict[str, float]:
    """What an evaluation may say: a few finite numbers by short names. Raises BadResult for anything else."""
    if not isinstance(value, dict) or not value:
        raise BadResult(f"an evaluation gives numbers by name, not {type(value).__name__}")
    if len(value) > MAX_FIGURES:
        raise BadResult(f"{len(value)} figures; at most {MAX_FIGURES}")
    found = {}
    for name, number in value.items():
        if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= MAX_NAME:
            raise BadResult(f"{name!r} is no name of a figure")
        try:
            found[name] = float(number)
        except (TypeError, ValueError, OverflowError):
            raise BadResult(f"{name} is {type(number).__name__}, no number") from None
        if not math.isfinite(found[name]):
            raise BadResult(f"{name} is {found[name]}")
    return found


def read_result(folder: Path) -> dict[str, float]:
    """Raises BadResult, also where there is none, and OSError."""
    try:
        with (folder / RESULT).open("rb") as file:
            data = file.read(MAX_RESULT_BYTES + 1)
        if len(data) > MAX_RESULT_BYTES:
            raise BadResult("more than 64 KiB of figures")
        return figures_of(json.loads(data))
    except FileNotFoundError:
        raise BadResult("it ended without a result") from None
    except ValueError as e:
        raise e if isinstance(e, BadResult) else BadResult(f"its result is no JSON: {e}") from e
