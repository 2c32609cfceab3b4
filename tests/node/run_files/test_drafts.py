"""`thinwire init`: what it writes is a run that a coordinator takes; questions and refusals."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from tests.support.local_nodes import KEY
from tests.support.tiny_model import save_tiny_llama
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.node.cli.main import main
from thinwire.node.config import load_config
from thinwire.node.genesis import Genesis, make_genesis
from thinwire.node.run_files.drafts import KINDS, asked, filled, labels_of, run_file
from thinwire.node.tasks.registry import make_task


def genesis_of(path: Path) -> Genesis:
    """Record 0, as a coordinator makes it."""
    config = load_config(path, environ={})
    return make_genesis(config, make_task(config.task, None, None), peer_id_of(KEY.public_key()), 1)


@pytest.mark.parametrize("kind", ["bytes", "slow"])
def test_a_coordinator_takes_runs_from_scratch(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.toml"
    assert main(["init", str(path), "--kind", kind, "--rounds", "7", "--peers", "3"]) == 0
    body = genesis_of(path).body
    config = json.loads(body.config)
    assert (config["run"]["rounds"], config["run"]["min_peers"]) == (7, 3)
    assert config["strategy"]["name"] == {"bytes": "decoupled", "slow": "diloco"}[kind]


def test_a_coordinator_takes_runs_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the hf task is an extra")
    pytest.importorskip("peft", reason="the hf task is an extra")
    model, examples = tmp_path / "model", tmp_path / "examples.jsonl"
    save_tiny_llama(model, max_tokens=256)
    lines = [json.dumps({"text": f"film {i}", "label": i % 2}) for i in range(80)]
    examples.write_text("\n".join(lines))
    for kind in ("text", "lora", "classify"):
        path = tmp_path / f"{kind}.toml"
        corpus = str(examples) if kind == "classify" else "pydoc"
        assert main(["init", str(path), "--kind", kind, "--model", str(model), "--corpus", corpus]) == 0
        genesis = genesis_of(path)
        assert genesis.body.base is not None
        config = json.loads(genesis.body.config)
        assert (config["task"]["lora"] is not None) == (kind == "lora")
        assert bool(config["task"]["labels"]) == (kind == "classify")


def test_every_line_has_a_place_for_its_reason() -> None:
    for kind in KINDS:
        text = run_file(filled(kind, {}), Path("run.toml"))
        assert all(len(line) <= 110 for line in text.splitlines())
        assert text.startswith("# ")


def test_odd_values_stay_what_they_are() -> None:
    labels = "yes, or no=\t\u007f\"sure\",\U0001f600= 'great'"
    with pytest.raises(ConfigError, match="VALUE=WORDS"):
        labels_of(labels)
    given = {"name": 'a "b" \\ # \U0001f600\x7f', "prompt": "{text}\n->", "labels": "a b= x,1.5= y=z"}
    found = tomllib.loads(run_file(filled("classify", given), Path("run.toml")))
    assert found["run"]["name"] == given["name"]
    assert found["task"]["prompt"] == given["prompt"]
    assert found["task"]["labels"] == {"a b": " x", "1.5": " y=z"}


def test_questions_are_asked_for_what_was_not_given() -> None:
    questions = []

    def ask(question: str, default: str) -> str:
        questions.append(question.split(":", maxsplit=1)[0])
        return {"What is to be trained": "lora", "Rounds": "12"}.get(question, default)

    draft = asked(None, {"model": "my/model"}, ask)
    assert (draft.kind, draft.rounds, draft.model, draft.corpus) == ("lora", 12, "my/model", "pydoc")
    assert "Model" not in questions
    assert questions[0] == "What is to be trained"


def test_a_wrong_answer_is_asked_for_again(capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter(["Bytes", " bytes ", " name ", "pydoc", "ten", "10", "0", "3"])
    draft = asked(None, {}, lambda _question, _default: next(answers))
    assert (draft.kind, draft.name, draft.rounds, draft.peers) == ("bytes", "name", 10, 3)
    told = capsys.readouterr().err
    assert "did you mean 'bytes'?" in told
    assert "--rounds ten: a whole number from 1" in told
    with pytest.raises(ConfigError, match="--rounds x"):  # a flag is not asked for again
        asked("bytes", {"rounds": "x"}, lambda _question, default: default)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--kind", "bytes", "--model", "x"), "--model: a run of kind 'bytes' has none"),
        (("--kind", "bytes", "--rounds", "0"), "--rounds 0: a whole number from 1"),
        (("--kind", "bytes", "--rounds", "99999999999"), "run.rounds: Input should be less than"),
        (("--kind", "classify", "--labels", "0=no"), "write it as VALUE=WORDS,VALUE=WORDS"),
        (("--kind", "bytes", "--name", "x" * 200), "run.name"),
        ((), "nobody to ask: name a --kind, one of bytes"),
    ],
)
def test_refusals_write_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", *args]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_over_only_with_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text("mine")
    assert main(["init", str(path), "--kind", "bytes"]) == 2
    assert "there already" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["init", str(path), "--kind", "bytes", "--force"]) == 0
    assert main(["init", str(tmp_path / "none" / "run.toml"), "--kind", "bytes"]) == 2
    assert "cannot be written" in capsys.readouterr().err
