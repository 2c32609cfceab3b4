"""Adapters of low rank (LoRA, FedPara's as LoHa) in a model of transformers, by peft: where they sit, how
they begin, and those of a folder that training goes on from."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...compression.errors import ConfigError, first_line
from ..config import Lora

WEIGHTS: Final = "adapter_model.safetensors"
SETTINGS: Final = "adapter_config.json"

MERGED_OFF: Final = 1e-3
"""Of the largest logit: so far rounding may take those of a merged model."""

_UNDERSTOOD: Final = frozenset(
    {
        *("r", "lora_alpha", "alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern"),
        *("peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode", "use_rslora"),
        *("base_model_name_or_path", "revision", "fan_in_fan_out", "lora_dropout", "init_lora_weights"),
        *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    }
)
"""Of adapter_config.json: read here, known to peft by itself, or without a meaning once there are weights."""

_KINDS: Final[dict[str, Literal["lora", "hadamard"]]] = {"LORA": "lora", "LOHA": "hadamard"}
"""What peft calls them, and what `task.lora.kind` does."""


# ---------------------------------------------------------------------------------------------- the model


def adapted(model: nn.Module, lora: Lora) -> nn.Module:
    """With adapters of any value, on the current device. Raises ConfigError."""
    import peft

    targets = lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets)
    alike: dict[str, Any] = {
        "r": lora.r,
        "target_modules": targets or ([] if lora.parameters else None),
        "rank_pattern": dict(lora.ranks),
        "alpha_pattern": dict(lora.alphas),
        "task_type": "CAUSAL_LM",
    }
    if lora.kind == "hadamard":
        if lora.parameters:
            raise ConfigError('task.lora.parameters: kind = "hadamard" knows linear layers alone')
        options: Any = peft.LoHaConfig(alpha=lora.alpha, **alike)
    else:
        parameters = list(lora.parameters) or None
        options = peft.LoraConfig(
            lora_alpha=lora.alpha, target_parameters=parameters, lora_dropout=0.0, **alike
        )
    try:
        with _quiet():
            found: nn.Module = peft.get_peft_model(model, options)
    except ValueError as e:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        given = f"task.lora.targets {list(lora.targets)}" if lora.targets else "task.lora without targets"
        raise ConfigError(
            f"{given}: {first_line(e)} Name some of the model's linear layers: {', '.join(linear)}"
        ) from e
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft asks transformers for something by its old name.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        # These options it sets by itself, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern", category=RuntimeWarning)
        # An adapter on a tied head is one of its own: the embeddings stay what they are.
        warnings.filterwarnings(
            "ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning
        )
        yield


def as_adapted(model: nn.Module, lora: Lora) -> Lora:
    """`lora` with all that peft has made of it for this model: other machines build the same from it."""
    adapted: Any = model
    found = adapted.peft_config["default"]
    return lora.model_copy(
        update={
            "targets": tuple(sorted(found.target_modules or ())),
            "parameters": tuple(sorted(getattr(found, "target_parameters", None) or ())),
            "ranks": dict(sorted(found.rank_pattern.items())),
            "alphas": dict(sorted(found.alpha_pattern.items())),
        }
    )


def is_adapter(name: str) -> bool:
    return ".lora_" in name or ".hada_w" in name


def initial_scale(name: str, shape: tuple[int, ...]) -> float:
    """Of the normal noise that an adapter begins with, 0 for none: so that what it adds is 0 at first.

    The variance of peft's own rule (Kaiming uniform with a = sqrt 5): 1 / (3 inputs). Of Hadamard products
    one factor begins at 0, the others as peft's do.
    """
    if ".hada_w" in name:
        return {"w1_a": 0.1, "w2_a": 0.0}.get(name.rpartition(".hada_")[2].split(".")[0], 1.0)
    if ".lora_A." in name:
        return 1.0 / math.sqrt(3 * shape[1])
    return 1.0 if ".lora_embedding_B." in name else 0.0


def save(model: nn.Module, base: str | None, folder: Path) -> None:
    """As peft loads them; the same bytes for the same adapters. `base`: the name of the model below."""
    adapted: Any = model
    adapted.peft_config["default"].base_model_name_or_path = base
    # "auto" would ask the hub whether the vocabulary has changed.
    with _quiet():
        adapted.save_pretrained(folder, save_embedding_layers=False)
    path = folder / SETTINGS
    settings = json.loads(path.read_text(encoding="utf-8"))  # peft writes its sets in any order
    for key in ("target_modules", "target_parameters"):
        if isinstance(settings.get(key), list):
            settings[key] = sorted(settings[key])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def save_merged(model: nn.Module, folder: Path) -> None:
    """A model of transformers, in float32, that has the adapters in its weights: those of `model` go there.

    Raises ConfigError if it computes something else than with adapters beside the weights. peft (0.21) adds
    what adapts a tied matrix to both of its uses, with `ensure_weight_tying` twice: here each has its own.
    """
    ids_BT = torch.arange(8, device=next(model.parameters()).device)[None]
    adapted: Any = model.float().eval()
    with torch.no_grad(), _quiet():
        expected = adapted(input_ids=ids_BT, use_cache=False).logits
        if _untied(adapted):
            adapted.config.tie_word_embeddings = False
        merged = adapted.merge_and_unload()
        found = merged(input_ids=ids_BT, use_cache=False).logits
    off, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not off <= MERGED_OFF * largest:
        raise ConfigError(
            f"with the adapters in its weights the model says something else (logits up to {largest:.3g} are "
            f"off by {off:.3g}): export without --merged, and load that beside the model"
        )
    merged.save_pretrained(folder)


def _untied(adapted: nn.Module) -> bool:
    """Gives adapted layers whose weight another layer has, too, one of their own: whether there was one."""
    n_uses = Counter(id(m._parameters.get("weight")) for m in adapted.modules())
    below: list[Any] = [m.base_layer for m in adapted.modules() if "base_layer" in m._modules]
    tied = [m for m in below if m._parameters.get("weight") is not None and n_uses[id(m.weight)] > 1]
    for layer in tied:
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    return bool(tied)


# ------------------------------------------------------------------------------------ those of a folder


def settings_of(folder: Path, model: nn.Module) -> Lora:
    """What a folder's adapters are, as `task.lora` says it. `model`: the one below, on the meta device.

    Raises ConfigError for what is no plain LoRA, nor FedPara's form of it."""
    found = _read_settings(folder / SETTINGS)
    kind = _KINDS.get(str(found.get("peft_type")))
    if kind is None:
        known = " and ".join(_KINDS)
        raise ConfigError(
            f"task.adapter {folder}: {found.get('peft_type')} adapters; thinwire goes on from {known}"
        )
    _refuse_others(found, folder)
    alpha, r = found.get("lora_alpha" if kind == "lora" else "alpha", 8), found.get("r", 8)
    try:
        if found.get("use_rslora"):  # scales by alpha / sqrt(r)
            if found.get("rank_pattern") or found.get("alpha_pattern"):
                raise ConfigError(f"task.adapter {folder}: use_rslora with patterns of ranks is unsupported")
            alpha = alpha * math.sqrt(r)
        return Lora(
            kind=kind,
            r=r,
            alpha=alpha,
            targets=_targets(found.get("target_modules") or (), model),
            parameters=tuple(sorted(found.get("target_parameters") or ())),
            ranks=found.get("rank_pattern") or {},
            alphas=found.get("alpha_pattern") or {},
        )
    except (ValidationError, TypeError, ValueError, re.error) as e:
        raise ConfigError(f"task.adapter {folder / SETTINGS}: {first_line(e)}") from e


