"""Record 0 from a run's configuration, and a model from record 0."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import msgpack
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from ..compression import wire
from ..compression.base import Part
from ..compression.errors import ConfigError, Incompatible
from ..compression.numerics.noise import initial_values
from ..coordinator.protocol.messages import (
    PROTOCOL_VERSION,
    BlobRef,
    GenesisBody,
    LayoutEntry,
    Limits,
    digest_of,
)
from ..coordinator.protocol.schedule import lr_factor_bits
from ..coordinator.protocol.settings import Course
from ..optim.base import Closure, canonical_name
from ..optim.parts.ranks import local_of, parts_of, ranks_of
from ..optim.registry import build_strategy, of_new_run, recorded_config, refuse_unlikely, strategy_class
from .config import Audits, RunConfig
from .snapshots.format import data_of
from .tasks.base import Pretrained, Task
from .tasks.buffers import persistent_buffers
from .tasks.shapes import shapes_only
from .tasks.trial import Trial, refuse_shared_memory

NEW_RUNS: Final = Audits(own_data_auditors=False, newcomers_rate=1.0, newcomers_budget=10.0, flood_failures=6)
NO_AUDITS: Final = NEW_RUNS.model_copy(update={"rate": 0.0})
"""What runs have that say nothing of it, if they are not older than these options."""


@dataclass(frozen=True, slots=True)
class Genesis:
    """Record 0 and the blobs that it names, which the coordinator serves for the whole run."""

    body: GenesisBody
    blobs: tuple[bytes, ...]


def make_genesis(
    config: RunConfig, task: Task, coordinator: str, time_ms: int, recovery: bytes = b""
) -> Genesis:
    """`coordinator`: its peer id; `recovery`: see `GenesisBody`. Builds the model on the meta device only.
    Raises ConfigError."""
    with shapes_only():
        made = task.model()
    refuse_unlikely(config.strategy)
    refuse_shared_memory(made)
    strange = _of_another_type(made, config)
    model = in_dtype(made, config)
    build_strategy(
        of_new_run(config.strategy), model.named_parameters()
    ).fields()  # refuses what cannot be sent
    layout = layout_of(model, task)
    held_out, corpus = task.held_out(), task.corpus()
    base = _base(config, task, model, layout)  # last: it may take minutes
    text = public_config(config, task).to_json()
    body = GenesisBody(
        protocol=PROTOCOL_VERSION,
        config=text,
        layout=layout,
        base=_ref(base),
        held_out=_ref(held_out),
        corpus=_ref(corpus),
        limits=Limits(**config.limits.model_dump()),
        coordinator=coordinator,
        lr_factor_bits=lr_factor_bits(Course.of(text), 1),
        time_ms=time_ms,
        recovery=recovery,
    )
    if not isinstance(task, Pretrained):
        Trial(
            make=lambda: _begun(task, config, body, base),
            draw=lambda begun: _first_batch(task, begun, corpus, held_out),
            strange=strange,
            trains=strategy_class(config.strategy["name"]).needs_grad,
        ).run(model)
    return Genesis(body, tuple(blob for blob in (base, held_out, corpus) if blob is not None))


def _begun(task: Task, config: RunConfig, body: GenesisBody, base: bytes | None) -> nn.Module:
    model = in_dtype(task.model(), config)
    initialise(model, body, config.run.seed, base)
    return model


def _first_batch(task: Task, model: nn.Module, corpus: bytes | None, held_out: bytes | None) -> Closure:
    task.load(corpus, held_out)
    return task.draw(model, 0)


def _of_another_type(model: nn.Module, config: RunConfig) -> str | None:
    """Of the first parameter that `in_dtype` changes, in words."""
    for name, p in model.named_parameters():
        kind = str(p.dtype).removeprefix("torch.")
        if p.is_floating_point() and kind != config.run.dtype:
            return (
                f"the task makes its parameter {name} in {kind}, which becomes {config.run.dtype} by "
                f"run.dtype (set it to the task's, or make the task compute in its parameters' type)"
            )
    return None


def in_dtype(model: nn.Module, config: RunConfig) -> nn.Module:
    """The model with parameters of the run's dtype, contiguous; buffers stay what they are. Returns it."""
    dtype = getattr(torch, config.run.dtype)
    for p in model.parameters():
        # Not of a view of other strides: kernels, shards and files want whole rows in order.
        p.data = p.data.to(dtype if p.is_floating_point() else p.dtype).contiguous()
    return model


