"""`--split`: who gets what of which class, what text's classes are, and peers that train on their own."""

from __future__ import annotations

import numpy as np
import pytest

from thinwire.compression.errors import ConfigError
from thinwire.node import config
from thinwire.node.bench.learning.text import Text
from thinwire.node.compare.split import Split, table, told, unevenness
from thinwire.node.tasks.classes import Piece
from thinwire.node.tasks.text import TextTask

SIZES = [1000, 400, 3000, 10, 1590, 2000]
TASK = config.Task(layers=1, width=16, heads=2, context=16, batch=4, held_out_bytes=4096)


def covered(pieces: list[list[Piece]]) -> list[list[tuple[int, int]]]:
    """Of each class, what is taken, in order."""
    found: list[list[tuple[int, int]]] = [[] for _ in SIZES]
    for piece in (p for some in pieces for p in some):
        found[piece.number].append((piece.start, piece.stop))
    return [sorted(of_class) for of_class in found]


@pytest.mark.parametrize("text", ["labels:2", "labels:3", "dirichlet:0.3", "dirichlet:100"])
def test_everything_is_dealt_out_once_and_alike_for_the_same_seed(text: str) -> None:
    split = Split.parse(text)
    assert str(split) == text
    pieces = split.pieces(SIZES, 4, seed=7)
    for size, taken in zip(SIZES, covered(pieces), strict=True):
        assert [0, *(stop for _, stop in taken)] == [*(start for start, _ in taken), size]
    assert pieces == split.pieces(SIZES, 4, seed=7)
    assert pieces != split.pieces(SIZES, 4, seed=8)


@pytest.mark.parametrize("n_each", [2, 3])
def test_a_peer_sees_no_more_labels_than_it_is_to(n_each: int) -> None:
    pieces = Split("labels", n_each).pieces(SIZES, 4, seed=1)
    assert {len(some) for some in pieces} == {n_each}
    assert all(len({p.number for p in some}) == n_each for some in pieces)


def test_the_smaller_the_number_the_more_uneven() -> None:
    def apart(alpha: float) -> float:
        found = [Split("dirichlet", alpha).pieces(SIZES, 4, seed) for seed in range(8)]
        return float(np.mean([unevenness(table(pieces, len(SIZES))) for pieces in found]))

    assert apart(0.1) > apart(1.0) + 0.1 > apart(100.0) + 0.3
    assert apart(1e6) < 0.01


@pytest.mark.parametrize(
    "text", ["labels", "labels:0", "labels:1.5", "dirichlet:0", "dirichlet:nan", "two:2"]
)
def test_what_is_no_split_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as labels:2"):
        Split.parse(text)


def test_what_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="labels:3 does, or --peers 6"):
        Split("labels", 1).pieces(SIZES, 2, seed=1)
    with pytest.raises(ConfigError, match="less than a 10th"):
        Split("dirichlet", 0.001).pieces([5000], 16, seed=1)


def test_sections_of_text_are_dealt_out_and_each_holds_out_its_share() -> None:
    task = TextTask(TASK, None)
    before = len(task.held_out())
    whole = b"".join(task._split())
    classes = task.divide(8)
    parts = [classes.taken([Piece(i, 0, size)]) for i, size in enumerate(classes.sizes)]
    kept = [classes.held_out[512 * i : 512 * (i + 1)] for i in range(8)]
    assert b"".join(part + rest for part, rest in zip(parts, kept, strict=True)) == whole
    assert len(task.held_out()) == before == sum(map(len, kept))
    assert max(classes.sizes) - min(classes.sizes) <= 1
    line = told(Split("labels", 2), classes, Split("labels", 2).pieces(classes.sizes, 4, seed=1))
    assert "8 classes (section 1, ...) over 4 peers" in line
    assert "by 0.75 on average" in line
    assert "of its data: 2, 2, 2, 2; bytes of all: 25%, 25%, 25%, 25%" in line


def test_peers_draw_from_what_they_have_alone() -> None:
    text = Text(TASK, 3, split=Split("labels", 1), n_peers=3)
    own = [task._text for task in text._tasks]
    assert all(t is not None for t in own)
    sizes = [len(t) for t in own if t is not None]
    assert sum(sizes) == len(TextTask(TASK, None)._split()[0])
    model = text.model()
    losses = {peer: float(text.batch(model, peer, 1)().detach()) for peer in range(3)}
    assert len(set(losses.values())) == 3
    assert text.loss(model) == Text(TASK, 3, split=Split("labels", 1), n_peers=3).loss(model)