def _targets(targets: Any, model: nn.Module) -> tuple[str, ...]:
    """An expression becomes the names of the layers that it finds."""
    if not isinstance(targets, str):
        return tuple(sorted(targets))
    if targets == "all-linear":
        return (targets,)
    return tuple(sorted(name for name, _ in model.named_modules() if re.fullmatch(targets, name)))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"task.adapter {path.parent}: has no {path.name}; is it a peft adapter?") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"task.adapter {path}: cannot be read as JSON: {e}") from e
    if not isinstance(found, dict):
        raise ConfigError(f"task.adapter {path}: no table")
    return found


def _refuse_others(found: Mapping[str, Any], folder: Path) -> None:
    """Options that would change what the adapters compute, and that `adapted` does not give."""
    import peft

    plain = peft.LoraConfig() if found["peft_type"] == "LORA" else peft.LoHaConfig()
    for key, value in sorted(found.items()):
        if key not in _UNDERSTOOD and value and value != getattr(plain, key, None):
            raise ConfigError(
                f"task.adapter {folder}: its {key} is {str(value)[:60]!r}, which thinwire cannot go on with. "
                f"Merge the adapter into its model (merge_and_unload of peft) and train new ones on that"
            )


def read_adapters(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """A folder's adapters by the names that they have in `model`. Raises ConfigError."""
    path = folder / WEIGHTS
    try:
        found = load_file(path)
    except FileNotFoundError:
        raise ConfigError(f"task.adapter {folder}: has no {WEIGHTS} (pickles, *.bin, are not read)") from None
    except (OSError, SafetensorError, KeyError) as e:
        raise ConfigError(f"task.adapter {path}: cannot be read as safetensors: {first_line(e)}") from e
    wanted = {saved_name(name): (name, p) for name, p in model.named_parameters() if is_adapter(name)}
    for name in sorted(wanted.keys() ^ found.keys()):
        where = "it has no" if name in wanted else "the model has no place for its"
        raise ConfigError(f"task.adapter {folder}: {where} {name}; is it an adapter of task.model?")
    for name, (_, p) in wanted.items():
        if found[name].shape != p.shape or not found[name].is_floating_point():
            raise ConfigError(
                f"task.adapter {folder}: {name} is {list(found[name].shape)} {found[name].dtype}, "
                f"the model wants {list(p.shape)}"
            )
    return {own: found[name].float() for name, (own, _) in wanted.items()}


def saved_name(name: str) -> str:
    """A parameter's name in files of peft: without that of the set of adapters."""
    return ".".join(part for part in name.split(".") if part != "default")
