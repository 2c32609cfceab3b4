"""The process that founds a run is begun early, and ends with whoever began it."""

from __future__ import annotations

import subprocess
import sys


def test_a_process_that_was_begun_for_nothing_is_gone() -> None:
    """In a process without torch, where there is something to begin."""
    program = (
        "from thinwire.node.founding.child import Child\n"
        "from thinwire.node.system.stopping import Stop\n"
        "stop = Stop()\n"
        "with Child(None, stop) as child:\n"
        "    child.begin()\n"
        "    process = child._begun\n"
        "    assert process.poll() is None and stop.on_stop\n"
        "print(process.returncode, stop.on_stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "-9 []\n"
