"""The substituted forward equals, bit for bit, a model whose parameters were really changed."""

from __future__ import annotations

import copy
import shutil
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinwire.compression.numerics.noise import perturb
from thinwire.node.bench.live_bytes import LiveBytes
from thinwire.optim.base import Parameter
from thinwire.optim.parts import perturb as under_test
from thinwire.optim.parts.perturb import Direction, NotSubstituted, Substitution, dry_run, perturbed_loss
from thinwire.optim.spsa import Spsa

DIRECTION = Direction("sign", 1234567890123456789, 3, 1e-2)
TOKENS = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 0]])


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Built with weights that depend on nothing else."""
    with torch.random.fork_rng():
        model = build().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def parameters_of(model: nn.Module) -> list[Parameter]:
    return Spsa(model.named_parameters(), lr=1.0).parameters_in_order()


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


class Mean(nn.Module):
    """A loss: the mean square of what `module` gives for `inputs`."""

    def __init__(self, module: nn.Module, *inputs: Tensor) -> None:
        super().__init__()
        self.module_under_test, self.inputs = module, inputs

    def forward(self) -> Tensor:
        out = self.module_under_test(*self.inputs)
        return (out[0] if isinstance(out, tuple) else out).square().mean()


class Tied(nn.Module):
    """The embedding is the output matrix too, used functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.mix = nn.Linear(6, 6)

    def forward(self) -> Tensor:
        logits = F.linear(torch.tanh(self.mix(self.embed(TOKENS))), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())


class TiedModules(nn.Module):
    """Tied by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self) -> Tensor:
        return F.cross_entropy(self.head(self.embed(TOKENS)).flatten(0, 1), TOKENS.flatten())


class Twice(nn.Module):
    """One module called twice, once of them under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4))

    def forward(self) -> Tensor:
        x = self.inner(data(3, 4))
        return checkpoint(self.inner, x, use_reentrant=False).square().mean()


class Functional(nn.Module):
    """Parameters in lists, views, operators, properties and casts."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList([nn.Parameter(torch.empty(4)) for _ in range(3)])
        self.matrix = nn.Parameter(torch.empty(4, 4))
        self.scalar = nn.Parameter(torch.empty(()))

    def forward(self) -> Tensor:
        stacked = torch.stack(list(self.rows))
        chained = torch.einsum("ij,jk->ik", stacked, self.matrix.T) @ self.matrix.double().float()
        sliced = self.matrix[1] + self.matrix.data.view(-1)[:4] + self.rows[0].detach()
        return (chained * sliced * self.scalar).sum() + (2.0 - self.scalar) ** 2


class Autocast(nn.Module):
    """bfloat16 autocast keeps casts of leaf parameters in a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(self.a(data(4, 8)))
        return y.float().square().mean()


class Convolution(nn.Module):
    """A convolution whose weight is in another memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)

    def forward(self) -> Tensor:
        return self.norm(self.conv(data(2, 3, 8, 8))).square().mean()


def weight_normed() -> nn.Module:
    return Mean(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), data(2, 4))


def attention() -> nn.Module:
    x = data(2, 5, 8)
    return Mean(nn.MultiheadAttention(8, 2, batch_first=True), x, x, x)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return Mean(nn.TransformerEncoder(layer, 2), data(2, 5, 8))


class PaddedEncoder(nn.Module):
    """With a padding mask the fast path would use nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self) -> Tensor:
        mask = torch.tensor([[False] * 5, [False, False, False, True, True]])
        y: Tensor = self.encoder(data(2, 5, 8), src_key_padding_mask=mask)
        return y[:, :3].square().mean()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Mean(nn.Linear(4, 3), data(2, 4)),
    "tied functionally": Tied,
    "tied modules": TiedModules,
    "twice and checkpointed": Twice,
    "functional": Functional,
    "autocast": Autocast,
    "convolution": Convolution,
    "weight norm": weight_normed,
    "attention": attention,
    "transformer encoder": encoder,
    "padded encoder": PaddedEncoder,
    "lstm": lambda: Mean(nn.LSTM(4, 5, num_layers=2, bidirectional=True), data(3, 2, 4)),
    "gru": lambda: Mean(nn.GRU(4, 5), data(3, 2, 4)),
}


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    # Fused attention sums in another order: the comparison is with modules that do not take it.
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def changed_copy(model: nn.Module, direction: Direction) -> nn.Module:
    """An independent model with theta + eps z in its parameters."""
    other = copy.deepcopy(model)
    index = {p.name: p.index for p in parameters_of(model)}
    d = direction
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(perturb(p.detach().contiguous(), d.eps, d.kind, d.seed, index[name], d.probe))
    return other


@pytest.mark.parametrize("kind", ["sign", "gauss"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_a_changed_copy(name: str, kind: str) -> None:
    model = seeded(MODELS[name])
    before = {n: (p.detach().clone(), p._version) for n, p in model.named_parameters()}
    direction = Direction(kind, 99, 5, 1e-2)  # type: ignore[arg-type]
    loss = perturbed_loss(model, parameters_of(model), direction)
    with torch.no_grad():
        assert loss == float(changed_copy(model, direction)())
        assert loss != float(model())
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0]), f"{n} changed"
        assert p._version == before[n][1], f"{n} was written to"