def public_config(config: RunConfig, task: Task, recorded: RunConfig | None = None) -> RunConfig:
    """What goes into record 0: defaults spelled out, and no path of the coordinator's machine. `recorded`:
    of a run that is gone on with, whose record 0 may be older than some options."""
    said = config.strategy
    if recorded is None and config.admission.mode != "open":
        said = {"own_data_share": 0.0, **said}  # who comes in is known
    strategy = of_new_run(said, None if recorded is None else recorded.strategy)
    if isinstance(task, Pretrained):
        options = task.public(config.task)
    else:
        options = config.task.model_copy(update={"corpus": "run"} if task.corpus() is not None else {})
    run: dict[str, Any] = {"base": None}
    if task.held_out() is None:
        run["eval_every"] = 0
    return config.model_copy(
        update={
            "run": config.run.model_copy(update=run),
            "task": options,
            "strategy": recorded_config(strategy),
            "audits": _audits(_said_of_audits(config), recorded, str(strategy["name"])),
        }
    )


def _said_of_audits(config: RunConfig) -> Audits | None:
    """Raises ConfigError for audits of work that is offered in another round than it was done in."""
    if config.policy.name != "async":
        return config.audits
    if config.audits is not None and config.audits.model_fields_set & {"rate"} and config.audits.rate > 0:
        raise ConfigError(
            'audits.rate with policy.name = "async": an audit does the work of an offer\'s round again, and '
            "late work is of an earlier one: leave it out, or set it to 0"
        )
    return Audits(rate=0.0)


def _audits(said: Audits | None, recorded: RunConfig | None, strategy: str) -> Audits | None:
    """`recorded`: see `public_config`."""
    if said is None and recorded is not None and recorded.audits is None:
        return None
    new = NEW_RUNS if strategy_class(strategy).facts.is_audited else NO_AUDITS
    before = new if recorded is None else recorded.audits
    known = {} if before is None else before.model_dump(include=set(new.model_fields_set))
    return Audits(**{**known, **({} if said is None else said.model_dump(exclude_none=True))})


def layout_of(model: nn.Module, task: Task) -> tuple[LayoutEntry, ...]:
    """Every parameter in name order, frozen ones included, with its rule for the initial values."""
    parameters = {canonical_name(name): p for name, p in model.named_parameters()}
    entries = []
    for name, p in sorted(parameters.items()):
        shape = tuple(p.shape)
        init = task.init(name, shape)
        dtype = str(p.dtype).removeprefix("torch.")
        entries.append(LayoutEntry(name=name, shape=shape, dtype=dtype, init=init.rule, scale=init.scale))
    return tuple(entries)


def layout_hash(body: GenesisBody) -> bytes:
    """8 bytes that every payload carries: names, shapes and dtypes, and the strategy with its options."""
    layout = [[e.name, list(e.shape), e.dtype] for e in body.layout]
    strategy = json.dumps(json.loads(body.config)["strategy"], sort_keys=True)
    return wire.layout_hash(msgpack.packb([layout, strategy]))


def check_layout(body: GenesisBody, layout: tuple[LayoutEntry, ...]) -> None:
    """Raises Incompatible that names the first differences between the run's model and this node's."""
    theirs = {e.name: e for e in body.layout}
    ours = {e.name: e for e in layout}
    differences = [f"the run has no parameter {name}" for name in ours.keys() - theirs.keys()]
    differences += [f"this node has no parameter {name}" for name in theirs.keys() - ours.keys()]
    differences += [
        f"{name} is {list(theirs[name].shape)} {theirs[name].dtype} in the run, "
        f"{list(e.shape)} {e.dtype} here"
        for name, e in ours.items()
        if name in theirs and (e.shape, e.dtype) != (theirs[name].shape, theirs[name].dtype)
    ]
    if differences:
        more = f" (and {len(differences) - 5} more)" if len(differences) > 5 else ""
        raise Incompatible(
            "the model differs from the run's: " + "; ".join(sorted(differences)[:5]) + more
            + ". Use the same --task (and version of it) as the coordinator."
        )  # fmt: skip


