"""Eight real nodes, six of them equally fast, one half as fast, one a quarter: what a policy makes of them.

    python -m tests.chaos.stragglers                 the same work for everybody
    python -m tests.chaos.stragglers --chosen        every node chooses how much it does in a round

Runs a swarm with the policy `all`, then one with `fastest`, and prints one line of JSON: the seconds that
both took for the same tokens, their ratio, and the held-out losses there. Batches sleep instead of computing,
so that eight nodes fit on two cores. A measurement, not a test: node/test_heterogeneous.py asserts the same
in scripted time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.harness import Swarm
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.identity import load_or_create

SLOWNESS = [1, 1, 1, 1, 1, 1, 2, 4]
FIRST = 1
"""Time is measured from this round's commit on: before it nodes start."""


@dataclass(frozen=True)
class Measured:
    """Of one swarm: tokens and seconds since round FIRST, by round; held-out losses by round."""

    tokens: list[int]
    seconds: list[float]
    held_out: dict[int, float]

    def after(self, n_tokens: int) -> tuple[float, float | None]:
        """Seconds until so many were committed, and the loss that was measured nearest to it."""
        at = next((i for i, n in enumerate(self.tokens) if n >= n_tokens), len(self.tokens) - 1)
        near = min(self.held_out, key=lambda r: abs(r - FIRST - 1 - at), default=None)
        return self.seconds[at], None if near is None else self.held_out[near]


def run(policy: str, batch_s: float, rounds: int, *, is_chosen: bool) -> Measured:
    settings: dict[str, Any] = {
        **{"run.rounds": rounds, "run.eval_every": 4, "policy.name": policy},
        **{"schedule.name": "constant", "schedule.warmup_rounds": 0, "strategy.lr": 3e-3},
        **{"strategy.accumulate": 2, "network.heartbeat_s": 1.0},
    }
    if is_chosen:
        settings |= {"strategy.accumulate": 16, "strategy.weights": "samples", "work.round_s": 5 * batch_s}
    with tempfile.TemporaryDirectory(prefix="stragglers-") as folder:
        work_s = [batch_s * n for n in SLOWNESS]
        with Swarm(Path(folder), len(SLOWNESS), settings=settings, work_s=work_s) as swarm:
            sys.stderr.write(f"{policy}: all nodes train\n")
            swarm.wait(lambda: swarm.head() >= rounds, 600, f"round {rounds}")
            state = swarm.coordinator_state
        ledger = Ledger.open(state / "ledger.db", load_or_create(state / "key").public_key())
        bodies = [commit.body for commit in ledger.commits(0, rounds)]
        held_out = dict(ledger.held_out())
        ledger.close()
    tokens, seconds, n_tokens = [], [], 0
    for body in bodies[FIRST:]:
        n_tokens += sum(offer.n_tokens for offer in body.offers)
        tokens.append(n_tokens)
        seconds.append((body.time_ms - bodies[FIRST - 1].time_ms) / 1000)
    return Measured(tokens, seconds, held_out)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chosen", action="store_true", help="nodes choose their work ([work] round_s)")
    parser.add_argument("--batch-s", type=float, default=0.5, help="of a fast node (default 0.5)")
    parser.add_argument("--rounds", type=int, default=14, help="with the policy all (default 14)")
    options = parser.parse_args()
    more = options.rounds if options.chosen else options.rounds * 3 // 2 + 4
    everybody = run("all", options.batch_s, options.rounds, is_chosen=options.chosen)
    fastest = run("fastest", options.batch_s, more, is_chosen=options.chosen)
    n_tokens = min(everybody.tokens[-1], fastest.tokens[-1])
    (all_s, all_loss), (fastest_s, fastest_loss) = everybody.after(n_tokens), fastest.after(n_tokens)
    result = {
        "work": "chosen" if options.chosen else "fixed",
        "tokens": n_tokens,
        "all_s": round(all_s, 2),
        "fastest_s": round(fastest_s, 2),
        "ratio": round(all_s / fastest_s, 2),
        "all_held_out": all_loss,
        "fastest_held_out": fastest_loss,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
