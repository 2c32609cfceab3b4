"""python -m tests.learning.labels [--seeds 20] [--rates 1e-3 ...] [--variants spsa ...] [--jobs 16] [-o FILE]
python -m tests.learning.labels --table FILE

Where spsa and MeZO differ on label words, one difference at a time: 500 probes in a swarm, the held-out loss
in nats per label, and accuracy. Rates are those of a probe. FILE is JSON; `--table` makes Markdown of it:
means, and differences from MeZO over the same seeds (weights, batches), with their standard errors.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final, Literal

import torch

from tests.learning.experiments import float_scalars
from thinwire.coordinator.protocol.files import write_aside
from thinwire.node import config
from thinwire.node.bench.learning.labels import Labels, first_weights
from thinwire.node.bench.learning.mezo import Lozo, train_mezo
from thinwire.node.bench.learning.swarm import train
from thinwire.node.bench.learning.text import constant
from thinwire.node.system.jobs import Call, Done, Work, n_cores, until_stopped, work_off
from thinwire.optim.registry import complete_new_run

TASK: Final = config.Task(layers=2, width=32, heads=4, batch=16)
N_PROBES: Final = 500
UNCLIPPED: Final = 1e9
MOST: Final = 1.0
"""That a loss counts for; to guess costs 0.693."""


@dataclass(frozen=True)
class Variant:
    """`who`: thinwire's spsa, or a reference in plain torch, which knows neither bytes nor clips. A round has
    `probes` of each of the `peers`."""

    who: Literal["spsa", "mezo", "lozo"]
    noise: Literal["sign", "gauss"] = "sign"
    scalar: Literal["byte", "float"] = "byte"
    clip: float = 4.0
    peers: int = 1
    probes: int = 1


VARIANTS: Final = {
    "mezo": Variant("mezo", "gauss", "float"),
    "mezo, signs": Variant("mezo", "sign", "float"),
    "spsa": Variant("spsa"),
    "spsa, float": Variant("spsa", scalar="float"),
    "spsa, gauss": Variant("spsa", "gauss"),
    "spsa, gauss, float": Variant("spsa", "gauss", "float"),
    "mezo, 4 peers": Variant("mezo", "gauss", "float", peers=4),
    "spsa, 4 peers": Variant("spsa", peers=4),
    "spsa, 4 peers, unclipped": Variant("spsa", peers=4, clip=UNCLIPPED),
    "lozo": Variant("lozo"),
}
"""With one probe in a round there is nothing to clip, and no mean."""


@dataclass(frozen=True)
class Result:
    variant: str
    lr: float
    seed: int
    loss: float
    accuracy: float
    cpu_s: float


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.learning.labels", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 6e-4, 1e-3])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="V")
    parser.add_argument("--jobs", type=int, default=n_cores())
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table is not None:
        results = [Result(**r) for r in json.loads(args.table.read_text())]
    else:
        results = []
        seeds = range(1, args.seeds + 1)
        works = [of_seed(seed, args.rates, args.variants) for seed in seeds]
        n, started_s = len(works) * len(args.rates) * len(args.variants), time.monotonic()

        def tell(done: Done) -> None:
            if isinstance(done.result, Result):
                results.append(replace(done.result, cpu_s=round(done.cpu_s, 2)))
                sys.stderr.write(f"\r{len(results)} of {n}, {time.monotonic() - started_s:.0f} s")
            if args.output is not None:  # what there is, if it is stopped
                write_aside(args.output, json.dumps([asdict(r) for r in results], indent=1).encode())

        until_stopped(work_off(works, args.jobs, tell, preload=[of_seed.__module__]), lambda _each: None)
    sys.stdout.write(markdown(results))
    return 0


# ------------------------------------------------------------------------------------------- training


def of_seed(seed: int, rates: Sequence[float], variants: Sequence[str]) -> Work[None]:
    """Every combination, from the same weights."""
    (weights,) = yield [Call(first, (seed,))]
    yield [Call(result_of, (name, lr, seed, weights)) for lr in rates for name in variants]


def first(seed: int) -> bytes:
    saved = BytesIO()
    torch.save(first_weights(TASK, seed), saved)
    return saved.getvalue()


def result_of(name: str, lr: float, seed: int, weights: bytes) -> Result:
    labels = Labels(TASK, seed, torch.load(BytesIO(weights)))
    return Result(name, lr, seed, *labels.held_out(trained(labels, VARIANTS[name], lr)), cpu_s=0.0)


def trained(labels: Labels, variant: Variant, lr: float, n_probes: int = N_PROBES) -> Any:
    """The model after so many probes. By rule a rate is that of a probe, with the references of the mean."""
    per_round = variant.peers * variant.probes
    n_rounds = n_probes // per_round
    if variant.who != "spsa":
        return train_mezo(
            labels,
            lr=lr * per_round / (2 if variant.who == "lozo" else 1),  # the variance of what is of rank 2
            n_peers=variant.peers,
            n_rounds=n_rounds,
            n_probes=variant.probes,
            schedule=constant,
            noise=variant.noise,
            lozo=Lozo() if variant.who == "lozo" else None,
        )
    options = {
        "name": "spsa",
        "lr": lr,
        "probes": variant.probes,
        "noise": variant.noise,
        "clip": variant.clip,
    }
    with float_scalars() if variant.scalar == "float" else nullcontext():
        swarm = train(labels, complete_new_run(options), n_peers=variant.peers, n_rounds=n_rounds)
    return swarm.model


# ------------------------------------------------------------------------------------------- for people


def markdown(results: Sequence[Result]) -> str:
    """A table for each rate."""
    lines = []
    for lr in sorted({r.lr for r in results}):
        of_rate = [r for r in results if r.lr == lr]
        lines += [f"lr {lr:g}:", "", "| variant | seeds | loss | accuracy | loss less MeZO's | CPU s |"]
        lines.append("|---|---|---|---|---|---|")
        names = [name for name in VARIANTS if any(r.variant == name for r in of_rate)]
        lines += [_line(name, of_rate) for name in names] + [""]
    return "\n".join(lines)


def _line(name: str, results: Sequence[Result]) -> str:
    own = {r.seed: r for r in results if r.variant == name}
    baseline = "mezo, 4 peers" if "4 peers" in name and name != "mezo, 4 peers" else "mezo"
    other = {r.seed: r for r in results if r.variant == baseline}
    n_bad = sum(not r.loss < MOST for r in own.values())
    cells = (
        name,
        f"{len(own)}" + (f", {n_bad} diverged" if n_bad else ""),
        _mean([_capped(r) for r in own.values()]),
        f"{100 * mean(r.accuracy for r in own.values()):.1f}%",
        "-"
        if name == baseline
        else _mean([_capped(own[s]) - _capped(other[s]) for s in own if s in other], "+"),
        f"{mean(r.cpu_s for r in own.values()):.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _capped(result: Result) -> float:
    return result.loss if result.loss < MOST else MOST


def _mean(values: Sequence[float], sign: str = "") -> str:
    """With its standard error."""
    if not values:
        return "-"
    error = stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{mean(values):{sign}.3f} ± {error:.3f}"


if __name__ == "__main__":
    sys.exit(main())
