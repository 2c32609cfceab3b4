"""Weights made of factors (FedPara): how many numbers, what rank, how they begin, what files have of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from thinwire.compression.numerics.noise import initial_values
from thinwire.node import config
from thinwire.node.config import RunConfig
from thinwire.node.sampling.sources import byte_text
from thinwire.node.snapshots.parts import weight_pieces, weights_of
from thinwire.node.tasks.fedpara import FACTORS, HadamardLinear, composed, linear, rank_of, saves
from thinwire.node.tasks.text import TextTask

OPTIONS = config.Task(layers=1, width=32, heads=2, context=16, batch=4, held_out_bytes=1024, fedpara=0.1)


def built(options: config.Task = OPTIONS) -> nn.Module:
    """With the exact values of a run."""
    task = TextTask(options, None)
    model = task.model()
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            init = task.init(name, tuple(p.shape))
            p.fill_(float(init.rule == "ones"))
            if init.rule == "normal":
                p.copy_(initial_values(3, i, 0, p.numel(), init.scale).view(p.shape))
    return model


def test_few_numbers_make_a_matrix_of_full_rank() -> None:
    m, n = 96, 64
    rank = rank_of(m, n, 0.0)
    assert rank == 8
    factors = [torch.randn(size, rank, generator=torch.Generator().manual_seed(i)) for i, size in
               enumerate((m, n, m, n))]  # fmt: skip
    assert int(torch.linalg.matrix_rank(composed(*factors).double())) == 64
    assert sum(f.numel() for f in factors) == 2 * 8 * (96 + 64) < m * n
    assert [rank_of(m, n, gamma) for gamma in (0.0, 0.5, 1.0)] == [8, 14, 19]
    assert saves(m, n, 0.5)
    assert not saves(8, 8, 0.0)
    assert isinstance(linear(8, 8, 0.0), nn.Linear)
    assert isinstance(linear(64, 96, None), nn.Linear)


def test_weights_begin_as_plain_ones_do() -> None:
    plain, other = built(OPTIONS.model_copy(update={"fedpara": None})), built()
    for name, weight in weights_of(plain).items():
        ours = weights_of(other)[name]
        assert ours.shape == weight.shape
        assert float(ours.std()) == pytest.approx(float(weight.std()), rel=0.25, abs=1e-9)
    n_plain, n_ours = (sum(p.numel() for p in m.parameters()) for m in (plain, other))
    assert n_ours < 0.85 * n_plain


def test_files_have_the_matrices(tmp_path: Path) -> None:
    model = built()
    assert isinstance(model.blocks[0].up, HadamardLinear)  # type: ignore[index, union-attr]
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"".join(bytes(piece) for piece in weight_pieces(model)))
    found, names = load_file(path), {n for n, _ in TextTask(OPTIONS, None).model().named_parameters()}
    assert not any(name.rpartition(".")[2] in FACTORS for name in found)
    assert any(name.rpartition(".")[2] in FACTORS for name in names)
    plain = TextTask(OPTIONS.model_copy(update={"fedpara": None}), None).model()
    plain.load_state_dict(found)
    window = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(window), model(window))
        run = RunConfig(task=OPTIONS)
        factors = {n: p.detach() for n, p in model.named_parameters()}
        for tensors in (found, factors):  # of an export; of a snapshot
            logits = byte_text(run, tensors, "cpu").start(list(range(16)))
            torch.testing.assert_close(logits, model(window)[0, -1])


def test_record_0_of_plain_runs_is_what_it_was() -> None:
    assert "fedpara" not in RunConfig().to_json()
    assert '"fedpara":0.1' in RunConfig(task=OPTIONS).to_json().replace(" ", "")
