"""`thinwire bench ... --against DIR` or `--against REVISION`: the same benchmarks with another build, in turn
with this one, so that both meet the same weather.

A build is a folder with the sources, as a checkout has them; its own `.venv` runs it, if there is one. A
revision is checked out of this build's own repository into a temporary folder. Each benchmark runs in a
process of its own, a few times with each build; what was measured one after the other is compared. Those that
are `BY_COMMANDS` drive the other build's command line from here: it need not have the benchmark.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from ...compression.errors import ConfigError, ThinwireError
from ..system.output import make_console, to_stderr, to_stdout
from ..system.processes import PARENT_VARIABLE
from .against import parse
from .steps.swarm import BUILD_VARIABLE
from .tables import time_words, words
from .view import bytes_and_bits, timings

PAIRS: Final = 3
"""Processes of each build."""

BY_COMMANDS: Final = frozenset(["step"])

FOLDERS: Final = ("compression", "coordinator", "node", "optim")


@dataclass(frozen=True, slots=True)
class Build:
    """`path`: what its Python finds `thinwire` by first; None: as this process does."""

    python: str
    path: Path | None

    def run(self, args: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """What `thinwire bench ARGS --json` prints there. Raises ThinwireError."""
        env, python = {**os.environ, PARENT_VARIABLE: str(os.getpid())}, self.python
        if self.path is not None and args[0] in BY_COMMANDS:
            env[BUILD_VARIABLE], python = json.dumps([python, str(self.path)]), sys.executable
        elif self.path is not None:
            env["PYTHONPATH"] = str(self.path)
        command = [python, "-m", "thinwire.node.cli.main", "bench", *args, "--json"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join(re.sub("[╭╮╰╯│─]", " ", done.stderr).split())
            told = said[-300:] if "Traceback" in said else said[:300]
            raise ThinwireError(told or f"exit code {done.returncode}")
        return parse(done.stdout)

    def compile(self) -> None:
        """Its kernels, so that no run waits for that. Raises ThinwireError."""
        assert self.path is not None
        command = [self.python, "-m", "thinwire.node.doctor.compiling"]
        env = {**os.environ, "PYTHONPATH": str(self.path)}
        if subprocess.run(command, env=env, capture_output=True, check=False).returncode:
            raise ThinwireError("the kernels of the other build cannot be compiled")


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure of both builds: medians, in seconds or whatever is counted; ours over theirs, of each pair and
    of CPU time, where that is known."""

    name: str
    theirs: float
    ours: float
    is_time: bool
    ratio: float
    least: float
    most: float
    cpu_ratio: float | None


@contextmanager
def other_build(text: str) -> Iterator[Build]:
    """Raises ConfigError for what is neither a folder with the sources nor a revision."""
    with tempfile.TemporaryDirectory(prefix="thinwire-build-") as name:
        folder, source = Path(name), Path(text)
        if not source.is_dir():
            source = _checked_out(text, folder / "source")
        if missing := [each for each in FOLDERS if not (source / each).is_dir()]:
            raise ConfigError(f"--against {text}: no sources of thinwire, {missing[0]} is not there")
        (folder / "thinwire").mkdir()
        for each in FOLDERS:
            (folder / "thinwire" / each).symlink_to((source / each).absolute())
        own = source / ".venv" / "bin" / "python"
        yield Build(str(own.absolute()) if own.exists() else sys.executable, folder)


def _checked_out(revision: str, to: Path) -> Path:
    root = Path(__file__).parents[2]
    to.mkdir()
    try:
        archive = subprocess.run(["git", "-C", root, "archive", revision], capture_output=True, check=False)
        said = archive.stderr.decode(errors="replace").strip()
    except OSError as e:
        archive, said = None, f"git: {e.strerror}"
    if archive is None or archive.returncode:
        why = said.splitlines()[0] if said else "git failed"
        raise ConfigError(f"--against {revision}: no file, no folder, and no revision of {root}: {why}")
    subprocess.run(["tar", "-x", "-C", to], input=archive.stdout, check=True)
    return to


def bench_builds(text: str, lines: Sequence[Sequence[str]], as_json: bool) -> None:
    """A table after each benchmark, or a list of JSON objects in the end, on stdout. `lines`: what `thinwire
    bench` takes for each. A benchmark that either build cannot run is named on stderr, and left out. Raises
    ConfigError."""
    ratios: list[Ratio] = []
    with other_build(text) as theirs:
        ours = Build(sys.executable, None)
        for line in lines:
            try:
                if line[0] in BY_COMMANDS:
                    theirs.compile()
                found = in_turn(theirs, ours, line)
            except ThinwireError as e:
                to_stderr(f"bench {line[0]} is left out: {e}")
                continue
            ratios += found
            if not as_json:
                _print(text, found)
    if as_json:
        to_stdout(json.dumps([asdict(each) for each in ratios], indent=1))


def in_turn(theirs: Build, ours: Build, args: Sequence[str]) -> list[Ratio]:
    """Every figure that both have. Raises ThinwireError."""
    pairs = []
    for i in range(PAIRS):
        first, second = (theirs, ours) if i % 2 == 0 else (ours, theirs)
        to_stderr(f"bench {args[0]}, both builds: pair {i + 1} of {PAIRS}")
        figures = _figures(first.run(args)), _figures(second.run(args))
        pairs.append(figures if i % 2 == 0 else (figures[1], figures[0]))
    common = [name for name in pairs[0][1] if all(name in figures for pair in pairs for figures in pair)]
    return [_ratio(name, [(a[name], b[name]) for a, b in pairs]) for name in common]


def _figures(benches: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """By name: a time, or a count as one without CPU time."""
    found: dict[str, dict[str, float]] = {}
    for bench, results in benches.items():
        for result in results:
            name = f"{bench} {result['n_params']:,}: " if "n_params" in result else f"{bench}: "
            found |= {name + what: dict(time) for what, time in timings(result)}
            found |= {name + what: {"n": n} for what, n in bytes_and_bits(result)}
    return found


def _ratio(name: str, pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> Ratio:
    key = "n" if "n" in pairs[0][1] else "median_s"
    ratios = [ours[key] / theirs[key] for theirs, ours in pairs if theirs[key]] or [1.0]
    cpu = [
        ours["cpu_s"] / theirs["cpu_s"] for theirs, ours in pairs if theirs.get("cpu_s") and "cpu_s" in ours
    ]
    return Ratio(
        name,
        median(theirs[key] for theirs, _ in pairs),
        median(ours[key] for _, ours in pairs),
        key == "median_s",
        median(ratios),
        min(ratios),
        max(ratios),
        median(cpu) if len(cpu) == len(pairs) else None,
    )


def _print(text: str, ratios: Sequence[Ratio]) -> None:
    from rich.table import Table

    table = Table(title=f"this build over {text}: medians of {PAIRS} pairs", title_justify="left")
    table.add_column("figure", overflow="fold")
    for head in (text, "this build", "ratio", "least .. most", "by CPU time"):
        table.add_column(head, justify="right")
    for r in ratios:
        theirs, ours = (time_words(x) if r.is_time else words("", float(x)) for x in (r.theirs, r.ours))
        spread, cpu = f"{r.least:.2f} .. {r.most:.2f}", "" if r.cpu_ratio is None else f"{r.cpu_ratio:.2f}"
        table.add_row(r.name, theirs, ours, f"{r.ratio:.2f}", spread, cpu)
    make_console().print(table)
