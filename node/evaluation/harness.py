"""EleutherAI's lm-evaluation-harness on an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ...compression.errors import ConfigError


def require() -> None:
    """Raises ConfigError unless the harness is installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError("--evaluate lm-eval needs the harness, which is not installed: pip install lm-eval")


def lm_eval(folder: Path, tasks: Sequence[str], limit: int | None, device: str) -> dict[str, float]:
    """ "task/metric" -> value, without the standard errors. Raises what the harness raises."""
    import lm_eval as harness

    found = harness.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": False},
        tasks=list(tasks),
        limit=limit,
        device=device,
        batch_size=1,
    )
    return {
        f"{task}/{metric.partition(',')[0]}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in metric
    }
