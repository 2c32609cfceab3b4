"""Hints name a command that exists."""

from __future__ import annotations

import re
from pathlib import Path

from thinwire.node.cli.completion import commands_of
from thinwire.node.cli.main import Command
from thinwire.node.system.command_name import as_typed, command_name


def test_the_name_is_what_the_user_typed_where_no_shell_would_find_it(tmp_path: Path) -> None:
    script = tmp_path / "bin" / "thinwire"
    script.parent.mkdir()
    script.touch()
    assert command_name(str(script), lambda _: None) == str(script)
    assert command_name(str(script), lambda _: "/usr/bin/thinwire") == "thinwire"
    assert command_name("/some/where/main.py", lambda _: None) == "thinwire"


def test_hints_are_rewritten_and_nothing_else() -> None:
    said = "next: thinwire export /x/thinwire/run -o w, or `thinwire run STATE stop`; thinwire is older"
    assert as_typed(said, "v/thinwire") == (
        "next: v/thinwire export /x/thinwire/run -o w, or `v/thinwire run STATE stop`; thinwire is older"
    )
    assert as_typed(said, "thinwire") == said


def test_every_command_is_known() -> None:
    for command in commands_of(Command):
        assert re.match("v/thinwire ", as_typed(f"thinwire {command.name} X", "v/thinwire")), command.name