@pytest.mark.parametrize("name", MODELS)
def test_dry_run_passes_and_leaves_the_bits_alone(name: str) -> None:
    torch.backends.mha.set_fastpath_enabled(True)  # as users have it
    model = seeded(MODELS[name])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    dry_run(model, parameters_of(model), DIRECTION)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_dry_run_needs_the_memory_of_a_probe() -> None:
    model = seeded(lambda: Mean(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), data(1, 64)))
    peaks = []
    for run in (perturbed_loss, dry_run):
        with LiveBytes(model.parameters()) as live:
            run(model, parameters_of(model), DIRECTION)
        peaks.append(live.peak_bytes)
    layer = sum(p.nbytes for p in model.parameters()) // 8
    assert peaks[1] <= peaks[0] + layer


def compiled(backend: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = seeded(Tied)
    warm = torch.compile(model, backend=backend)
    with torch.no_grad():
        warm()
    return model, warm


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
        ),
    ],
)
def test_a_warm_compiled_model(backend: str) -> None:
    model, warm = compiled(backend)
    parameters = parameters_of(model)
    loss = perturbed_loss(warm, parameters, DIRECTION)
    with torch.no_grad():
        assert loss == float(changed_copy(model, DIRECTION)())
    dry_run(warm, parameters, DIRECTION)
    torch.compiler.reset()


class Aliased(nn.Module):
    """Keeps an alias of one parameter: no torch function is handed the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(3, 3)
        self.hidden = nn.Parameter(torch.ones(3))
        self.alias = self.hidden.detach()

    def forward(self) -> Tensor:
        return (self.good(data(2, 3)) * self.alias).square().mean()


def test_dry_run_names_what_was_not_substituted() -> None:
    model = seeded(Aliased)
    with pytest.raises(NotSubstituted, match=r"past the perturbation: hidden\."):
        dry_run(model, parameters_of(model), DIRECTION)


class Squared(nn.Module):
    """Reads past the substitution what is zero, and of which the sign makes no difference."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(3, 3)
        self.zero = nn.Parameter(torch.zeros(3))
        self.alias = self.zero.detach()

    def forward(self) -> Tensor:
        return (self.good(data(2, 3)).square() + self.alias.square()).mean()


def test_dry_run_finds_zeros_that_were_not_substituted() -> None:
    with torch.random.fork_rng():
        model = Squared()
    with pytest.raises(NotSubstituted, match=r"past the perturbation: zero\."):
        dry_run(model, parameters_of(model), DIRECTION)


def test_dry_run_restores_when_the_forward_fails() -> None:
    model = seeded(lambda: Mean(nn.Linear(4, 3), data(2, 4)))
    before = [p.detach().clone() for p in model.parameters()]
    n_calls = 0

    def third_fails() -> Tensor:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise RuntimeError("out of memory")
        loss: Tensor = model()
        return loss

    with pytest.raises(RuntimeError, match="out of memory"):
        dry_run(third_fails, parameters_of(model), DIRECTION)
    assert n_calls == 3
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_dry_run_refuses_a_random_closure() -> None:
    model = seeded(lambda: Mean(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)), data(2, 4)))
    model.train()
    with pytest.raises(NotSubstituted, match="two evaluations"), torch.random.fork_rng():
        dry_run(model, parameters_of(model), DIRECTION)


def test_descriptions_cost_no_perturbation(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    parameters = Spsa([("w", weight)], lr=1.0).parameters_in_order()
    made: list[str] = []
    real = under_test.perturbed

    def counting(whole: Tensor, parameter: Parameter, direction: Direction, is_hidden: bool) -> Tensor:
        made.append(parameter.name)
        return real(whole, parameter, direction, is_hidden)

    monkeypatch.setattr(under_test, "perturbed", counting)
    with Substitution(parameters, DIRECTION):
        assert weight.shape == (3, 2)
        assert weight.size(0) == len(weight) == 3
        assert weight.dim() == weight.ndim == 2
        assert weight.numel() == torch.numel(weight) == 6
        assert weight.dtype == torch.float32
        assert weight.device.type == "cpu"
        assert weight.is_contiguous()
        assert weight.stride() == (2, 1)
        assert weight.requires_grad
        assert weight.is_floating_point()
        assert weight.grad is None
        assert made == []
        assert not torch.equal(weight.T, torch.ones(2, 3))
        assert made == ["w"]


def test_scratch_lives_for_one_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    alive: list[weakref.ref[Tensor]] = []
    n_alive: list[int] = []
    real = under_test.perturbed

    def watched(whole: Tensor, parameter: Parameter, direction: Direction, is_hidden: bool) -> Tensor:
        scratch = real(whole, parameter, direction, is_hidden)
        assert scratch._is_view()  # autocast caches casts of leaves that are no views
        alive.append(weakref.ref(scratch))
        return scratch

    def closure() -> Tensor:
        x = data(2, 4)
        with torch.autocast("cpu", torch.bfloat16):
            for layer in model:
                x = layer(x)
                n_alive.append(sum(ref() is not None for ref in alive))
        return x.float().sum()

    monkeypatch.setattr(under_test, "perturbed", watched)
    perturbed_loss(closure, parameters_of(model), DIRECTION)
    assert len(alive) == 6
    assert n_alive == [0, 0, 0]


def test_no_gradient_is_recorded() -> None:
    model = seeded(Tied)
    seen: list[bool] = []

    def closure() -> Tensor:
        loss: Tensor = model()
        seen.append(loss.requires_grad)
        return loss

    perturbed_loss(closure, parameters_of(model), DIRECTION)
    assert seen == [False]
    assert torch.is_grad_enabled()
