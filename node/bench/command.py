"""`thinwire bench`: times as ratios to a baseline and to the copy bandwidth, all measured in the same run.

A benchmark is a file with a function (n_params, n_repeats, device) -> results, and a row in `BENCHES`.
Results are plain values: `least_n_bytes` is the least traffic with memory that the work needs,
`fraction_of_copy_bandwidth` that traffic at the bandwidth of a copy, over the time that it took,
`ratio_to_baseline` how many times faster than the baseline we are. Times are medians, with least and most; a
fraction "at best" is that of the least, for machines that have other work to do. Ratios "by CPU time" are of
what all threads together took; other processes have less influence on that.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ...compression.errors import ConfigError
from ..system.output import to_stderr, to_stdout
from .measure import free_bytes

Bench = Callable[[int, int, str], dict[str, Any]]
"""(n_params, n_repeats, device) -> results."""

# Modules of benchmarks load torch and more: each is loaded when it is asked for.


def _noise() -> Bench:
    from .noise import bench_noise

    return bench_noise


def _decoupled() -> Bench:
    from .decoupled import bench_decoupled

    return bench_decoupled


def _diloco() -> Bench:
    from .diloco import bench_diloco

    return bench_diloco


def _peers() -> Bench:
    from .peers import bench_peers

    return bench_peers


def _round() -> Bench:
    from .round import bench_round

    return bench_round


def _seats(n_seats: int) -> Bench:
    from .network.committee import bench_seats

    return lambda _n_params, n_repeats, _device: bench_seats(n_seats, n_repeats)


def _link(link: tuple[float, float]) -> Bench:
    from .network.link import bench_link

    return lambda _n_params, n_repeats, _device: bench_link(*link, n_repeats)


def _step(link: tuple[float, float] | None) -> Bench:
    from .steps.table import bench_step

    return lambda _n_params, n_repeats, _device: bench_step(n_repeats, link)


def _light(counts: Sequence[int]) -> Bench:
    from .light.swarm import bench_light

    return lambda _n_params, n_repeats, _device: bench_light(counts, ROUNDS_PER_REPEAT * n_repeats)


def _upload() -> Bench:
    from .upload import bench_upload

    return bench_upload


def _network() -> Bench:
    from .network.table import bench_network

    return bench_network


def _join() -> Bench:
    from .join import bench_join

    return bench_join


def _wire() -> Bench:
    from .wire import bench_wire

    return bench_wire


def _memory() -> Bench:
    from .memory import bench_memory

    return bench_memory


def _ray() -> Bench:
    from .ray import bench_ray

    return bench_ray


LINK: Final = (1.25e6, 0.05)
"""Bytes per second and round trip, where nothing else is said."""

BENCHES: Final[dict[str, Callable[[], Bench]]] = {
    "noise": _noise,
    "decoupled": _decoupled,
    "diloco": _diloco,
    "peers": _peers,
    "round": _round,
    "upload": _upload,
    "join": _join,
    "wire": _wire,
    "memory": _memory,
    "network": _network,
    "ray": _ray,
    "link": lambda: _link(LINK),
    "step": lambda: _step(None),
}
"""By name; a benchmark's module is loaded when it is asked for."""

SIZELESS: Final = frozenset(["round", "upload", "join", "network", "ray", "link", "step"])
"""Their model is a small one of their own."""

NOT_IN_ALL: Final = frozenset(["ray", "link", "upload", "network", "step"])
"""The first one needs an extra, and a cluster of its own; three are of a network, real or modelled; the last
one takes two minutes."""

ON_A_LINK: Final = {"link": _link, "step": _step}
"""Those that take a rate and a round trip."""

DEVICES: Final = ("cpu", "cuda")

ON_DEVICE: Final = {"noise": 16, "decoupled": 48, "diloco": 64, "peers": 24}
"""Those that measure a device, and how many bytes of memory they take per parameter."""

DEFAULT_N_PARAMS: Final = 28_000_000

ROUNDS_PER_REPEAT: Final = 20
"""Of light peers."""


def bench_command(
    name: str,
    sizes: Sequence[int] | None = None,
    n_repeats: int = 5,
    as_json: bool = False,
    picture: Path | None = None,
    device: str = "cpu",
    against: str | None = None,
    n_seats: int | None = None,
    light: Sequence[int] | None = None,
    link: tuple[float, float] | None = None,
) -> None:
    """Runs one benchmark, or all, for every size: tables on stdout, or one JSON object; and a PNG. `n_seats`:
    of `round`, with so many coordinators; `light`: of `peers`, with so many that compute nothing; `link`: of
    those `ON_A_LINK`, bytes per second and round trip in seconds; `against`: a file of results, or another
    build, see `builds`."""
    from .against import load, print_compared
    from .builds import bench_builds
    from .view import check_picture, print_bench, save_picture

    names = [each for each in BENCHES if each not in NOT_IN_ALL] if name == "all" else [name]
    if against is not None and not Path(against).is_file():
        if picture is not None:
            raise ConfigError("-o: of a build alone, without --against another one")
        for each in names:
            _check_arguments(each, None if sizes is None else sizes[0], n_repeats, device)
        lines = [_line(each, sizes, n_repeats, device, n_seats, light, link) for each in names]
        bench_builds(against, lines, as_json)
        return
    if picture is not None:
        check_picture(picture)
    then = None if against is None else load(Path(against))
    results = {
        each: run_sizes(each, sizes, n_repeats, device, n_seats=n_seats, light=light, link=link)
        for each in names
    }
    if as_json:
        printed = {each: _plain(result) for each, result in results.items()}
        to_stdout(json.dumps(printed.get(name, printed), indent=1))
    else:
        for result in results.values():
            print_bench(result)
    if picture is not None:
        save_picture(picture, list(results.values()))
    if then is not None and against is not None:
        print_compared(Path(against), then, results)


