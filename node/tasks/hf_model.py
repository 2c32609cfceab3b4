"""Models of transformers: from a folder or the hub at the coordinator, from their config.json alone at nodes.

Only classes that are part of transformers are built and only safetensors are read. A config.json that came
over the network is data: whatever in it could name code, kernels or files to fetch is refused.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...compression.errors import ConfigError, first_line
from ..config import Lora
from . import hf_adapters, hf_checks

log = logging.getLogger("thinwire.node")

MAX_CONFIG_BYTES: Final = 100_000
"""It travels in record 0."""

FILES: Final = ("*.json", "model*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab.txt")
"""What is fetched of a model on the hub. (Some repositories have all weights twice, under other names.)"""

_LOCAL_KEYS: Final = frozenset(
    {
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype"),
        *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset"),
        *("_attn_implementation_internal", "_experts_implementation", "experts_implementation"),
        *("_experts_implementation_internal", "use_kernels"),
    }
)
"""Of config.json, about one machine and not the model; attention and experts may name code on the hub."""

_REFUSED_KEYS: Final = {
    "auto_map": "it asks for code that comes with the model (trust_remote_code), and thinwire runs none. If "
    "transformers has the model's type itself, take auto_map out of config.json",
    "quantization_config": "its weights are quantised: train the original ones, e.g. with task.lora",
}

_building = threading.Lock()
"""transformers switches its initialisers off for the whole process."""


def require() -> None:
    """Raises ConfigError unless the extra is installed."""
    missing = [name for name in ("transformers", "peft", "datasets") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"this run trains a model of transformers, and {', '.join(missing)} cannot be imported here: "
            f"pip install 'thinwire[hf]'"
        )


# ------------------------------------------------------------------------------- from a folder or the hub


def model_folder(model: str, revision: str | None) -> Path:
    """The folder itself, or the cached copy of a model on the hub, fetched if need be. Raises ConfigError."""
    path = Path(model).expanduser()
    if path.is_dir():
        _refuse_folder(path, model)
        return path
    if path.exists():
        raise ConfigError(f"task.model {model}: a file; name the folder that holds it and config.json")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    advice = f"download it on a machine that can (hf download {model}) and give its folder, task.model=DIR"
    try:
        path = Path(snapshot_download(model, revision=revision, allow_patterns=list(FILES)))
    except HFValidationError:
        raise ConfigError(f"task.model {model}: no such folder, and no name of a model on the hub") from None
    except RevisionNotFoundError:
        raise ConfigError(f"task.revision {revision}: the hub's {model} has none of this name") from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"task.model {model}: no such folder, and the hub has no such model, or not for you: check the "
            f"name; for a private or gated one run hf auth login"
        ) from None
    except OSError as e:
        raise ConfigError(
            f"task.model {model}: no such folder, and the hub does not give it ({first_line(e)}): {advice}"
        ) from e
    _refuse_folder(path, model)
    return path


def _refuse_folder(folder: Path, model: str) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"task.model {model}: has no config.json; is it a model of transformers?")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise ConfigError(
            f"task.model {model}: has its weights as {pickles[0]} only, a pickle, which can run code when "
            f"it is read; thinwire reads safetensors. Convert it where you trust it: "
            f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR)"
        )
    raise ConfigError(f"task.model {model}: has no safetensors file with weights")


def read_architecture(folder: Path) -> str:
    """config.json without what is about one machine. Raises ConfigError for what nodes would refuse."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: cannot be read as JSON: {e}") from e
    text = json.dumps(_without_local_keys(found), sort_keys=True)
    try:
        configuration(text)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    return text


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights of the folder by the names that they have in `model` (on the meta device, with or without
    adapters), each in the smallest type that holds all its values. Raises ConfigError."""
    import transformers

    log.info("reading the weights in %s", folder)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        found, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=configuration(read_architecture(folder)),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        raise ConfigError(f"{folder}: the weights cannot be loaded: {first_line(e)}") from e
    missing = sorted([*info["missing_keys"], *info.get("mismatched_keys", ())], key=str)
    if missing:
        raise ConfigError(f"{folder}: has no fitting weights for {', '.join(map(str, missing[:3]))}")
    _refuse_buffers(found, folder)
    parameters = dict(found.named_parameters())
    names = {
        name: plain_name(name) for name, _ in model.named_parameters() if not hf_adapters.is_adapter(name)
    }
    hf_checks.refuse_left_over(found, set(names.values()), folder)
    text_config = found.config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None) or 2**16
    hf_checks.refuse_foresight(found, text_config.vocab_size, context, folder)
    return {name: compact(parameters[plain].detach()) for name, plain in names.items()}


def _refuse_buffers(model: nn.Module, folder: Path) -> None:
    """Nodes get parameters: what the model keeps in buffers must come out of its config alone."""
    fresh = dict(build(read_architecture(folder), None).named_buffers())
    trained = [n for n, b in model.named_buffers() if n not in fresh or not torch.equal(b, fresh[n])]
    if trained:
        raise ConfigError(
            f"{folder}: {', '.join(trained[:3])} are trained buffers, no parameters: unsupported"
        )


def compact(values: Tensor) -> Tensor:
    """The same values, as bfloat16 or float16 if each of them is one: what most models are stored as."""
    for dtype in (torch.bfloat16, torch.float16):
        small = values.to(dtype)
        if torch.equal(small.float().view(torch.int32), values.view(torch.int32)):
            return small
    return values


# --------------------------------------------------------------------------------- from config.json alone


def configuration(architecture: str) -> Any:
    """transformers' configuration object. Raises ConfigError for anything but a causal language model that
    transformers has itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if len(architecture) > MAX_CONFIG_BYTES:
        raise ConfigError(f"the model's config.json has more than {MAX_CONFIG_BYTES} bytes")
    try:
        found = json.loads(architecture)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"the model's config.json cannot be read: {e}") from e
    if not isinstance(found, dict):
        raise ConfigError("the model's config.json is no table")
    _refuse_keys(found)
    kind = found.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        import transformers

        raise ConfigError(
            f"the model's type {kind!r} is no causal language model that transformers "
            f"{transformers.__version__} has; a newer one may"
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(found)
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise ConfigError(f"the model's config.json is refused by transformers: {first_line(e)}") from e


def build(architecture: str, lora: Lora | None) -> nn.Module:
    """The model with parameters of any value, in float32; on the current device, meta included."""
    import transformers
    from transformers.initialization import no_init_weights

    config = configuration(architecture)
    with _building, no_init_weights():
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()  # type: ignore[operator]  # else done by the initialisation
        return model if lora is None else hf_adapters.adapted(model, lora)


def plain_name(name: str) -> str:
    """A parameter's name without what peft puts into it."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part != "base_layer")  # there may be several


def _keys(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys at any depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key, inner
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def _refuse_keys(found: Mapping[str, Any]) -> None:
    for key, value in _keys(found):
        if key in _REFUSED_KEYS and value:
            raise ConfigError(f"it has {key}: {_REFUSED_KEYS[key]}")
        if key in _LOCAL_KEYS:
            raise ConfigError(f"it has {key}, which a coordinator leaves out")


def _without_local_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_local_keys(v) for k, v in value.items() if k not in _LOCAL_KEYS}
    if isinstance(value, list):
        return [_without_local_keys(v) for v in value]
    return value
