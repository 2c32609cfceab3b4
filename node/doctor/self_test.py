"""Whether this machine computes what all others do: known answers of every exact path, on every backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from ...compression.errors import ConfigError, Incompatible, first_line
from ...compression.kernels import kernels_on
from .kernel_cache import KERNELS
from .known_answers import KNOWN_ANSWERS


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of the kernels on one device. `kernels`: what THINWIRE_KERNELS chooses it by."""

    kernels: str
    device: torch.device

    def __str__(self) -> str:
        return f"{self.kernels} on {self.device}"


def accelerators() -> list[torch.device]:
    """Devices that torch can use beside the CPU: cuda (ROCm, too), mps, xpu, ..."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]


def backends() -> list[Backend]:
    """All that can run here, whichever is in use."""
    cpu = torch.device("cpu")
    found = [Backend("torch", cpu)]
    if find_spec("numba") is not None:
        found.append(Backend("numba", cpu))
    for device in accelerators():
        found.append(Backend("torch", device))
        if device.type == "cuda" and find_spec("triton") is not None:
            found.append(Backend("triton", device))
    return found


def failed_kernels(
    device: torch.device,
    kernels: str | None = None,
    names: Collection[str] = KNOWN_ANSWERS,
    stopped: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Those of these `names` whose result is not the known one; empty on a machine that can be trusted.

    `kernels` None: of the kernels in use. Otherwise that implementation is chosen meanwhile, for the whole
    process. A kernel that cannot run is named with its error. Ends early when `stopped`.
    """
    with _chosen(kernels):
        return [
            f"{name}{why}"
            for name in names
            if not stopped() and runs_on(name, device) and (why := _failure(name, device)) is not None
        ]


def runs_on(name: str, device: torch.device) -> bool:
    return device.type == "cpu" or not KNOWN_ANSWERS[name].cpu_only


def refuse_wrong_arithmetic(
    device: torch.device,
    of_compressors: bool | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Raises Incompatible, with what failed, on a machine whose replica would not stay the others', and
    ConfigError where its kernels cannot even be loaded. `of_compressors`: only what strategies with a
    compressor need, or only what all do; None: both. Ends early when `stopped`."""
    try:
        uses_numba = kernels_on(device) == "numba"
    except ValueError as e:
        raise ConfigError(str(e)) from e
    if uses_numba and (why := no_cache()) is not None:
        raise ConfigError(f"{why}: set {NUMBA_CACHE_HINT}")
    # A node that starts does not wait for what takes a second; `thinwire doctor` does.
    failed = failed_kernels(
        device,
        names=[
            name
            for name, known in KNOWN_ANSWERS.items()
            if not known.is_slow and of_compressors in (None, known.of_compressors)
        ],
        stopped=stopped,
    )
    if failed:
        raise Incompatible(wrong_arithmetic(failed))


NUMBA_CACHE_HINT = (
    f"NUMBA_CACHE_DIR=DIR to a folder that can be written, or {KERNELS}=torch (some ten times slower)"
)


def no_cache() -> str | None:
    """Why numba's kernels cannot be loaded, or None: an installation that is read-only, of a user without a
    cache folder (no HOME), has nowhere to keep what it compiles. Nothing is computed wrongly there."""
    try:
        from ...compression.cpu import fingerprint_cpu  # noqa: F401 - loads as all kernels do
    except ImportError:
        return None
    except RuntimeError as e:  # numba's word for it
        return f"numba finds no folder to keep compiled kernels in ({first_line(e)})"
    return None


def wrong_arithmetic(failed: Sequence[str]) -> str:
    return (
        f"this machine computes something else than the others: {', '.join(failed)} failed the self-test. "
        f"`thinwire doctor` tests every implementation here; {KERNELS}=torch or another --device may do, "
        f"or look at the memory."
    )


def _failure(name: str, device: torch.device) -> str | None:
    """None: as it should be. Otherwise what to add to the name."""
    known = KNOWN_ANSWERS[name]
    try:
        return None if known.run(device) == known.answer else ""
    except Exception as e:  # noqa: BLE001 - whatever a device cannot do, it is not to be trusted with
        return f" ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'})"


@contextmanager
def _chosen(kernels: str | None) -> Iterator[None]:
    if kernels is None:
        yield
        return
    before = os.environ.get(KERNELS)
    os.environ[KERNELS] = kernels
    try:
        yield
    finally:
        if before is None:
            del os.environ[KERNELS]
        else:
            os.environ[KERNELS] = before
