"""What the coordinator finds out about a model of transformers before a run begins, by running it: weights
that the run's model has no place for, and tokens that see those behind them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from ...compression.errors import ConfigError

_N_TOKENS: Final = 12
_N_OTHERS: Final = 3
"""Other last tokens that are tried: experts may be chosen otherwise after a rounding error."""

_NOISE: Final = 1e-4
"""Of the logits' standard deviation. Rounding moves them by less than 1e-6, also where experts get other
batches; the next token, in the smallest encoder with fresh weights, by more than 1e-3."""


def refuse_left_over(loaded: nn.Module, used: Collection[str], folder: Path) -> None:
    """`loaded`: with the folder's weights; `used`: the parameters that the run's model has. Raises
    ConfigError."""
    left = [name for name, _ in loaded.named_parameters() if name not in used]
    if left:
        raise ConfigError(
            f"{folder}: {', '.join(left[:3])} would be lost: config.json ties it to other weights "
            f"(tie_word_embeddings), and the file has other values for it. If those are right, set "
            f'"tie_word_embeddings": false in {folder / "config.json"}; else take them out of the file'
        )


def refuse_foresight(model: nn.Module, vocabulary: int, context: int, folder: Path) -> None:
    """Raises ConfigError for a model that, asked for the next token, looks at it: other last tokens must not
    change what is said before them. `model`: with its weights, in float32."""
    ids_RT = _probes(vocabulary, min(_N_TOKENS, context))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits_RTV = model(input_ids=ids_RT, use_cache=False).logits[:, :-1].float()
    model.train(was_training)
    moved_R = (logits_RTV[1:] - logits_RTV[:1]).abs().amax(dim=(1, 2))
    if bool((moved_R > _NOISE * logits_RTV.std()).all()):
        raise ConfigError(
            f"{folder}: {type(model).__name__} sees the token that it is to predict: with another last token "
            f"its logits before it change. It is an encoder of masked text; take a causal language model, "
            f"or, if its weights were trained as one, say so in {folder / 'config.json'} "
            f'("is_decoder": true; xlm: "causal": true)'
        )


def _probes(vocabulary: int, n_tokens: int) -> Tensor:
    """R x T: one row and `_N_OTHERS` more that differ from it in the last token alone. Of the upper half of
    the vocabulary: special tokens, padding above all, stand at its beginning."""
    first, n = vocabulary // 2, max(1, vocabulary // 2 - 1)
    ids_T = [first + 7 * i % n for i in range(n_tokens)]
    ids_RT = torch.tensor([ids_T] * (1 + _N_OTHERS))
    ids_RT[:, -1] = torch.tensor([first + (7 * n_tokens + 5 * i) % n for i in range(1 + _N_OTHERS)])
    return ids_RT
