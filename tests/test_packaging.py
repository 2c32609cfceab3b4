"""What an install contains: an unlisted folder works in an editable install and is missing from the wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

NOT_PACKAGES = {"tests", "deploy", "build", "docs", "findings"}


MONITORING = ROOT / "deploy/monitoring"
"""Installed as thinwire.monitoring, which has no code."""


def listed() -> list[str]:
    """The packages that have code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages: list[str] = project["tool"]["setuptools"]["packages"]
    assert "thinwire.monitoring" in packages
    return [name.removeprefix("thinwire.") for name in packages if name != "thinwire.monitoring"]


def roots() -> list[str]:
    """Those that hold the others."""
    return [name for name in listed() if "." not in name]


def modules(package: str) -> set[str]:
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")}


def test_every_folder_with_code_is_a_listed_package() -> None:
    folders = {
        p.relative_to(ROOT).parent.as_posix().replace("/", ".")
        for p in ROOT.rglob("*.py")
        if not p.relative_to(ROOT).parts[0].startswith(".")
        and p.relative_to(ROOT).parts[0] not in NOT_PACKAGES
    }
    assert folders == set(listed())


def test_no_package_shadows_the_standard_library() -> None:
    """A top-level `compression` with an __init__.py would, from Python 3.14 on."""
    assert not [package for package in roots() if any((ROOT / package).rglob("__init__.py"))]


@pytest.mark.timeout(180)
def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "docs").mkdir()
    for name in ("pyproject.toml", "docs/package.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for package in roots():
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(MONITORING, source / "deploy/monitoring")
    made = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("thinwire-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for package in roots():
        assert {f"thinwire/{module}" for module in modules(package)} <= inside
        assert f"thinwire/{package}/py.typed" in inside
    page = {p.name for p in (ROOT / "coordinator/observe/static").iterdir()}
    assert {"index.html", "page.css", "page.js"} < page
    assert {f"thinwire/coordinator/observe/static/{name}" for name in page} <= inside
    shipped = {
        f"thinwire/monitoring/{p.relative_to(MONITORING).as_posix()}"
        for kind in ("*.yml", "*.json")
        for p in MONITORING.rglob(kind)
        if "tests" not in p.relative_to(MONITORING).parts
    }
    assert shipped == {name for name in inside if name.startswith("thinwire/monitoring/")}


def test_a_package_index_can_show_the_description() -> None:
    """There is nothing beside it: a relative link or picture would be broken."""
    text = (ROOT / "docs/package.md").read_text()
    assert re.findall(r"\]\((?!https://)", text) == []
    assert "<img" not in text
