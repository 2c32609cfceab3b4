"""The process of `child`: a job on its standard input, the answer on its standard output, both JSON."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

from ...compression.errors import ThinwireError, error_name
from ...coordinator.protocol.messages import encode_record
from ..config import RunConfig
from ..system.logs import log_to_stderr
from ..system.processes import end_with_parent
from ..tasks.registry import make_task
from .here import Here


def main() -> None:
    """Of the process that `Child` starts. Ends it, if it has answered."""
    end_with_parent()
    answers = os.dup(1)
    os.dup2(2, 1)  # what a task prints is no answer
    text = sys.stdin.read()
    if not text:  # nothing is to be done, or the parent has ended
        return
    job = json.loads(text)
    log_to_stderr(job["level"])
    try:
        said = answer(job)
    except ThinwireError as e:
        said = {"error": error_name(e), "text": str(e)}
    with open(answers, "w") as out:
        json.dump(said, out)
    sys.stdout.flush()
    os._exit(0)  # taking torch down would keep whoever waits, for a tenth of a second and more


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """See `Child`, whose job it is. Raises ThinwireError, and what the user's task raises."""
    if job["what"] == "check":
        from ...optim.registry import check_changes

        check_changes(job["table"], job["options"])
        return {}
    config = RunConfig.model_validate(
        {**json.loads(job["config"]["run"]), "admission": job["config"]["admission"]}
    )
    founder = Here(make_task(config.task, job["task"], None))
    if job["what"] == "compare":
        compared = founder.compare(config, job["recorded"])
        return {"differences": compared.differences, "loss_unit": compared.loss_unit}
    recovery, blobs = bytes.fromhex(job["recovery"]), Path(job["blobs"])
    founded = founder.found(config, job["coordinator"], recovery, blobs)
    record = base64.b64encode(encode_record(founded.body)).decode()
    return {"record": record, "loss_unit": founded.loss_unit}
