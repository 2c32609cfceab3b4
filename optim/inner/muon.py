"""Muon (https://kellerjordan.github.io/posts/muon/) inside of local training: MuLoCo, arXiv 2505.23725.

Torch's own `Muon` takes the hidden weights: matrices of numbered blocks ("blocks.0.qkv.weight"). AdamW takes
all else: embeddings, heads, biases and norms. With the rate adjusted to the RMS of AdamW's updates
(arXiv 2502.16982, the default here) one learning rate suits both.

    {"name": "Muon"}
    {"name": "Muon", "lr_ratio": 6.0, "adjust_lr_fn": "original", "hidden": ["encoder.*.weight"]}

A matrix is orthogonalised whole: ranks that hold rows of it bring it together for the step, each for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, Final

import torch
from torch import Tensor

from ...compression.errors import ConfigError
from ..base import Parameter
from ..parts.ranks import Ranks, parts_of

NAME: Final = "Muon"

DEFAULTS: Final[Mapping[str, Any]] = {
    "lr_ratio": 1.0,  # Muon's learning rate over the strategy's, which is AdamW's
    "hidden": (),  # patterns of names; none: the rule
    "betas": (0.9, 0.95),  # AdamW's
    "adjust_lr_fn": "match_rms_adamw",
}
"""Of the table, beside torch's own options of Muon."""

_NOT_MUONS: Final = frozenset(("lr_ratio", "hidden", "betas"))
_NO_HIDDEN: Final = frozenset(("head", "lm_head", "classifier"))


def muon_options(inner: Mapping[str, Any]) -> dict[str, Any]:
    """Complete: `DEFAULTS` where the table says nothing. Raises ConfigError."""
    options = {**DEFAULTS, **{key: value for key, value in inner.items() if key != "name"}}
    ratio, hidden = options["lr_ratio"], options["hidden"]
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not (ratio > 0 and isfinite(ratio)):
        raise ConfigError(f"inner.lr_ratio = {ratio!r}: must be a number > 0: Muon's rate over strategy.lr")
    if not isinstance(hidden, list | tuple) or not all(isinstance(pattern, str) for pattern in hidden):
        raise ConfigError(f'inner.hidden = {hidden!r}: write patterns of names, ["blocks.*.weight"]')
    if not isinstance(options["betas"], list | tuple) or len(options["betas"]) != 2:
        raise ConfigError(f"inner.betas = {options['betas']!r}: must be two numbers, AdamW's: [0.9, 0.95]")
    return options


def check_muon(inner: Mapping[str, Any]) -> None:
    """Raises what torch raises for options that it does not know or take, and ConfigError."""
    options = muon_options(inner)
    matrix = torch.zeros(2, 2)
    muon = torch.optim.Muon([matrix], lr=0.1, **_of_muon(options))
    matrix.grad = torch.ones(2, 2)
    muon.step()  # type: ignore[no-untyped-call]  # some it looks at only then
    torch.optim.AdamW([matrix], lr=0.1, betas=tuple(options["betas"]))


def is_muons(inner: Mapping[str, Any], parameter: Parameter) -> bool:
    """Whether Muon trains it, else AdamW does."""
    if parameter.tensor.ndim != 2:
        return False
    patterns = muon_options(inner)["hidden"]
    if not patterns:
        return _is_hidden(parameter.name)
    return any(fnmatchcase(parameter.name, pattern) for pattern in patterns)


def refuse_split(inner: Mapping[str, Any], parameters: Sequence[Parameter]) -> None:
    """Raises ConfigError if Muon has nothing to train, and for a pattern that fits no matrix."""
    matrices = [p.name for p in parameters if p.tensor.ndim == 2]
    shown = ", ".join(matrices) or "no matrices at all"
    for pattern in muon_options(inner)["hidden"]:
        if not any(fnmatchcase(name, pattern) for name in matrices):
            raise ConfigError(f"inner.hidden: no matrix is called {pattern!r}; there are {shown}")
    if not any(is_muons(inner, p) for p in parameters):
        raise ConfigError(
            "inner optimizer Muon: the model has no matrix in a numbered block: name those that Muon is to "
            f"train, inner.hidden = [...]; there are {shown}"
        )


def _is_hidden(name: str) -> bool:
    words = name.split(".")
    return any(word.isdigit() for word in words) and not any(
        word in _NO_HIDDEN or "embed" in word or word.endswith("bias") for word in words
    )


def split_in_words(inner: Mapping[str, Any], parameters: Sequence[Parameter], lr: float) -> str:
    """Who trains what, for people."""
    hidden = [p for p in parameters if is_muons(inner, p)]
    n_hidden, n_all = (sum(p.tensor.numel() for p in some) for some in (hidden, parameters))
    kinds = dict.fromkeys(
        ".".join("*" if word.isdigit() else word for word in p.name.split(".")) for p in hidden
    )
    share = f"{n_hidden:,} of {n_all:,} parameters: {', '.join(kinds)}"
    muons_lr, n_rest = lr * muon_options(inner)["lr_ratio"], len(parameters) - len(hidden)
    return (
        f"Muon trains {len(hidden)} matrices ({share}) at lr {muons_lr:g}, "
        f"AdamW the other {n_rest} at lr {lr:g}"
    )


def muon_step(
    inner: Mapping[str, Any],
    parameters: Sequence[Parameter],
    trained: Mapping[str, Tensor],
    lr_factor: float,
    states: Mapping[Tensor, Mapping[str, Any]],
    ranks: Ranks,
) -> dict[Tensor, dict[str, Any]]:
    """One step of `trained` (by parameter name) by their `grad`, one matrix after the other. Returns the new
    states, of what this rank holds."""
    options, found = muon_options(inner), {}
    for p in parameters:
        local = trained[p.name]
        lr = float(p.group["lr"]) * options["lr_ratio"] * lr_factor
        matrix = _Whole(p, ranks)
        theta = matrix.of(local)
        theta.grad = matrix.of(local.grad if local.grad is not None else torch.zeros_like(local))
        muon = torch.optim.Muon(
            [theta], lr=lr, **{**_of_muon(options), "weight_decay": float(p.group["weight_decay"])}
        )
        muon.state[theta] = {
            entry: matrix.of(value.to(local.device)) for entry, value in states.get(local, {}).items()
        }
        muon.step()  # type: ignore[no-untyped-call]
        if theta is not local:
            local.copy_(matrix.rows(theta))
        found[local] = {entry: matrix.rows(value) for entry, value in muon.state[theta].items()}
    return found


class _Whole:
    """One matrix, of which ranks hold rows."""

    def __init__(self, parameter: Parameter, ranks: Ranks) -> None:
        self._ranks, self._shape, self._part = ranks, parameter.tensor.shape, parameter.part
        self._lengths = [part.stop - part.start for part in parts_of(parameter.tensor, ranks.count)]

    def of(self, rows: Tensor) -> Tensor:
        """Everybody's rows; the very tensor, where a rank holds all of them."""
        if self._ranks.count == 1:
            return rows
        flat = rows.reshape(-1)
        return self._ranks.all_to_all([flat] * self._ranks.count, self._lengths).view(self._shape)

    def rows(self, whole: Tensor) -> Tensor:
        """Those of this rank."""
        if self._ranks.count == 1:
            return whole
        part = self._part
        return whole.reshape(-1)[part.start : part.stop].view(-1, *self._shape[1:]).clone()


def _of_muon(options: Mapping[str, Any]) -> dict[str, Any]:
    """What torch's Muon is given; JSON and TOML know no tuples."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in options.items()
        if key not in _NOT_MUONS
    }
