"""python -m tests.learning [decoupled] [one-byte] [one-bit] [--seeds 1 2 3]

The claims of test_learning.py in runs of 300 steps, and on the model of the demo itself. Prints a line per
run, and which claims do not hold; ends with 1 if there are any. Takes about half an hour in all. Strategies
against references in plain torch: `thinwire bench learning`.
"""

from __future__ import annotations

import argparse
import sys

import torch

from tests.learning.experiments import (
    DECOUPLED_CLAIMS,
    DEMO_MODEL,
    ONE_BIT,
    FineTuning,
    Losses,
    broken,
    decoupled_losses,
    one_byte,
    share_of_the_fall,
)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.learning", description=__doc__)
    known = ["decoupled", "one-byte", "one-bit"]
    parser.add_argument("what", nargs="*", choices=known, default=known)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=40, help="of fine-tuning")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wrong = []
    if "decoupled" in args.what:
        for seed in args.seeds:
            losses = shown("decoupled", seed, decoupled_losses(seed, n_rounds=300))
            wrong += broken(losses, DECOUPLED_CLAIMS)
    if "one-byte" in args.what:
        falls = []
        for seed in args.seeds:
            fine_tuning = FineTuning(DEMO_MODEL, seed, n_rounds=60)
            runs = one_byte(lr=3e-3)
            losses = shown("one byte", seed, fine_tuning.losses(runs, n_peers=8, n_rounds=args.rounds))
            falls.append({name: losses["before"] - losses[name] for name in runs})
        share = share_of_the_fall(falls)
        say(f"one byte: {share:.4f} of the fall with float scalars, the mean of {len(falls)} seeds")
        wrong += [] if share > 0.9 else [f"one byte reaches {share:.3f} of the fall with float scalars"]
    if "one-bit" in args.what:
        for seed in args.seeds:
            fine_tuning = FineTuning(DEMO_MODEL, seed, n_rounds=60)
            losses = shown("one bit", seed, fine_tuning.losses(ONE_BIT, n_peers=4, n_rounds=args.rounds))
            ratio = losses["1 bit"] / losses["8 bits"]
            wrong += [] if ratio < 1.05 else [f"one bit ends at {ratio:.3f} of the loss of 8"]
    for claim in wrong:
        say(f"does not hold: {claim}")
    return 1 if wrong else 0


def shown(what: str, seed: int, losses: Losses) -> Losses:
    say(f"{what}, seed {seed}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return losses


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
