"""The reference of a run file's keys: complete, with a meaning for each, and current in the repository."""

from __future__ import annotations

import pytest

from tests.support.paths import ROOT
from thinwire.compression.registry import COMPRESSORS
from thinwire.node.cli.main import main
from thinwire.node.config import RunConfig
from thinwire.node.run_files.reference import NEEDED, Table, reference, section_of, tables
from thinwire.optim.registry import STRATEGIES

PAGE = ROOT / "docs" / "reference.md"


def table(title: str) -> Table:
    (found,) = [t for t in tables() if t.title == title]
    return found


def test_the_page_in_the_repository_is_current() -> None:
    assert PAGE.read_text() == reference(), "thinwire config --reference > docs/reference.md"


def test_every_table_and_key_is_there_with_a_meaning() -> None:
    there = {(t.title, key.name) for t in tables() for key in t.keys}
    for name, field in RunConfig.model_fields.items():
        if name != "strategy":
            assert {key for title, key in there if title == f"[{name}]"} >= {
                key
                for key, inner in section_of(field.annotation).model_fields.items()
                if not key.startswith("lora")
            }
    titles = {t.title for t in tables()}
    assert {f'[strategy] with name = "{name}"' for name in STRATEGIES} <= titles
    assert {f'[strategy.compressor] with name = "{name}"' for name in COMPRESSORS} <= titles
    assert "[task.lora]" in titles
    assert [f"{t.title} {key.name}" for t in tables() for key in t.keys if not key.meaning] == []


def test_a_line_says_what_the_classes_say() -> None:
    rounds = next(key for key in table("[run]").keys if key.name == "rounds")
    assert (rounds.type, rounds.default, rounds.range) == ("whole number", "200", ">= 1, <= 2147483648")
    spsa = {key.name: key for key in table('[strategy] with name = "spsa"').keys}
    assert spsa["lr"].default == NEEDED
    assert (spsa["probes"].range, spsa["scale"].type) == ("1 to max_probes", '"mean", "sqrt"')
    assert spsa["params"].type == "text"
    targets = next(key for key in table("[task.lora]").keys if key.name == "targets")
    assert (targets.type, targets.default) == ("list of text", "[]")


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--reference"]) == 0
    assert capsys.readouterr().out == reference()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("thinwire 0.")
    assert main(["config"]) == 2
    assert "thinwire config --reference" in capsys.readouterr().err
