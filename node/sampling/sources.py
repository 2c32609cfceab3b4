"""Where a trained model lies, and what it is: exports, files of weights, snapshots and state folders."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...compression.errors import ConfigError
from ...coordinator.protocol.ledger_copy import COPY_NAME
from ..config import RunConfig, load_config, parse_config
from ..genesis import in_dtype
from ..snapshots.incoming import DATA, MANIFEST
from ..snapshots.names import SNAPSHOTS
from ..states.opening import open_state, runs_in
from ..states.replica import blob_of_run, newest_replica
from ..tasks.fedpara import plain_weights
from ..tasks.text import TextTask
from .text_models import ByteText, HfText, TextModel

log = logging.getLogger("thinwire.node")

MAX_CONFIG_BYTES: Final = 16 * 2**20

WEIGHTS: Final = "model.safetensors"


def open_text_model(path: Path, run_file: Path | None, base: Path | None, device: str) -> TextModel:
    """The model in an export folder, a file of weights, a snapshot or a state folder. `run_file`: says what
    the model is, where nothing beside the weights does; `base`: of adapters.

    Raises ConfigError, and as `newest_replica`.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if path.is_dir() and _is_of_transformers(path):
        return HfText.of_folder(path, base, device)
    if path.is_dir() and ((path / COPY_NAME).is_file() or runs_in(path)):
        return _of_state(path, device)
    weights = _weights_in(path)
    config = load_config(run_file) if run_file is not None else _config_beside(path)
    if config is None:
        raise ConfigError(f"{path}: nothing beside it says what model this is; name its run file with --run")
    return byte_text(config, load_weights(weights), device)


def _of_state(path: Path, device: str) -> TextModel:
    """After the newest round that the folder allows."""
    with open_state(path) as state:
        config = parse_config(state.genesis.config)
        _refuse_task(config)
        replica = newest_replica(state, None).replica
        log.info("the weights after round %d", replica.round)
        if config.task.name == "text":
            return byte_text(config, replica.weights(), device)
        assert state.genesis.held_out is not None
        tokens = blob_of_run(state, state.genesis.held_out, "held-out text")
        return HfText.of_run(replica.model.to(device), tokens)


def _refuse_task(config: RunConfig) -> None:
    if config.task.name not in ("text", "hf"):
        raise ConfigError(f"thinwire generate knows no task {config.task.name!r}: it takes text and hf")


def byte_text(config: RunConfig, tensors: Mapping[str, Tensor], device: str) -> TextModel:
    """The byte GPT of a run. Raises ConfigError: another task, or weights that are not its own."""
    _refuse_task(config)
    if config.task.name == "hf":
        raise ConfigError(
            "these are weights of a model of transformers alone: name the state folder, or what thinwire "
            "export writes"
        )
    task = TextTask(config.task.model_copy(update={"fedpara": None}), None)
    tensors = plain_weights(tensors)  # of a snapshot
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
        f"{path}: no weights in it. Name a state folder, what thinwire export or join --save wrote, or a "
        f"snapshot (a folder with {MANIFEST} and {DATA})"
    )


def _config_beside(path: Path) -> RunConfig | None:
    """Of an export (config.json), or of the state folder that a snapshot lies in; None: it is not there."""
    folder = path if path.is_dir() else path.parent
    about = _json_of(folder / "config.json")
    if about is not None and "run_id" in about and isinstance(about.get("config"), dict):
        return parse_config(json.dumps(about["config"]))
    run = folder.absolute().parent.parent
    if folder.absolute().parent.name != SNAPSHOTS or not (run / COPY_NAME).is_file():
        return None
    with open_state(run) as state:
        return None if state.record is None else parse_config(state.genesis.config)


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
