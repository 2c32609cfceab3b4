"""Text drawn from a model, token by token: the same for the same seed on the same machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...compression.errors import ConfigError
from .text_models import TextModel


def sampled(
    model: TextModel, prompt: str, n_tokens: int, temperature: float, seed: int
) -> Iterator[tuple[int, str]]:
    """Token and the text that it completes, up to `n_tokens` of them; a last one may have the token -1, with
    what was left. `temperature` 0: always the likeliest. Ends early with the text, or with what the model
    takes. Raises ConfigError for a prompt that is longer than that, and for weights that are not finite."""
    generator = torch.Generator().manual_seed(seed)
    complete = model.decoder()
    with torch.inference_mode():
        logits = model.start(model.encode(prompt))
        for i in range(n_tokens):
            token = _drawn(logits, temperature, generator)
            if token == model.end:
                break
            yield token, complete(token)
            if i + 1 < n_tokens:
                try:
                    logits = model.advance(token)
                except ConfigError:  # as long as the model takes
                    break
    if left := complete(-1):
        yield -1, left


def _drawn(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    # On the CPU: the generators of devices differ.
    logits = logits_V.cpu().double()
    if not bool(torch.isfinite(logits).all()):
        raise ConfigError("the model's outputs are not finite: its training has diverged")
    if temperature == 0:
        return int(logits.argmax())
    chances = torch.softmax((logits - logits.max()) / temperature, dim=0)
    return int(torch.multinomial(chances, 1, generator=generator))
