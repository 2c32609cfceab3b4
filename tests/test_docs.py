"""What ARCHITECTURE.md and CONTRIBUTING.md name is there."""

from __future__ import annotations

import re
import shlex
from contextlib import nullcontext

import pytest

from tests.support.command_line import parsed
from tests.support.paths import ROOT

DOCS = ("ARCHITECTURE.md", "CONTRIBUTING.md")
TOP = ("compression", "optim", "coordinator", "node", "tests", "deploy")


USERS = ("README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))))
"""What users read."""


def commands(name: str) -> list[list[str]]:
    """Every `thinwire` and `make` command of a page, in blocks and within lines, as a shell would read it."""
    text = (ROOT / name).read_text()
    blocks = re.findall(r"^```(?:sh)?\n(.+?)^```", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"(?<!`)`((?:\.venv/bin/)?(?:thinwire|make) [^`]+)`", text)
    named = [line.strip().removeprefix(".venv/bin/") for line in lines]
    return [shlex.split(line, comments=True) for line in named if re.match(r"(thinwire|make) [a-z-]", line)]


def named_paths(text: str) -> set[str]:
    """`folder/file.py` and `folder/`, as they stand between backticks; `codecs/x.py` is in compression/."""
    quoted = re.findall(r"`([\w./-]+/[\w.-]*)`", text)
    return {f"compression/{q}" if q.split("/")[0] in ("codecs", "cpu", "gpu") else q for q in quoted}


@pytest.mark.parametrize("name", DOCS)
def test_files_that_are_named_exist(name: str) -> None:
    paths = {p for p in named_paths((ROOT / name).read_text()) if p.split("/")[0] in (*TOP, ".ci")}
    assert len(paths) > 10
    assert sorted(p for p in paths if "NAME" not in p and not (ROOT / p).exists()) == []


def test_the_map_shows_what_is_there() -> None:
    """Every room has its line, and every file of the map exists in the folder above it."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    drawn = text.split("## The map")[1].split("```")[1]
    missing, folder = [], ""
    for line in drawn.splitlines():
        if found := re.match(r"(\w+)/", line):
            folder = found[1]
        names = re.findall(r"(?<![\w/])([a-z_]+(?:/|\.py))(?=[\s,;]|$)", line)
        missing += [f"{folder}/{n}" for n in names if n != f"{folder}/" and not (ROOT / folder / n).exists()]
    assert missing == []
    rooms = {p.name for top in TOP[:4] for p in (ROOT / top).iterdir() if any(p.glob("*.py"))}
    assert sorted(room for room in rooms if f"{room}/" not in drawn) == []


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"setup", "test", "lint"} <= named <= targets


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_bytes()) < 8000


@pytest.mark.parametrize("name", USERS)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text())
    assert [
        link for link in links if "://" not in link and not (ROOT / name).parent.joinpath(link).exists()
    ] == []


def test_the_readme_leads_to_every_page() -> None:
    linked = re.findall(r"\((docs/[\w-]+\.md)\)", (ROOT / "README.md").read_text())
    assert {*linked, "docs/package.md", "README.md"} == set(USERS)


@pytest.mark.parametrize("name", USERS)
def test_commands_that_users_read_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for program, *args in commands(name):
        if program == "make":
            assert args[0] in targets
            continue
        if len(args) == 1 and not args[0].startswith("-"):  # a command is named
            args.append("--help")
        with pytest.raises(SystemExit, match="0") if args[-1] == "--help" else nullcontext():
            parsed(args)


def test_every_surprise_has_its_test() -> None:
    text = (ROOT / "docs/surprises.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ") and "`tests/" in line]
    tests = [row[5].strip().strip("`") for row in rows]
    assert len(tests) > 12
    assert [t for t in tests if not (ROOT / t).is_file() or "def test_" not in (ROOT / t).read_text()] == []
    scripts = sorted(p.name for p in (ROOT / "findings").iterdir())
    assert scripts == sorted(p.name for p in (ROOT / "findings").glob("*.sh"))


@pytest.mark.parametrize("name", DOCS)
def test_they_stay_short(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) < 300


def test_code_cites_no_page_that_is_not_shipped() -> None:
    cited = re.compile(r"\bdesign(\.md)?: section|\bdesign\.md|\balgorithms\.md|field-notes|\bcommittee\.md")
    files = [
        p for top in TOP for suffix in ("py", "md", "toml", "yaml") for p in (ROOT / top).rglob(f"*.{suffix}")
    ]
    found = [p for p in files if p.name != "test_docs.py" and cited.search(p.read_text())]
    assert [str(p.relative_to(ROOT)) for p in found] == []
