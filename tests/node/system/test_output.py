"""What is written to a terminal."""

from __future__ import annotations

import pytest

from thinwire.node.cli.main import main
from thinwire.node.system.output import shown


def test_nothing_that_is_shown_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of fields and words of other machines are part of errors and of log lines."""
    assert shown("naïve\tdéjà\n\x1b[2Jvu\r\x07\ud800") == "naïve\tdéjà\n?[2Jvu???"
    assert main(["status", "twt1\x1b[2J"]) != 0
    err = capsys.readouterr().err
    assert "\x1b" not in err
