"""What a round of a run takes on this machine: real batches, real packing, and the payloads of as many peers
applied. `python -m thinwire.node.planning.measuring` does it in a process of its own, whose memory it is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Final

from ...compression.errors import ConfigError, ThinwireError
from ...coordinator.protocol.identity import new_key, peer_id_of
from ...coordinator.protocol.messages import (
    INLINE_BYTES,
    Admission,
    Commit,
    CommitBody,
    OfferEntry,
    digest_of,
    encode_record,
)
from ..system.memory import peak_bytes
from ..system.output import to_stderr, to_stdout

WARM_UP: Final = 1
"""Rounds that are not counted: kernels are compiled, caches are cold."""

MIN_ROUNDS: Final = 3
MAX_ROUNDS: Final = 20


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one strategy. Of every measured round: `compute_s` of `n_batches` batches, `pack_s`, and `apply_s`
    of the payloads of all peers; `payload_bytes` of one. `most_batches`: that a full round has, and
    `full_bytes` of its payload. `memory_bytes`: of the whole process at its largest, `libraries_bytes` of it
    before there was a model. `told`: see `Strategy.told`; `overlaps`: what is exchanged is while the next
    round is computed."""

    strategy: str
    n_parameters: int
    n_batches: int
    most_batches: int
    tokens_per_batch: int
    compute_s: tuple[float, ...]
    pack_s: tuple[float, ...]
    apply_s: tuple[float, ...]
    payload_bytes: tuple[int, ...]
    full_bytes: int
    memory_bytes: int
    libraries_bytes: int
    device_bytes: int
    told: str | None = None
    overlaps: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Measured:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()
        }
        return cls(**values)


def main() -> int:
    """Reads {config, peers, seconds, device, task} as JSON from standard input, prints a `Measured`."""
    asked = json.load(sys.stdin)
    try:
        measured = measure(asked["config"], asked["peers"], asked["seconds"], asked["device"], asked["task"])
    except ThinwireError as e:
        to_stderr(e)
        return e.exit_code
    to_stdout(measured.to_json())
    return 0


def measure(
    config: Mapping[str, Any], n_peers: int, seconds: float, device: str, import_path: str | None
) -> Measured:
    """Some rounds of about `seconds` in all. `config`: of the run, with the strategy to be measured. Raises
    ConfigError."""
    import torch

    from ..config import RunConfig

    libraries_bytes = peak_bytes()
    run = _Run(RunConfig.model_validate(config), n_peers, device, import_path)
    first_bytes = run.round(1)[3]  # compiles
    began_s = time.monotonic()
    run.round(1)
    n_batches = _batches_that_fit(time.monotonic() - began_s, seconds / 6, run.most_batches)
    for _ in range(WARM_UP):
        run.round(n_batches)
    rounds: list[tuple[float, float, float, int]] = []
    ends_s = time.monotonic() + seconds
    while len(rounds) < MIN_ROUNDS or (time.monotonic() < ends_s and len(rounds) < MAX_ROUNDS):
        rounds.append(run.round(n_batches))
    compute_s, pack_s, apply_s, sizes = zip(*rounds, strict=True)
    # Some strategies send something for every batch, which is what more batches add.
    more = (sizes[-1] - first_bytes) / (n_batches - 1) if n_batches > 1 else 0.0
    return Measured(
        strategy=str(run.config.strategy["name"]),
        n_parameters=run.n_parameters,
        n_batches=n_batches,
        most_batches=run.most_batches,
        tokens_per_batch=run.task.n_tokens,
        compute_s=compute_s,
        pack_s=pack_s,
        apply_s=apply_s,
        payload_bytes=sizes,
        full_bytes=round(sizes[-1] + more * (run.most_batches - n_batches)),
        memory_bytes=peak_bytes(),
        libraries_bytes=libraries_bytes,
        device_bytes=torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0,
        told=run.told,
        overlaps=run.overlaps,
    )


def _batches_that_fit(one_s: float, seconds: float, most: int) -> int:
    """Two at least, to see what one more adds."""
    return min(most, max(2, int(seconds / max(one_s, 1e-6))))


class _Run:
    """A replica with its task, and a ledger that gives every round the same payload from all peers."""

    def __init__(self, config: Any, n_peers: int, device: str, import_path: str | None) -> None:
        from ..genesis import make_genesis
        from ..local_work import LocalWork
        from ..replica import build_replica
        from ..tasks.registry import make_task

        self.config = config
        self.task = make_task(config.task, import_path, None)
        self._peer_ids = [peer_id_of(new_key().public_key()) for _ in range(n_peers)]
        genesis = make_genesis(config, self.task, self._peer_ids[0], 1)
        blobs = {digest_of(blob): blob for blob in genesis.blobs}
        body = self._body = genesis.body
        run_id = digest_of(encode_record(body))
        self._replica = build_replica(run_id, body, self.task, self._peer_ids[0], device)
        corpus, held_out, base = (
            None if ref is None else blobs[ref.digest] for ref in (body.corpus, body.held_out, body.base)
        )
        self.task.load(corpus, held_out)
        self._replica.begin(base)
        self._work = LocalWork(self._replica, self.task)
        self.most_batches = min(
            self._replica.strategy.most_batches, max(1, body.limits.max_samples // self.task.n_samples)
        )
        self.n_parameters = sum(prod(entry.shape) for entry in body.layout)
        self.told = self._replica.strategy.told()
        self.overlaps = self._replica.strategy.staleness > 0

    def round(self, n_batches: int) -> tuple[float, float, float, int]:
        """Seconds of compute, pack and apply, and the payload's bytes. Raises ConfigError."""
        from ...optim.base import Allotment

        proposal = self._work.propose(Allotment(n_batches))
        if len(proposal.payload) > self._body.limits.max_payload_bytes:
            raise ConfigError(
                f"a payload of {len(proposal.payload):,} bytes is more than limits.max_payload_bytes"
            )
        commit = self._commit(proposal.round, proposal.payload, proposal.n_samples)
        began_s = time.perf_counter()
        self._replica.apply_batch([commit], lambda _offer: proposal.payload, {proposal.round})
        _wait_for_device(self._replica.model)
        return (
            proposal.compute_s,
            proposal.pack_s,
            time.perf_counter() - began_s,
            len(proposal.payload),
        )

    def _commit(self, round_: int, payload: bytes, n_samples: int) -> Commit:
        is_inline = len(payload) <= INLINE_BYTES
        offers = tuple(
            OfferEntry(
                peer=index,
                n_samples=max(1, n_samples),
                n_tokens=0,
                loss=None,
                n_bytes=len(payload),
                payload=payload if is_inline else None,
                digest=None if is_inline else digest_of(payload),
            )
            for index in range(len(self._peer_ids))
        )
        admitted = [Admission(index=i, peer_id=peer_id) for i, peer_id in enumerate(self._peer_ids)]
        body = CommitBody(
            round=round_,
            parent=self._replica.digest,
            offers=offers,
            admitted=tuple(admitted) if round_ == 1 else (),
            lr_factor_bits=self._body.lr_factor_bits,
            reports=(),
            snapshots=(),
            evaluator=None,
            time_ms=round_,
        )
        return Commit(record=encode_record(body), signature=bytes(64))


def _wait_for_device(model: Any) -> None:
    import torch

    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
