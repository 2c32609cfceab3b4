"""The text task: what it trains on, what it holds out, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thinwire.compression.errors import ConfigError
from thinwire.node import config
from thinwire.node.tasks.base import Init
from thinwire.node.tasks.corpora import read_text
from thinwire.node.tasks.registry import make_task
from thinwire.node.tasks.text import TextTask

SMALL = config.Task(layers=1, width=16, heads=2, context=16, batch=4, held_out_bytes=1024)


def text_file(folder: Path, n_bytes: int = 5000) -> Path:
    path = folder / "own.txt"
    path.write_bytes(bytes(32 + i * i % 91 for i in range(n_bytes)))
    return path


def test_batches_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(0)
    task = TextTask(SMALL, None)
    task.load(None, task.held_out())
    model = task.model().eval()
    with torch.no_grad():
        first, again, other = (task.draw(model, seed)() for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_the_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    task = TextTask(SMALL.model_copy(update={"corpus": str(text_file(tmp_path))}), None)
    corpus, held_out = task.corpus(), task.held_out()
    assert corpus is not None
    assert corpus + held_out == text_file(tmp_path).read_bytes()
    node = TextTask(SMALL, text_file(tmp_path))  # a node that brings the very same file
    node.load(None, held_out)
    assert bytes(node._text) == corpus


def test_a_node_never_opens_a_path_that_came_over_the_network(tmp_path: Path) -> None:
    """The coordinator hands its own text out as bytes; the name that a node sees is not a path."""
    task = TextTask(SMALL.model_copy(update={"corpus": "run"}), None)
    task.load(b"some text from the coordinator " * 20, None)
    with pytest.raises(ConfigError, match="no text at 'run'"):
        TextTask(SMALL.model_copy(update={"corpus": "run"}), None).load(None, None)


def test_evaluation_is_the_mean_over_all_windows() -> None:
    task = TextTask(SMALL, None)
    held_out = task.held_out()
    task.load(None, held_out)
    model = task.model().eval()
    with torch.no_grad():
        loss = task.evaluate(model)
        bytes_T = torch.tensor(list(held_out))
        windows_BT = bytes_T[: 63 * 16 + 1].unfold(0, 17, 16)
        logits = model(windows_BT[:, :-1])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows_BT[:, 1:].flatten())
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert 5.0 < loss < 6.5


def test_every_parameter_has_a_rule() -> None:
    task = TextTask(SMALL, None)
    rules = {name: task.init(name, tuple(p.shape)) for name, p in task.model().named_parameters()}
    assert rules["blocks.0.norm1.weight"] == Init("ones")
    assert rules["blocks.0.qkv.bias"] == Init("zeros")
    assert rules["head.weight"] == Init("normal", 0.02)
    assert rules["blocks.0.proj.weight"].scale < 0.02


def test_folders_are_read_in_name_order_without_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    assert read_text(str(tmp_path)) == b"first\nsecond"


@pytest.mark.parametrize("corpus", ["pydoc", "stdlib"])
def test_built_in_texts_are_there(corpus: str) -> None:
    assert len(read_text(corpus)) > 400_000


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no text at .*nothing"):
        read_text(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="too few to hold out 1024"):
        TextTask(SMALL, text_file(tmp_path, 500)).held_out()
    with pytest.raises(ConfigError, match="not a multiple of"):
        TextTask(SMALL.model_copy(update={"heads": 3}), None)


def test_a_custom_task_is_named_on_the_own_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_task.py").write_text(
        "from thinwire.node.tasks.text import TextTask\n"
        "def make(options, data):\n"
        "    return TextTask(options, data)\n"
    )
    monkeypatch.chdir(tmp_path)
    custom = SMALL.model_copy(update={"name": "custom"})
    assert isinstance(make_task(custom, "own_task:make", None), TextTask)
    with pytest.raises(ConfigError, match="code never comes over the network"):
        make_task(custom, None, None)
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
        make_task(custom, "no_such_module:make", None)
    with pytest.raises(ConfigError, match=r"package\.module:function"):
        make_task(custom, "own_task", None)