def initialise(model: nn.Module, body: GenesisBody, seed: int, base: bytes | Path | None) -> None:
    """Base weights into what this rank has of the model's parameters: from safetensors (bytes, or a file of
    which each rank reads its rows), and exact noise by rule for what is not in them. Values of another dtype
    than the parameter's go to the nearest that it has, ties to even. Buffers that are in the file become what
    they are there; the others stay what the task has made them."""
    parameters = {canonical_name(name): p for name, p in model.named_parameters()}
    ranks = ranks_of(parameters.values())
    with torch.no_grad(), _reader(base) as rows_of:
        for index, e in enumerate(body.layout):
            p = parameters[e.name]
            local, part = local_of(p), parts_of(p, ranks.count)[ranks.index]
            if (rows := rows_of(e.name, part)) is not None:
                local.copy_(rows)
            elif e.init == "normal":
                values = initial_values(seed, index, part.start, part.stop, e.scale)
                local.copy_(values.view(local.shape))
            else:
                local.fill_(1.0 if e.init == "ones" else 0.0)
        for name, buffer in persistent_buffers(model):
            if (whole := rows_of(name, None)) is not None and whole.shape == buffer.shape:
                buffer.copy_(whole)


_RowsOf = Callable[[str, Part | None], Tensor | None]
"""The rows of a parameter that are a part, or all of a tensor; None: it is not among the base weights."""


@contextmanager
def _reader(base: bytes | Path | None) -> Iterator[_RowsOf]:
    if not isinstance(base, Path):
        tensors = {} if base is None else load_safetensors(base)
        yield lambda name, part: _rows(tensors[name], part) if name in tensors else None
        return
    with safe_open(base, framework="pt") as file:
        names = set(file.keys())

        def rows_of(name: str, part: Part | None) -> Tensor | None:
            if name not in names:
                return None
            rows: Tensor | None = (
                _rows(file.get_slice(name), part) if part and part.shape else file.get_tensor(name)
            )
            return rows

        yield rows_of


def _rows(whole: Any, part: Part | None) -> Any:
    """`whole`: a tensor, or the slice of a file that stands for one."""
    if part is None:
        return whole
    if part == part.entire:
        return whole[:] if part.shape else whole
    row = prod(part.shape[1:])
    return whole[part.start // row : part.stop // row]


def base_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The same from any machine: record 0 names them by digest."""
    return b"".join(data_of(tensors))


def _base(config: RunConfig, task: Task, model: nn.Module, layout: tuple[LayoutEntry, ...]) -> bytes | None:
    if isinstance(task, Pretrained):
        if config.run.base is not None:
            raise ConfigError("run.base: the task's model brings its weights; leave it out")
        return base_bytes(task.base(model))
    return _read_base(Path(config.run.base), model, layout) if config.run.base else None


def _ref(blob: bytes | None) -> BlobRef | None:
    return None if blob is None else BlobRef(digest=digest_of(blob), n_bytes=len(blob))


def _read_base(path: Path, model: nn.Module, layout: tuple[LayoutEntry, ...]) -> bytes:
    try:
        data = path.read_bytes()
        tensors = load_safetensors(data)
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"run.base {path}: cannot be read as safetensors: {e}") from e
    except KeyError as e:
        raise ConfigError(
            f"run.base {path}: some of its tensors are of a type that torch cannot read ({e.args[0]}), maybe "
            f"scales of quantised weights. Save the model's weights alone, in float32, bfloat16 or float16"
        ) from e
    for entry in layout:
        if entry.name not in tensors:
            raise ConfigError(f"run.base {path}: has no tensor {entry.name}")
        found = tensors[entry.name]
        if tuple(found.shape) != entry.shape or not found.is_floating_point():
            raise ConfigError(
                f"run.base {path}: {entry.name} is {list(found.shape)} {found.dtype}, "
                f"the model wants {list(entry.shape)} {entry.dtype}"
            )
    for name, buffer in persistent_buffers(model):
        if name in tensors:
            _refuse_buffer(f"run.base {path}: buffer {name}", tensors[name], buffer)
    return data


def _refuse_buffer(what: str, found: Tensor, wanted: Tensor) -> None:
    """Raises ConfigError for another shape, and for values that float8 would hide."""
    if found.shape != wanted.shape:
        raise ConfigError(f"{what} is {list(found.shape)}, the model wants {list(wanted.shape)}")
    is_cast = wanted.dtype.itemsize == 1 and wanted.is_floating_point() and found.dtype != wanted.dtype
    if is_cast and not bool(found.float().isfinite().all()):  # of infinity e4m3 would make 448
        raise ConfigError(f"{what} has values that are not finite, and the model keeps it as {wanted.dtype}")
