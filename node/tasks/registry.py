"""Which task a run trains: a built-in one, or the user's own by import path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Final

from ...compression.errors import ConfigError
from .. import config
from .base import Task
from .text import TextTask


def make_task(options: config.Task, import_path: str | None, data: Path | None) -> Task:
    """The task of a run: the built-in one, or `import_path` from the user's own command line.

    That is module:callable, called as `make(options, data)` for a Task. Raises ConfigError.
    """
    if import_path is None:
        _refuse_strange(options)
        if options.name == "hf":
            from .hf_task import HfTask

            return HfTask(options, data)
        if options.name == "custom":
            raise ConfigError(
                "this run trains a custom task, and code never comes over the network: "
                "install the task's package here and name it with --task package.module:function, or join "
                "from a training loop that has the model (thinwire.node.loop.api: join, load_weights)"
            )
        return TextTask(options, data)
    module_name, _, attribute = import_path.partition(":")
    if not attribute:
        raise ConfigError(f"--task {import_path}: write it as package.module:function")
    sys.path.insert(0, "")  # as `python -m` does: a module in the working directory is found
    try:
        make = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"--task {import_path}: {e}") from e
    finally:
        sys.path.remove("")
    task: Task = make(options, data)
    return task


_OF_TEXT: Final = frozenset({"held_out_bytes", "layers", "width", "heads", "fedpara"})


_OF_ALL: Final = frozenset({"name", "corpus", "context", "batch"})


def _refuse_strange(options: config.Task) -> None:
    """Raises ConfigError for an option that another task has: it would do nothing."""
    own = {"text": _OF_ALL | _OF_TEXT, "hf": config.Task.model_fields.keys() - _OF_TEXT}.get(options.name)
    if own is None:
        return
    for name, known in config.Task.model_fields.items():
        if name not in own and getattr(options, name) != known.default:
            other = "text" if name in _OF_TEXT else "hf"
            raise ConfigError(
                f"task.{name} is an option of the task {other!r}, and this run trains {options.name!r}: "
                f'leave it out, or set task.name = "{other}"'
            )
