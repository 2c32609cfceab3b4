"""What a process says that it has taken."""

from __future__ import annotations

import subprocess
import sys

SAYS = "from thinwire.node.system.memory import peak_bytes as p; a = p(); b = b'x' * 10**8; print(a, p())"


def test_it_is_no_memory_of_who_started_the_process() -> None:
    large = b"x" * 3 * 10**8
    said = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, check=True, text=True).stdout
    first, then = map(int, said.split())
    assert first < len(large) / 3
    assert first + 9 * 10**7 < then < len(large)
