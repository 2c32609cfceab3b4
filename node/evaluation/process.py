"""The process of an evaluation: exports the weights and calls the function on the folder.

It has the lowest priority, and ends with all that it has started when the node is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ...coordinator.protocol.files import write_aside
from ..cli.ledger_command import about_export
from .job import EXPORT, LM_EVAL, RESULT, TOKENS, WEIGHTS, Job, figures_of


def main() -> None:
    """`python -m thinwire.node.evaluation.process FOLDER PARENT`."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    _step_back()
    job = Job.read(folder)
    export = folder / EXPORT
    export.mkdir()
    write_export(job, folder, export)
    figures = figures_of(evaluated(job, export))
    write_aside(folder / RESULT, json.dumps(figures).encode())


def evaluated(job: Job, export: Path) -> Any:
    """What the user's function, or lm-eval, makes of the folder. Raises whatever that raises."""
    if job.function == LM_EVAL:
        from .harness import lm_eval

        return lm_eval(export, job.tasks, job.limit, job.device)
    module, _, attribute = job.function.partition(":")
    return getattr(importlib.import_module(module), attribute)(export)


def write_export(job: Job, folder: Path, export: Path) -> None:
    """The same that `thinwire export` writes; of adapters for lm-eval the whole model. Raises ConfigError and
    OSError."""
    text = about_export(job.config, job.run_id, job.round, job.fingerprint)
    if not job.has_tokens:
        os.link(folder / WEIGHTS, export / "model.safetensors")
        (export / "config.json").write_bytes(text)
        return
    _export_pretrained(job, folder, export)
    (export / "thinwire.json").write_bytes(text)


def _export_pretrained(job: Job, folder: Path, export: Path) -> None:
    from safetensors.torch import load_file

    from ...optim.base import canonical_name
    from ..config import parse_config
    from ..genesis import in_dtype
    from ..tasks.base import Pretrained
    from ..tasks.registry import make_task

    config = parse_config(job.config)
    task = make_task(config.task, job.import_path, None)
    assert isinstance(task, Pretrained)
    model: Any = in_dtype(task.model(), config)
    tensors = load_file(folder / WEIGHTS)
    own = {name: tensors[canonical_name(name)] for name, _ in model.named_parameters()}
    model.load_state_dict(own, strict=False)
    tokens = (folder / TOKENS).read_bytes()
    task.export(model, tokens, export)
    if job.function == LM_EVAL and config.task.lora is not None:
        # It takes adapters only beside their model, which is not on this machine.
        (export / "adapter_config.json").unlink()
        (export / "adapter_model.safetensors").unlink()
        model.merge_and_unload().save_pretrained(export)


def _step_back() -> None:
    """Training goes first: on the processor, and on the disk."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    import psutil

    with contextlib.suppress(OSError, AttributeError, psutil.Error):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