def _line(
    name: str,
    sizes: Sequence[int] | None,
    n_repeats: int,
    device: str,
    n_seats: int | None,
    light: Sequence[int] | None,
    link: tuple[float, float] | None,
) -> list[str]:
    """The same on the command line."""
    args = [name, "--repeats", str(n_repeats)]
    args += ["--device", device] if name in ON_DEVICE else []
    args += [] if sizes is None or name in SIZELESS else ["--params", ",".join(map(str, sizes))]
    args += [] if n_seats is None else ["--seats", str(n_seats)]
    args += [] if light is None else ["--light", ",".join(map(str, light))]
    return args if link is None else [*args, "--rate", f"{link[0]:f}B/s", "--rtt", f"{link[1] * 1e3:f}ms"]


def _plain(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result as it is; several as the list `sizes`, with what they share beside it."""
    if len(results) == 1:
        return results[0]
    first = results[0]
    shared = {key: first[key] for key in ("bench", "machine")}
    return {**shared, "sizes": [{k: v for k, v in r.items() if k not in shared} for r in results]}


def parse_sizes(text: str, option: str = "--params") -> list[int]:
    """ "1e6,1e8" -> [1000000, 100000000]. Raises ConfigError."""
    try:
        sizes = [int(float(word)) for word in text.split(",")]
    except (ValueError, OverflowError):
        raise ConfigError(f"{option} {text}: numbers with commas between them, e.g. 1e6,1e8") from None
    return sorted(set(sizes))


def run_sizes(
    name: str,
    sizes: Sequence[int] | None,
    n_repeats: int,
    device: str = "cpu",
    free_bytes: Callable[[str], int] = free_bytes,
    n_seats: int | None = None,
    light: Sequence[int] | None = None,
    link: tuple[float, float] | None = None,
) -> list[dict[str, Any]]:
    """A result for each size that the memory has room for; one for a benchmark that no size has an influence
    on. `free_bytes`: how much memory a device has left; `n_seats`, `light`: see `bench_command`. Raises
    ConfigError: there is room for none."""
    if n_seats is not None and name != "round":
        raise ConfigError("--seats: of `bench round` only")
    if light is not None and name != "peers":
        raise ConfigError("--light: of `bench peers` only")
    if link is not None and name not in ON_A_LINK:
        raise ConfigError("--rate, --rtt: of `bench link` and `bench step` only")
    if sizes is None or name in SIZELESS or light is not None:
        sizes = None if not sizes else sizes[:1]
        return [run_bench(name, None if sizes is None else sizes[0], n_repeats, device, n_seats, light, link)]
    for n_params in sizes:  # all of them, before the first takes its time
        _check_arguments(name, n_params, n_repeats, device)
    fitting = [n for n in sizes if n * ON_DEVICE.get(name, 0) <= free_bytes(device)]
    if len(fitting) < len(sizes):
        left_out = ", ".join(f"{n:.1e}" for n in sizes if n not in fitting)
        words = f"bench {name}: {left_out} parameters do not fit into the free memory"
        if not fitting:
            raise ConfigError(f"{words}: take fewer, with --params")
        to_stderr(f"{words}, and are left out")
    return [run_bench(name, n_params, n_repeats, device) for n_params in fitting]


def run_bench(
    name: str,
    n_params: int | None,
    n_repeats: int,
    device: str = "cpu",
    n_seats: int | None = None,
    light: Sequence[int] | None = None,
    link: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Results of one benchmark, with the machine that it ran on. Raises ConfigError for a wrong argument.

    Those that measure no device run on the CPU, whatever `device` is.
    """
    _check_arguments(name, n_params, n_repeats, device)
    bench = BENCHES[name]()
    if n_seats is not None:
        bench = _seats(n_seats)
    elif light is not None:
        bench = _light(light)
    elif link is not None:
        bench = ON_A_LINK[name](link)
    device = device if name in ON_DEVICE else "cpu"
    return {
        "bench": name,
        "machine": machine(device),
        **bench(DEFAULT_N_PARAMS if n_params is None else n_params, n_repeats, device),
    }


def _check_arguments(name: str, n_params: int | None, n_repeats: int, device: str) -> None:
    if name not in BENCHES:
        raise ConfigError(f"no benchmark is called {name!r}: one of {', '.join(BENCHES)}, all")
    if n_repeats < 1:
        raise ConfigError(f"{n_repeats} repeats: at least 1")
    if n_params is not None and not 1_000_000 <= n_params <= 10**10:
        raise ConfigError(f"{n_params} parameters: between 1e6 and 1e10")
    if device not in DEVICES:
        raise ConfigError(f"--device {device}: {' or '.join(DEVICES)}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no GPU here; `thinwire doctor` says why")


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on, and when and how they were taken."""
    import torch

    from ..tracking.device_metrics import processor_name

    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    kernels = {name: version(name) for name in ("numba", "triton") if find_spec(name) is not None}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device,
        **gpu,
        "cpu": processor_name() or platform.processor() or platform.machine(),
        "n_cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        **kernels,
        "python": platform.python_version(),
    }
