"""The PTX of every Triton kernel as it is launched, without a device, for gpu/test_triton.py.

python triton_assembly.py prints {"exact": {kernel: PTX}, "fused": PTX} as JSON. The last is what becomes of a
kernel whose launch does not forbid fusion.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from thinwire.compression.base import Change, Part, Senders, Source, Step, Target, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.sparse import Sparse
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.gpu import (
    bits_triton,
    fingerprint_triton,
    noise_triton,
    pack_triton,
    rounding_triton,
    sparse_triton,
    tables_triton,
    values_triton,
)
from thinwire.compression.numerics.noise_layout import Piece, Probe, Update, Where
from thinwire.compression.numerics.value_formats import FORMATS

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
"""What kernels are given. Not bfloat16: the interpreter of 3.7 adds its bit patterns, so that they get those,
as int16, and widen them by themselves."""


def noise(kind: Any) -> None:
    updates = [Update.of([Probe(1, 0, 0.5), Probe(2, 0, 0.5)], 0.5)]
    noise_triton.combine(torch.zeros(4096), torch.zeros(4096), updates, Where.of(kind, 3, 0))


def pieces(dtype: torch.dtype) -> None:
    whole, part = (Piece(torch.zeros(n, dtype=dtype), 0, 0) for n in (4096, 100))
    noise_triton.combine_all([whole, part], [Update.of([Probe(1, 0, 0.5)], 0.5)], "sign", 7)


def fused_update(
    compressor: Sparse, shape: tuple[int, ...] = (8192,), senders: Senders | None = None
) -> None:
    part, turn = Part.whole(shape), Turn(1, 2, 3, 1.0)
    x = torch.arange(float(part.n_global))
    payload = {"w": compressor.pack(x, part, turn)}
    targets = [Target(x, part, "w", Step(0.5, 0.5))]
    sparse_triton.fused_update(compressor.pack_layout, targets, [payload] * 3, [1.0, 1.0, 2.0], 0.25, senders)


def packing(compressor: Sparse, shape: tuple[int, ...] = (8192,)) -> None:
    x = torch.zeros(8192)
    change = Change(0.5, torch.tensor(1.0), 0.5)
    pack_triton.Sent(compressor.pack_layout, [Source(Part.whole(shape), x, x, 0.5)], change)


LAUNCHES: dict[str, Callable[[], object]] = {
    "sign noise": lambda: noise("sign"),
    "normal noise": lambda: noise("gauss"),
    "noise for all": lambda: pieces(torch.float32),
    "bfloat16 noise for all": lambda: pieces(torch.bfloat16),
    "fingerprint": lambda: fingerprint_triton.parameter_sums([torch.zeros(4096, dtype=torch.int32)], [0]),
    "bfloat16 fingerprint": lambda: fingerprint_triton.parameter_sums(
        [torch.zeros(4096, dtype=torch.int16)], [0]
    ),
    "rounding": lambda: rounding_triton.round_to_bfloat16(
        torch.zeros(4096), torch.zeros(4096, dtype=torch.bfloat16), 1, 2, 0
    ),
    "fused update": lambda: fused_update(DctTopK(k=4)),
    "fused update without a transform": lambda: fused_update(TopK(k=4)),
    "fused update over senders": lambda: fused_update(TopK(k=4), senders=Senders([1.0, 2.0, 2.0], 0.5)),
    "fused update of tiles": lambda: fused_update(DctTopK(k=4, layout="tiles"), (64, 128)),
    **{
        f"{bits}-bit values": partial(values_triton.quantize, torch.zeros(4, 32), FORMATS[bits])
        for bits in (1, 2, 4, 8, 16, "e3m0")
    },
    **{
        f"fused update of {bits}-bit values": partial(fused_update, TopK(k=4, bits=bits, indices="packed"))
        for bits in (4, 16, "e3m0")
    },
    "groups of one": lambda: fused_update(TopK(k=1, group_size=1, indices="packed")),
    "packing groups of one": lambda: packing(TopK(k=1, group_size=1)),
    "unpacking": lambda: bits_triton.unpack(torch.zeros(9, dtype=torch.uint8), 13, 5),
    "packing": lambda: packing(DctTopK(k=4)),
    "packing of tiles": lambda: packing(DctTopK(k=4, layout="tiles"), (64, 128)),
    "packing without a transform": lambda: packing(TopK(k=4, bits=2)),
}


def compiled(kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    """What a launch with these arguments would run."""
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr or is_one(given[p.name], p)}
    values = {name: given[name] for name in kernel.arg_names if name not in constants}
    source = ASTSource(
        kernel,
        {name: type_of(x) for name, x in values.items()} | dict.fromkeys(constants, "constexpr"),
        constants,
        {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, x in values.items()
            if aligned(x)
        },
    )
    options = {name: x for name, x in given.items() if name not in kernel.arg_names}
    text = triton.compile(source, TARGET, options).asm["ptx"]
    assert isinstance(text, str)
    return text


def is_one(x: Any, parameter: Any) -> bool:
    """Triton makes a constant of it."""
    return isinstance(x, int) and x == 1 and not parameter.do_not_specialize


def type_of(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype]
    if isinstance(x, float):
        return "fp32"
    return "i32" if -(1 << 31) <= x < 1 << 31 else "i64"


def aligned(x: Any) -> bool:
    return isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0)


def main() -> None:
    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launched.append((kernel, arguments, named))

    JITFunction.run = record
    exact: dict[str, str] = {}
    for name, launch in LAUNCHES.items():
        launch()
        for kernel, arguments, named in launched:
            exact.setdefault(f"{name}: {kernel.fn.__name__}", "")
            exact[f"{name}: {kernel.fn.__name__}"] += compiled(kernel, arguments, named)
        launched.clear()
    LAUNCHES["normal noise"]()
    kernel, arguments, named = launched[-1]
    fused = {k: v for k, v in named.items() if k not in tables_triton.EXACT}
    print(json.dumps({"exact": exact, "fused": compiled(kernel, arguments, fused)}))  # noqa: T201


if __name__ == "__main__":
    main()
