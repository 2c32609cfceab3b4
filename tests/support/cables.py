"""Cables between network namespaces."""

from __future__ import annotations

import json
import subprocess
import time


def wait_running(namespace: str, device: str, timeout_s: float = 5.0) -> None:
    """Until the kernel says that the device runs, up to a second after it was set up: before that nobody
    listens at its address."""
    command = ["ip", "-n", namespace, "-json", "link", "show", device]
    deadline_s = time.monotonic() + timeout_s
    while True:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        if json.loads(answer.stdout)[0]["operstate"] == "UP":
            return
        assert time.monotonic() < deadline_s, f"{device} does not run"
        time.sleep(0.02)
