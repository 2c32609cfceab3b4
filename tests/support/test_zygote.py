"""Processes that are forked begin and end as those do that load everything themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.small_run import TASK
from tests.support.waiting import wait_until
from tests.support.zygote import Zygote

SCRIPT = """
import atexit, json, os, sys, tempfile
kept = tempfile.TemporaryDirectory()
atexit.register(print, "the end")
seen = [sys.argv, os.getcwd(), sys.path[:2], os.environ["SAID"], sys.stdin.read(), __name__, os.getsid(0)]
print(json.dumps([*seen, kept.name]))
sys.exit(7)
"""

pytestmark = pytest.mark.swarm


def test_they_begin_and_end_as_others_do(tmp_path: Path) -> None:
    zygote = Zygote(os.environ)
    env = {**os.environ, "SAID": "hello", "PYTHONPATH": "/nowhere", "TMPDIR": str(tmp_path)}

    def start(name: str, *args: str, **options: Any) -> Any:
        out, err = tmp_path / f"{name}.out", tmp_path / f"{name}.err"
        return zygote.start(args, cwd=tmp_path, env=env, out=out, err=err, **options)

    (tmp_path / "run.toml").write_text(TASK)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    scripted = start("script", "a", "b", script=script, session=True, line="a line")
    helped, wrong = start("help", "--help"), start("wrong", "dance")
    serving = [
        start(f"n{i}", "coordinator", "run.toml", "--state", f"n{i}", "--host", "127.0.0.1") for i in range(2)
    ]
    with pytest.raises(subprocess.TimeoutExpired):
        serving[0].wait(0.01)

    assert scripted.wait(20) == 7
    seen, end = (tmp_path / "script.out").read_text().splitlines()
    *seen, folder = json.loads(seen)
    path = [str(tmp_path), "/nowhere"]
    assert seen == [
        [str(script), "a", "b"], str(tmp_path), path, "hello", "a line\n", "__main__", scripted.pid
    ]  # fmt: skip
    assert end == "the end"
    assert folder.startswith(str(tmp_path))
    assert not Path(folder).exists(), "what it has to do at its end is done"
    assert helped.wait(20) == 0
    assert "thinwire" in (tmp_path / "help.out").read_text()
    assert wrong.wait(20) == 2

    tickets = [tmp_path / "n0.out", tmp_path / "n1.out"]
    wait_until(lambda: all(p.read_text().startswith("tw1-") for p in tickets), 30, lambda: "no tickets")
    serving[0].terminate()
    assert serving[0].wait(20) == 128 + signal.SIGTERM
    zygote.end()
    assert not psutil.pid_exists(serving[1].pid), "they end with it"
