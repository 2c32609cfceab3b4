"""A strategy over a `torch.distributed` process group: fixed membership, no coordinator.

    optimizer = group_optimizer({"name": "decoupled", "lr": 3e-3}, model.named_parameters())

and the training loop stays as it is: `backward()` on every rank's own batch, `optimizer.step()`,
`optimizer.zero_grad()`; `optimizer.step(closure)` for SPSA. Gradients are not to be averaged beforehand: no
DistributedDataParallel around the model. Schedulers, clipping and several backward passes per step work as
with any optimizer, if all ranks do the same. With float16 and a GradScaler call `scaler.unscale_(optimizer)`
and then `optimizer.step()`: a rank that skipped a step would leave the others waiting, and gradients that are
not finite are left out here anyway.

`state_dict()` of any rank may be loaded on all ranks of a group of any size, before it is joined. What is
replicated is the same in all of them; momentum and error feedback are those of the rank that saved it.

Per step two collectives: the payloads' lengths, and the payloads.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any, Final

import torch.distributed as dist

from ..compression import wire
from ..compression.base import Fields, Payload, Turn
from ..compression.errors import BadPayload, ConfigError, ReplicaDiverged
from ..compression.fingerprint import parameter_sums
from .base import NamedParameters, Own, Share, Strategy
from .parts.ranks import GroupRanks
from .registry import build_strategy

_N_SAMPLES: Final = struct.Struct("<Q")


def group_optimizer(
    config: Mapping[str, Any], named_parameters: NamedParameters, group: dist.ProcessGroup | None = None
) -> Strategy:
    """The strategy of a config, as in a run's file, over a process group; see `join_group`."""
    return join_group(build_strategy(config, named_parameters), group)


