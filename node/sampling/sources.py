"""Where a trained model lies, and what it is: exports, files of weights, snapshots and state folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...compression.errors import ConfigError
from ..config import RunConfig, load_config, parse_config
from ..genesis import in_dtype
from ..snapshots.incoming import DATA, MANIFEST
from ..tasks.text import TextTask
from .text_models import ByteText, HfText, TextModel

MAX_CONFIG_BYTES: Final = 16 * 2**20

WEIGHTS: Final = "model.safetensors"


def open_text_model(path: Path, run_file: Path | None, base: Path | None, device: str) -> TextModel:
    """The model in an export folder, a file of weights or a snapshot. `run_file`: says what the model is,
    where nothing beside the weights does; `base`: of adapters. Raises ConfigError."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and _is_of_transformers(path):
        return HfText.of_folder(path, base, device)
    weights = _weights_in(path)
    config = load_config(run_file) if run_file is not None else _config_beside(folder)
    if config is None:
        raise ConfigError(f"{path}: nothing beside it says what model this is; name its run file with --run")
    return byte_text(config, load_weights(weights), device)


def byte_text(config: RunConfig, tensors: Mapping[str, Tensor], device: str) -> TextModel:
    """The byte GPT of a run. Raises ConfigError: another task, or weights that are not its own."""
    if config.task.name != "text":
        raise ConfigError(
            f"these are weights of a run of the task {config.task.name!r}: thinwire export gives "
            f"a folder that transformers loads, and that this command takes"
            if config.task.name == "hf"
            else f"thinwire generate knows no task {config.task.name!r}: it takes text and hf"
        )
    task = TextTask(config.task, None)
    model: Any = in_dtype(task.model(), config)
    own = {name: tensors.get(name) for name, _ in model.named_parameters()}
    strange = [name for name, p in model.named_parameters() if _shape(own[name]) != tuple(p.shape)]
    if strange:
        raise ConfigError(
            f"the weights are not those of the run's model: {', '.join(strange[:3])} "
            f"{'is' if len(strange) == 1 else 'are'} missing or of another shape"
        )
    model.load_state_dict(own)
    return ByteText(model.float().to(device))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Raises ConfigError."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise ConfigError(f"{path}: cannot be read as safetensors: {e}") from e


def device_for(name: str) -> str:
    """ "auto": cuda if there is a GPU. Raises ConfigError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    from ..run_node import check_device

    check_device(name)
    return name


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _weights_in(path: Path) -> Path:
    """The file itself, or that of an export or a snapshot folder. Raises ConfigError."""
    if path.is_file():
        return path
    for name in (WEIGHTS, DATA):
        if (path / name).is_file():
            return path / name
    raise ConfigError(
        f"{path}: no weights in it. Name what thinwire export or join --save wrote, or a snapshot "
        f"(a folder with {MANIFEST} and {DATA})"
    )


def _config_beside(folder: Path) -> RunConfig | None:
    """Of what thinwire export wrote: config.json; None: it is not there."""
    about = _json_of(folder / "config.json")
    if about is None or "run_id" not in about or not isinstance(about.get("config"), dict):
        return None
    return parse_config(json.dumps(about["config"]))


def _is_of_transformers(folder: Path) -> bool:
    if (folder / "adapter_config.json").is_file():
        return True
    about = _json_of(folder / "config.json")
    return about is not None and "model_type" in about


def _json_of(path: Path) -> dict[str, Any] | None:
    """Raises ConfigError for a file that is no table."""
    try:
        if os.path.getsize(path) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: too long for a config.json")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: no table")
    return found
