"""Local state: exact bytes without pickle, for every strategy; nothing damaged is taken."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.compression.base import Turn
from thinwire.compression.registry import COMPRESSORS
from thinwire.node.snapshots.format import DTYPES
from thinwire.node.snapshots.local_state import BadLocalState, LocalState, decode, encode
from thinwire.optim.base import Closure, Share, Strategy
from thinwire.optim.inner.optimizers import LIBRARIES
from thinwire.optim.registry import STRATEGIES, build_strategy

CONFIGS: list[dict[str, Any]] = [
    # The local state of sapo, which needs a task of its own, is that of diloco's inner optimizer.
    *({"name": name} for name in STRATEGIES if name not in {"decoupled", "spsa", "sapo"}),
    {"name": "spsa", "lr": 1e-2, "probes": 3},
    *({"name": "decoupled", "compressor": {"name": name}} for name in COMPRESSORS),
    *(
        {"name": name, "inner": inner}
        for name in ("diloco", "gossip")
        for inner in ("Adafactor", "Lion", "ScheduleFree")
        if find_spec(LIBRARIES.get(inner, ("torch",))[0])
    ),
]


def bytes_of(local: LocalState) -> bytes:
    return b"".join(bytes(piece) for piece in encode(local))


def through(strategy: dict[str, Any]) -> dict[str, Any]:
    return decode(bytes_of(LocalState(3, strategy))).strategy


def assert_same(a: Any, b: Any) -> None:
    """Types, dtypes and bits."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float):
        assert (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    else:
        assert a == b


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name: str) -> None:
    bits = torch.arange(48, dtype=torch.uint8) % (2 if name == "BOOL" else 251)
    state = {"x": bits.view(DTYPES[name]), "scalar": bits[:16].view(DTYPES[name])[0].clone()}
    assert_same(state, through(state))


def test_every_type_of_value() -> None:
    state: dict[str, Any] = {
        "numbers": [0, -1, 2**64 - 1, -(2**70), True, False, None],
        "floats": (0.0, -0.0, 0.1, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan),
        "text": ["", 'é\n"\\\0', "{}", "\ud800"],
        "nested": {0: {"a": ((1, (2.0,)), [])}, -5: {}, "0": (), 2**40: [torch.ones(2, 3).t()]},
        "empty": torch.empty(0, 3, dtype=torch.int64),
        "not contiguous": torch.arange(12).view(3, 4)[:, 1:3],
    }
    assert_same(state, through(state))


def test_round_and_buffers_and_the_copy_for_a_background_writer() -> None:
    momentum, mean = torch.ones(3), torch.zeros(2)
    local = LocalState(7, {"state": {0: {"momentum": momentum, "sends": {7: (1, (momentum,))}}}}, {"m": mean})
    copied = local.copied()
    assert_same(local.strategy, copied.strategy)
    momentum.add_(1)
    mean.add_(1)
    found = decode(bytes_of(copied))
    assert found.round == 7
    assert_same(found.buffers, {"m": torch.zeros(2)})
    assert_same(found.strategy["state"][0]["sends"], {7: (1, (torch.ones(3),))})


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": {"b": [1, object()]}}, r"state\['strategy'\]\['a'\]\['b'\]\[1\]: a object"),
        ({(1, 2): 3}, r"the key \(1, 2\)"),
        ({True: 3}, "the key True"),
        ({"a": 1j}, "a complex"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "complex128"),
    ],
)
def test_what_cannot_be_stored_is_named(state: dict[Any, Any], where: str) -> None:
    with pytest.raises(TypeError, match=where):
        bytes_of(LocalState(1, state))


def test_every_changed_byte_and_every_cut_is_noticed() -> None:
    whole = bytes_of(LocalState(3, {"momentum": torch.arange(20.0), "counters": {"decays": 3}}))
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        with pytest.raises(BadLocalState):
            decode(bytes(changed))
    for length in range(len(whole)):
        with pytest.raises(BadLocalState):
            decode(whole[:length])
    with pytest.raises(BadLocalState):
        decode(whole + b"\0")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(64, 24, generator=generator))
        self.b = nn.Parameter(torch.randn(64, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.a, self.b)).square().mean()


def closure(model: Net, round: int) -> Closure:
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(round))
    return lambda: model(x)


def play(model: Net, strategy: Strategy, rounds: range) -> None:
    """Every third offer is missed; the last round's is still on its way in the end."""
    for round in rounds:
        turn = Turn(round, round, 77 + round, 1.0)
        payload = strategy.propose(lambda round=round: closure(model, round), turn)  # type: ignore[misc]
        strategy.check(payload, turn)
        if round == rounds[-1]:
            return
        strategy.apply([Share(turn.own_seed, 1, payload)], turn, "counted" if round % 3 else "missed")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_strategy_goes_on_as_if_nothing_had_happened(config: dict[str, Any]) -> None:
    model = Net()
    strategy = build_strategy(config, model.named_parameters())
    play(model, strategy, range(1, 7))
    state = strategy.state_dict()
    if config["name"] == "decoupled":
        assert all(list(entry["sends"]) == [6] for entry in state["state"].values())  # pending
    found = through(state)
    assert_same(state, found)

    other = Net()
    other.load_state_dict(model.state_dict())
    restored = build_strategy(config, other.named_parameters())
    restored.load_state_dict(found)
    for m, s in ((model, strategy), (other, restored)):
        s.apply([], Turn(6, 6, 83, 1.0), "missed")  # puts the pending send back
        play(m, s, range(7, 10))
    assert_same(strategy.state_dict(), restored.state_dict())
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