def join_group(strategy: Strategy, group: dist.ProcessGroup | None = None) -> Strategy:
    """From now on `strategy.step` exchanges with the other ranks of the group (None: the default one).

    To be called on every rank. All get the replicated state of rank 0. Raises ConfigError, naming what
    differs, unless all have the same parameters and options, and when there is no process group. Parameters
    may be sharded inside nodes: then `group` has one rank of each node, all with the same rows.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("no process group: call torch.distributed.init_process_group first (see torchrun)")
    if isinstance(strategy.ranks, GroupRanks) and set(strategy.ranks.members) & (
        set(dist.get_process_group_ranks(group)) - {dist.get_rank()}
    ):
        raise ConfigError(
            "the parameters are sharded over ranks of this group: join the group of those ranks, one of each "
            "node, that hold the same rows"
        )
    peers = GroupPeers(group)
    peers.prepare(strategy)
    strategy.peers = peers
    return strategy


def verify_group(strategy: Strategy) -> None:
    """Raises ReplicaDiverged, naming tensors and ranks, unless all ranks have the same replicated bits."""
    if not isinstance(strategy.peers, GroupPeers):
        raise ConfigError("the strategy is in no group: see join_group")
    strategy.peers.verify(strategy)


class GroupPeers:
    """The ranks of a process group as `Strategy.peers`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._ranks = GroupRanks(group)
        self.rank, self.world_size = self._ranks.index, self._ranks.count
        self._known: set[str] = set()

    def prepare(self, strategy: Strategy) -> None:
        """Parameters that are new (all of them at first, later those of `add_param_group`) are compared, and
        become what rank 0 has."""
        names = {p.name for p in strategy.parameters_in_order()}
        if names == self._known:
            return
        self._compare(strategy)
        for name, t in strategy.replicated_tensors().items():
            if name.partition(":")[0] not in self._known:
                self._ranks.broadcast_tensor(t)
        self._known = names

    def own_seed(self, shared_seed: int) -> int:
        """Unsigned 64-bit, from the round's."""
        return rank_seed(shared_seed, self.rank)

    def exchange(
        self, strategy: Strategy, payload: Payload, turn: Turn, n_samples: int
    ) -> tuple[list[Share], Own]:
        """A rank whose payload does not pass `check` is left out, by all alike, and counted as
        `bad_payloads`. Raises ConfigError for a rank that is at another step or has other options."""
        fields, layout = strategy.fields(turn), wire.layout_hash(_description(strategy).encode())
        data = wire.encode(payload, fields, turn.round, layout)
        max_bytes = wire.max_bytes_of(fields)
        shares: list[Share] = []
        own: Own = "missed"
        for rank, message in enumerate(self._ranks.gather(_N_SAMPLES.pack(n_samples) + data)):
            theirs = self._decoded(rank, message[_N_SAMPLES.size :], fields, turn.round, layout, max_bytes)
            try:
                strategy.check(theirs, turn)
            except BadPayload:
                strategy.count("bad_payloads")
                continue
            n = _N_SAMPLES.unpack_from(message)[0]
            shares.append(Share(rank_seed(turn.shared_seed, rank), n, theirs))
            if rank == self.rank:
                own = "counted"
        return shares, own

    def _decoded(
        self, rank: int, data: bytes, fields: Fields, round: int, layout: bytes, max_bytes: int
    ) -> Payload:
        """A rank's payload from its bytes. Raises ConfigError, naming the rank, for what cannot be read."""
        try:
            return wire.decode(data, fields, round, layout, max_bytes)
        except BadPayload as e:
            what = {
                "layout": "has other parameters or options (is its learning rate the same?)",
                "round": "has made another number of steps",
            }
            raise ConfigError(
                f"rank {rank} {what.get(e.reason, f'sent what cannot be read: {e}')}. Every rank has to call "
                "step() equally often, with the same options."
            ) from e

    def verify(self, strategy: Strategy) -> None:
        """See `verify_group`."""
        tensors = strategy.replicated_tensors()
        sums = parameter_sums(tensors, dict.fromkeys(tensors, 0))
        everybody = [json.loads(data) for data in self._ranks.gather(json.dumps(sums).encode())]
        for rank, theirs in enumerate(everybody):
            differing = [n for n in sorted(sums) if theirs.get(n) != everybody[0].get(n)]
            if differing:
                raise ReplicaDiverged(f"rank {rank} differs from rank 0 in {', '.join(differing[:5])}")

    def _compare(self, strategy: Strategy) -> None:
        """Raises ConfigError, the same on every rank."""
        everybody = [json.loads(data) for data in self._ranks.gather(_description(strategy).encode())]
        for rank, theirs in enumerate(everybody):
            if differences := _differences(everybody[0], theirs):
                raise ConfigError(f"rank {rank} differs from rank 0: {'; '.join(differences[:5])}")


def rank_seed(shared_seed: int, rank: int) -> int:
    """A rank's unsigned 64-bit seed of a round, from the one that all share."""
    words = hashlib.blake2b(b"thinwire rank %d %d" % (shared_seed, rank), digest_size=8)
    return int.from_bytes(words.digest(), "little")


def _description(strategy: Strategy) -> str:
    """What all ranks must have in common, as JSON: kind and step, shapes and options of every parameter."""
    parameters = {
        p.name: {
            "shape": list(p.tensor.shape),
            **{k: v for k, v in p.group.items() if k not in ("params", "param_names")},
        }
        for p in strategy.parameters_in_order()
    }
    steps = strategy.counters.get("steps", 0)
    whole = {"strategy": type(strategy).__name__, "steps": steps, "parameters": parameters}
    return json.dumps(whole, sort_keys=True, default=repr)


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """In words: what a rank has that rank 0 has not."""
    found = [
        f"{key} is {theirs[key]}, not {ours[key]}"
        for key in ("strategy", "steps")
        if theirs[key] != ours[key]
    ]
    a, b = ours["parameters"], theirs["parameters"]
    found += [f"no parameter {name}" for name in sorted(a.keys() - b.keys())]
    found += [f"a parameter {name}" for name in sorted(b.keys() - a.keys())]
    seen = set()
    for name in sorted(a.keys() & b.keys()):
        for key in sorted(a[name].keys() | b[name].keys()):
            if a[name].get(key) != b[name].get(key):
                where = f" of {name}" if key in ("shape", *Strategy.per_group) else ""
                seen.add(f"{key}{where} is {b[name].get(key)}, not {a[name].get(key)}")
    return found + sorted(seen)
