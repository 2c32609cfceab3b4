"""`thinwire bench learning`, its small form: strategies against their references, step for step the same."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.learning.labels import VARIANTS, Result, trained
from tests.learning.labels import markdown as labels_table
from thinwire.node import config
from thinwire.node.bench.learning.averaging import Gpa, Snoo, finished
from thinwire.node.bench.learning.demo import decode, select
from thinwire.node.bench.learning.labels import (
    CONTEXT,
    HELD_OUT_BYTES,
    PROMPT,
    SOURCES,
    WINDOW,
    WORDS,
    Labels,
    examples,
    source,
)
from thinwire.node.bench.learning.loco import Loco, train_loco
from thinwire.node.bench.learning.methods import METHODS, Shape, Try, text_of
from thinwire.node.bench.learning.mezo import Lozo
from thinwire.node.bench.learning.rows import Row, Wanted, broken, noise, rows_of, with_targets
from thinwire.node.bench.learning.swarm import train
from thinwire.node.bench.learning.table import learning_command, markdown
from thinwire.node.bench.learning.text import Text, constant

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = config.Task(layers=1, width=16, heads=2, context=16, batch=4, held_out_bytes=1024)
SHAPE = Shape(TASK, n_peers=2, n_rounds=4, inner_steps=3)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_diloco_and_muloco_are_their_references_but_for_rounding(muon: bool, momentum: float) -> None:
    text = Text(TASK, 1)
    shape = {"n_peers": 2, "n_rounds": 3, "schedule": constant}
    strategy = {
        **{"name": "diloco", "lr": 1e-2, "inner_steps": 3, "weight_decay": 0.0, "outer_lr": 0.7},
        **{"outer_momentum": momentum, "compressor": {"name": "dense", "bits": 32}},
        **({"inner": "muon"} if muon else {}),
    }
    ours = train(text, strategy, **shape)  # type: ignore[arg-type]
    loco = Loco(lr=1e-2, outer_lr=0.7, outer_momentum=momentum, inner_steps=3, muon=muon)
    theirs = flat(train_loco(text, loco, **shape))  # type: ignore[arg-type]
    begun = flat(text.model())
    moved = (theirs - begun).norm()
    assert moved > 1.0
    assert (flat(ours.model) - theirs).norm() < 0.02 * moved
    assert ours.payload_bytes > 3 * 4 * len(begun)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.reference and m.learns != "labels"])
def test_every_row_learns_as_its_reference_does(name: str) -> None:
    method, tried = METHODS[name], Try(1e-2)
    assert method.reference is not None
    text = text_of(method.learns, SHAPE, 1)
    before = text.loss(text.model())
    ours = text.loss(method.ours(text, SHAPE, tried).model)
    reference = text.loss(method.reference(text, SHAPE, tried))
    assert ours < before
    assert reference < before
    # DeMo sends as many of a small tile as of a large one: an eighth of these here.
    assert before - ours > (0.3 if name == "decoupled" else 0.7) * (before - reference)


def test_demos_transform_loses_nothing_if_all_is_sent() -> None:
    for shape in ((96, 80), (64,), (7, 130)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(decode([select(x, 4096)], x.shape), x, atol=1e-5)


def test_every_row_may_try_as_many() -> None:
    assert len({len(method.tries) for method in METHODS.values()}) == 1
    assert all(len(set(method.tries)) == len(method.tries) for method in METHODS.values())


def wanted(*names: str, n_seeds: int = 1, tuned: bool = False, n_jobs: int = 1) -> Wanted:
    shape = replace(SHAPE, n_rounds=2)
    return Wanted(names=names, shape=shape, n_seeds=n_seeds, tuned=tuned, n_jobs=n_jobs)


def test_the_command_writes_rows_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, names = tmp_path / "learning.md", ["ddp", "muloco"]
    code = learning_command(wanted(*names, n_seeds=2), as_json=True, output=table)
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert [row["method"] for row in rows] == names
    for row in rows:
        assert row["seeds"] == [1, 2]
        assert row["ours"] == pytest.approx(sum(row["held_out"]["ours"]) / 2)
        assert row["bytes_per_step"] > 0
        assert row["n_tries"] == 1
        assert [curve[-1][1] for curve in row["curves"]] == pytest.approx(row["held_out"]["ours"], abs=1e-4)
    assert code == ("does not hold" in captured.err)
    assert captured.err.count("of CPU time)") == 2 + 4
    assert table.read_text().count("\n") == 4


def test_rows_of_processes_are_those_of_this_one() -> None:
    assert list(rows_of(wanted("alone", n_seeds=2, n_jobs=2))) == list(rows_of(wanted("alone", n_seeds=2)))


def test_what_is_tuned_is_the_best_that_was_tried() -> None:
    (row,) = rows_of(wanted("alone", tuned=True))
    text, method = Text(TASK, 1), METHODS["alone"]
    losses = [text.loss(method.ours(text, replace(SHAPE, n_rounds=2), tried).model) for tried in method.tries]
    assert row.ours == pytest.approx(min(losses), abs=1e-4)
    assert row.tuned["ours"]["lr"] == method.tries[losses.index(min(losses))].lr


def row(method: str, ours: list[float], reference: list[float] | None = None) -> Row:
    held_out = {"ours": ours, **({} if reference is None else {"reference": reference})}
    return Row(
        method=method,
        ours=sum(ours) / len(ours),
        reference=None if reference is None else sum(reference) / len(reference),
        seeds=list(range(1, len(ours) + 1)),
        held_out=held_out,
        bytes_per_step=10.0,
        bytes_to_target=None,
        tuned={"ours": {"lr": 1e-3, "outer_lr": 0.7, "outer_momentum": 0.6, "own": []}},
        n_tries=6,
        curves=[((0.0, 3.0), (10.0 * i, loss)) for i, loss in enumerate(ours, 1)],
    )


def test_bytes_are_counted_to_the_loss_of_ddp_and_a_tenth() -> None:
    """Of the same seed."""
    rows = [row("muloco", [2.0, 2.2]), row("spsa", [1.0]), row("ddp", [1.95, 2.15]), row("alone", [2.1, 2.1])]
    found = {each.method: each.bytes_to_target for each in with_targets(rows)}
    assert list(found) == ["alone", "ddp", "muloco", "spsa"]
    assert found == {"alone": None, "ddp": 15.0, "muloco": 15.0, "spsa": None}
    assert with_targets(rows[:1])[0].bytes_to_target is None


def test_what_does_not_hold_is_said() -> None:
    good = [row("alone", [2.5, 2.6]), row("ddp", [2.1, 2.2]), row("muloco", [2.0, 2.1], [2.0, 2.12])]
    assert broken(good) == []
    assert "| missed | lr 0.001, outer 0.7/0.6 |" in markdown(good)
    bad = [row("ddp", [1.9, 1.9]), row("muloco", [2.3, 2.3], [2.0, 2.0])]
    assert broken(bad) == [
        "muloco 2.300 is within noise of its reference 2.000",
        "muloco 2.300 is better than ddp 1.900",
    ]
    assert noise({"ours": [2.0, 2.6], "reference": [2.0, 2.2]}) == pytest.approx(0.4)


# ------------------------------------------------------------------------------------------- what was tried


@pytest.mark.parametrize("muon", [False, True])
def test_snoo_of_a_round_is_what_diloco_does_with_one_peer(muon: bool) -> None:
    text, shape = Text(TASK, 1), {"n_peers": 1, "n_rounds": 3, "schedule": constant}
    outer = Loco(lr=1e-2, outer_lr=0.7, outer_momentum=0.6, inner_steps=3, muon=muon)
    plain = replace(outer, outer_lr=1.0, outer_momentum=0.0)
    snoo = partial(Snoo, every=3, lr=0.7, momentum=0.6)
    theirs = flat(train_loco(text, outer, **shape))  # type: ignore[arg-type]
    ours = flat(train_loco(text, plain, **shape, averaging=snoo))  # type: ignore[arg-type]
    assert (ours - theirs).norm() < 0.01 * (theirs - flat(text.model())).norm()


def test_gpa_with_one_constant_is_nesterov() -> None:
    """The sum of squares of a vector, at y: where torch's SGD has its parameters."""
    models = [nn.Linear(4, 1, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    begun = flat(models[0])
    sgd = torch.optim.SGD(models[0].parameters(), lr=0.05 * (1 - 0.6), momentum=0.6, nesterov=True)
    plain = torch.optim.SGD(models[1].parameters(), lr=0.05)
    gpa = Gpa(models[1], mu_x=0.6, mu_y=0.6)
    for _ in range(5):
        for model, optimizer in zip(models, (sgd, plain), strict=True):
            optimizer.zero_grad()
            model.weight.square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        gpa.stepped()
        assert torch.allclose(flat(models[1]), flat(models[0]), atol=1e-6)
    assert flat(models[0]).norm() < 0.9 * begun.norm()
    with finished(gpa, models[1]):
        assert flat(models[1]).norm() > flat(models[0]).norm()  # x is behind y
    assert torch.allclose(flat(models[1]), flat(models[0]), atol=1e-6)


def test_lozos_directions_are_of_low_rank_and_share_a_factor_for_a_while() -> None:
    model = nn.Linear(7, 5)
    directions = Lozo(rank=2, interval=3).directions(model, torch.Generator().manual_seed(1))
    drawn = [directions(round_)[:35].view(5, 7) for round_ in (1, 3, 4)]
    assert [int(torch.linalg.matrix_rank(z)) for z in drawn] == [2, 2, 2]
    assert int(torch.linalg.matrix_rank(torch.cat(drawn[:2]))) == 2
    assert int(torch.linalg.matrix_rank(torch.cat(drawn[1:]))) == 4
    assert len(directions(4)) == 40


def test_every_row_that_was_tried_trains() -> None:
    names = ["muloco-snoo", "diloco-gpa", "decoupled-gpa", "subspace"]
    wanted = Wanted(names=names, shape=replace(SHAPE, n_rounds=2), n_seeds=1, tuned=False)
    rows = with_targets(rows_of(wanted))
    assert {row.method: len(row.tuned["ours"]["own"]) for row in rows} == dict(
        zip(names, (2, 3, 2, 0), strict=True)
    )
    assert "lr 0.005, mu_x 0.9, mu_y 0.7" in markdown(rows)


# ------------------------------------------------------------------------------------------- label words


def test_batches_of_label_words_are_the_same_for_everybody_and_none_is_held_out() -> None:
    begun = Text(TASK.model_copy(update={"context": CONTEXT}), 1).model().state_dict()
    words, again = Labels(TASK, 1, begun), Labels(TASK, 1, begun)
    model = words.model()
    assert words.held_out(model) == again.held_out(again.model())
    with torch.no_grad():
        batches = [float(w.batch(model, peer, 1)()) for w, peer in ((words, 0), (again, 0), (words, 1))]
    assert batches[0] == batches[1] != batches[2]
    learnt, kept = (examples(np.random.default_rng(1), 32, is_held_out=held) for held in (False, True))
    assert learnt.bytes_BT.shape == (32, CONTEXT + 1)
    for label, row in zip(learnt.label_B.tolist(), learnt.bytes_BT.tolist(), strict=True):
        assert bytes(row[-len(PROMPT) - 1 :]) == PROMPT + WORDS[label : label + 1]
        assert bytes(row[:WINDOW]) in source(SOURCES[label])[:-HELD_OUT_BYTES]
    for label, row in zip(kept.label_B.tolist(), kept.bytes_BT.tolist(), strict=True):
        assert bytes(row[:WINDOW]) in source(SOURCES[label])[-HELD_OUT_BYTES:]


def test_a_float_for_a_byte_changes_the_scalars_alone() -> None:
    words = Labels(TASK, 1, Text(TASK.model_copy(update={"context": CONTEXT}), 1).model().state_dict())
    both = [flat(trained(words, VARIANTS[name], 1e-3, n_probes=8)) for name in ("spsa", "spsa, float")]
    begun = flat(words.model())
    moved = [(model - begun).sign() for model in both]
    assert not torch.equal(both[0], both[1])
    assert (moved[0] == moved[1]).float().mean() > 0.9


def test_a_table_of_label_words_has_paired_differences() -> None:
    pairs = {"mezo": (0.3, 0.5), "spsa": (0.4, 0.7)}
    results = [
        Result(name, 1e-3, seed, loss, 0.9, 1.0)
        for name, losses in pairs.items()
        for seed, loss in enumerate(losses)
    ]
    assert "| spsa | 2 | 0.550 ± 0.150 | 90.0% | +0.150 ± 0.050 | 1.0 |" in labels_table(results)


def test_bytes_are_halved_or_it_is_said() -> None:
    ddp = row("ddp", [2.0])
    now, before = (
        replace(row(name, [1.9]), bytes_to_target=n)
        for name, n in (("decoupled", 60.0), ("decoupled-before", 100.0))
    )
    assert broken([ddp, now, before]) == [
        "decoupled needs at most half of the bytes of decoupled-before to ddp + 0.1: 60 B, 100 B"
    ]
    assert broken([ddp, replace(now, bytes_to_target=50.0), before]) == []
    assert broken([ddp, now, replace(before, bytes_to_target=None)]) == []
    assert "missed, missed" in broken([ddp, *(replace(r, bytes_to_target=None) for r in (now, before))])[0]
    assert broken([now, before]) == []
