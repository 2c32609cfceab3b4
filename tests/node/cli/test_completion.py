"""Shell completion: what it offers is what the command line takes, in the shells that are here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from thinwire.node.cli.completion import Shell, commands_of, completion
from thinwire.node.cli.main import Command, main

COMMANDS = {command.name: command for command in commands_of(Command)}

ASK = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_thinwire 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


def offered(folder: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words."""
    script = folder / "completion.bash"
    script.write_text(completion("bash", list(COMMANDS.values())))
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", script, *words], capture_output=True, text=True, check=True, cwd=folder
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_options_are_those_of_the_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    inner = COMMANDS[name].unnamed()[0].choices if name == "bench" else ()
    for line in ([name], *([name, word] for word in inner)):
        with pytest.raises(SystemExit):
            main([*line, "--help"])
    help_ = capsys.readouterr().out
    known = {word for option in COMMANDS[name].named() for word in option.names}
    lines = [line.strip("│ ") for line in help_.splitlines()]
    begins = {found[0] for line in lines if (found := re.match(r"--?[a-z][a-z-]*", line))}
    assert begins <= known, "all that the help has"
    assert "(default: None)" not in help_
    assert "(default: )" not in help_
    assert known <= set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", help_)), "and nothing else"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_offers_what_fits(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    assert offered(tmp_path, "thinwire", "co") == {"completion", "config", "coordinator", "compare"}
    assert {"--state", "--precision", "--save"} <= offered(tmp_path, "thinwire", "join", "--")
    assert offered(tmp_path, "thinwire", "join", "--precision", "") == {"auto", "float32", "bf16"}
    assert offered(tmp_path, "thinwire", "demo", "--no") == {"--no-faults"}
    assert offered(tmp_path, "thinwire", "coordinator", "ru") == {"run.toml"}
    assert offered(tmp_path, "thinwire", "completion", "f") == {"fish"}
    assert offered(tmp_path, "thinwire", "bench", "a") == {"all", "attacks", "audits"}
    assert offered(tmp_path, "thinwire", "join", "--port", "") == set()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], shell: Shell) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert name in text
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(text)
    done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
