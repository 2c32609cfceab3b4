"""`thinwire generate`: text from what a run has learnt, shown while it is drawn."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from ...compression.errors import ConfigError
from ..sampling.sampling import sampled
from ..sampling.sources import open_text_model
from ..system.devices import chosen_device
from ..system.output import shown, to_stdout


def generate(
    source: Path,
    *,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    run_file: Path | None,
    base: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Prints the prompt and what follows, or one JSON object. Raises ConfigError."""
    if tokens < 1:
        raise ConfigError("--tokens: at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError("--temperature: a number from 0 (the likeliest token, always) on")
    if not 0 <= seed < 2**63:
        raise ConfigError("--seed: a whole number from 0, below 2^63")
    model = open_text_model(source, run_file, base, chosen_device(device))
    drawn = sampled(model, prompt, tokens, temperature, seed)
    if as_json:
        pairs = list(drawn)
        n = sum(token >= 0 for token, _ in pairs)
        text = "".join(new for _, new in pairs)
        to_stdout(json.dumps({"prompt": prompt, "text": text, "tokens": n, "seed": seed}))
        return
    show = sys.stdout.isatty()
    _write(prompt, show)
    for _, new in drawn:
        _write(new, show)
    _write("\n", show)


def _write(text: str, to_terminal: bool) -> None:
    """A model says anything: what would move the cursor is not shown on a terminal."""
    safe = shown(text) if to_terminal else text
    sys.stdout.buffer.write(safe.encode(errors="replace"))
    sys.stdout.buffer.flush()
