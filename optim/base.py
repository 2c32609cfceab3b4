"""The contract of strategies: how local work becomes a payload and how a commit changes the replica.

A strategy is a `torch.optim.Optimizer` that knows no swarm. A swarm calls `propose`, moves the payload,
and calls `apply` with what the ledger counted; a plain training loop calls `step`.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Final, Literal, Protocol, cast

import torch
from torch import Tensor

from ..compression.base import Fields, Fill, Part, Payload, Turn
from ..compression.errors import BadPayload, ConfigError, nearest
from .auditing.evidence import Evidence
from .facts import Facts
from .options import Options
from .parts.clip import Weighing
from .parts.ranks import ALONE, Ranks, is_sharded, local_of, parts_of, ranks_of, refuse_placement
from .parts.saved_state import (
    COUNTERS,
    State,
    by_position,
    counters_as_option,
    counters_of,
    part_of,
    refuse_other_model,
    restored,
    shared,
)

Closure = Callable[[], Tensor]
"""float32 loss of one fixed batch; never calls backward; repeated calls give identical bits in eval mode."""

Draw = Callable[[], Closure]
"""Takes the next batch, seeded by (run, peer, round, micro-batch)."""

Own = Literal["counted", "missed"] | None
"""What became of this replica's own offer of a round; None: it made none."""

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]] | Iterable[dict[str, Any]]
"""`model.named_parameters()`, or groups: {"params": [(name, parameter), ...], "lr": ..., ...}."""


@dataclass(frozen=True, slots=True)
class Share:
    """One counted offer, as a strategy sees it. `seed`: that peer's unsigned 64-bit seed of the round.
    `n_samples`: of the offer, or of all its peer's offers that `Strategy.counts_after` lets count.

    `own_data`: made from data that others do not have. `n_copies`: how many offers of the round have this
    very payload, itself among them. `is_new`: the last audit of its peer's offers has not passed, or there
    was none yet. `has_failed`: it has failed, or there is a flood of such peers. `gap`: rounds since its
    peer's last one, 1 if there was none; `n_active`: peers that have offered lately, of the round. Both are
    known where a strategy weighs by them (`robust/pace`).
    """

    seed: int
    n_samples: int
    payload: Payload
    own_data: bool = False
    n_copies: int = 1
    is_new: bool = False
    has_failed: bool = False
    gap: int = 1
    n_active: int = 0


Vectors = Literal["momentum", "pseudo-gradients"]
"""What payloads are made of, for people."""


@dataclass(frozen=True, slots=True)
class Noise:
    """How noisy a round's payloads were, see `noise`. `signal`: |G|^2, from -1 to 1; `noise`: tr S, in
    samples; `n_samples`: of a payload, a mean."""

    signal: float
    noise: float
    n_samples: float
    of: Vectors


@dataclass(frozen=True, slots=True)
class Round:
    """One committed round, as a strategy sees it: the arguments of `Strategy.apply`."""

    shares: Sequence[Share]
    turn: Turn
    own: Own


@dataclass(frozen=True, slots=True)
class Allotment:
    """How much of a round's work a peer does: its own matter, but the same on all ranks of a node.

    `n_batches`: that it draws, of at most `Strategy.most_batches`; None: all of them. `share`: of what a
    payload may carry; strategies that keep what they do not send obey it, the others do not.
    """

    n_batches: int | None = None
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Parameter:
    """One replicated parameter: its canonical name, its index in name order, the tensor, and what this rank
    holds of it."""

    name: str
    index: int
    tensor: torch.nn.Parameter
    part: Part
    group: dict[str, Any]

    @property
    def local(self) -> Tensor:
        """The elements of `part`, detached, in the parameter's own memory; whole rows of it."""
        return local_of(self.tensor)

    @property
    def decays(self) -> bool:
        """Weight decay leaves biases, norms and all other parameters of less than two dimensions alone."""
        return self.tensor.ndim >= 2


def wholes(parameters: Sequence[Parameter]) -> dict[str, Part]:
    """Whole parameters, by their names."""
    return {p.name: p.part.entire for p in parameters}


def canonical_name(name: str) -> str:
    """The parameter's name without what `compile`, data parallel and checkpoint wrappers put into it."""
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        name = name.replace(wrapper, "")
    # Only in front: a model may well have a submodule called "module" further down.
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


class Peers(Protocol):
    """Who `Strategy.step` exchanges payloads with: a process group (see `group`). Without one it is alone."""

    def prepare(self, strategy: Strategy) -> None:
        """Before the local work of a step: all have the same parameters and options, or it is refused."""
        ...

    def own_seed(self, shared_seed: int) -> int:
        """This peer's seed of a round, from the one that is the same for all."""
        ...

    def exchange(
        self, strategy: Strategy, payload: Payload, turn: Turn, n_samples: int
    ) -> tuple[list[Share], Own]:
        """Everybody's shares that pass `check`, in the same order for all, and what became of one's own."""
        ...


# torch keeps these out of compiled graphs, and imports its compiler to say so: more than a second of
# every process that compiles nothing.
_UNCOMPILED_ADD: Final = inspect.unwrap(torch.optim.Optimizer.add_param_group)
_UNCOMPILED_ZERO: Final = inspect.unwrap(torch.optim.Optimizer.zero_grad)
_UNCOMPILED_STATE: Final = inspect.unwrap(torch.optim.Optimizer.state_dict)
_UNCOMPILED_LOAD: Final = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class Strategy(torch.optim.Optimizer):
    """Base of all strategies; see the module's docstring.

    Subclasses implement `fields`, `propose`, `check` and `apply`, keep their per-parameter state in
    `self.state` and their counters in `self.counters` (both are part of `state_dict`), say with
    `replicated_state` which of the state `apply` changes, and set `facts` and `needs_grad`. Hyper-parameters
    are the entries of `param_groups`; all of them hold for the whole strategy, except those named in
    `per_group`.

    `state_dict()` holds the live tensors, as torch's does: save it (or copy it deeply) before going on.
    """

    facts: ClassVar[Facts]
    """What others need to know before one is built."""

    needs_grad: ClassVar[bool] = True
    """False: closures are evaluated without gradients, with the model in eval mode."""

    takes_bfloat16: ClassVar[bool] = True
    """Whether parameters may be bfloat16, which `apply` rounds to stochastically (see `updating`)."""

    per_group: ClassVar[frozenset[str]] = frozenset({"lr", "weight_decay"})
    """Options that may differ from one parameter group to another."""

    last_loss: float | None = None
    """Mean loss of the local work of the last `propose`; None before it or if every batch was dropped."""

    n_batches: int = 1
    """Micro-batches in the last payload: what `step` says as `n_samples`. (A swarm's runner counts them.)"""

    n_ahead: int = 0
    """Those of them that `work_ahead` drew, before the round of that payload."""

    weighing: Weighing | None = None
    """What the last `apply` made of its shares, in their order; None before it."""

    peers: Peers | None = None
    """Whom `step` exchanges with; None: alone."""

    allotted: Allotment = Allotment()
    """What the next `propose` does, at most."""

    _in_order: tuple[list[dict[str, Any]], list[Parameter]] | None = None
    """The groups, and their parameters in order."""

    ranks: Ranks = ALONE
    """Over which the parameters are sharded; every rank calls the same methods in the same order."""

    def __init__(self, named_parameters: NamedParameters, options: Options) -> None:
        """Subclasses take the fields of `options` as keyword arguments: see `keywords_of`.

        Parameters that need no gradient are left out; they may be sharded by `fully_shard`. Raises
        ConfigError for nameless parameters, for two of one name, for other dtypes and placements, and for
        options out of their range.
        """
        self.counters: dict[str, int] = {}
        super().__init__(cast(Any, named_parameters), options.entries())
        self.state = State()

    # --------------------------------------------------------------------------------- parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, for named parameters: {"params": [(name, parameter), ...], option: value, ...}."""
        group = dict(param_group)
        named = [(canonical_name(name), p) for name, p in named_of(group) if p.requires_grad]
        taken = {name for group in self.param_groups for name in group["param_names"]}
        _refuse_parameters(named, taken, type(self))
        self._refuse_options(group)
        if not named:
            raise ConfigError("a parameter group without a parameter that needs a gradient")
        group.pop("param_names", None)
        group["params"] = named
        _UNCOMPILED_ADD(self, group)
        self.ranks = ranks_of(p for group in self.param_groups for p in group["params"])
        self._in_order = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's."""
        _UNCOMPILED_ZERO(self, set_to_none)

    def _refuse_options(self, group: Mapping[str, Any]) -> None:
        for key in group.keys() - {"params", "param_names", "initial_lr"}:
            if key not in self.defaults:
                raise ConfigError(f"unknown option {key!r}: {nearest(key, self.defaults)}")
            whole_strategy = self.param_groups[0] if self.param_groups else self.defaults
            if key not in self.per_group and group[key] != whole_strategy[key]:
                raise ConfigError(f"{key} is one for all parameter groups")
        self.facts.options.check({**self.defaults, **group})

    def parameters_in_order(self) -> list[Parameter]:
        """Every parameter, by name: the order of payloads, noise counters and fingerprints."""
        # Looked at several times in a round: made anew for other groups only.
        groups = self.param_groups
        if self._in_order is None or not _are_those(groups, self._in_order[0]):
            self._in_order = list(groups), self._sorted()
        return list(self._in_order[1])

    def _sorted(self) -> list[Parameter]:
        found = [
            (name, p, group)
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        ]
        found.sort(key=lambda entry: entry[0])
        ranks = self.ranks
        return [
            Parameter(name, i, p, parts_of(p, ranks.count)[ranks.index], group)
            for i, (name, p, group) in enumerate(found)
        ]

    def replicated_state(self, parameter: Parameter) -> dict[str, Tensor]:
        """What `apply` changes beside the parameter: entry -> the live float32 tensor, made on first use.

        They are entries of `self.state[parameter.tensor]`, shaped like `parameter.local` or 0-d; zero before
        the first round.
        """
        return {}

    def begin_state(self, parameter: Parameter) -> None:
        """Makes the state that every parameter has between two rounds, zero, where it is not there yet."""
        self.replicated_state(parameter)

    def replicated_tensors(self) -> dict[str, Tensor]:
        """All that `apply` changes, in name order: the parameters by their names, their state as
        "parameter:entry". What is fingerprinted, saved in snapshots and copied into from one.

        Live tensors, to be asked for anew after `load_state_dict`. What this rank holds: `replicated_parts`.
        """
        found = {}
        for p in self.parameters_in_order():
            found[p.name] = self.replicated_value(p)
            found.update({f"{p.name}:{entry}": t for entry, t in self.replicated_state(p).items()})
        return dict(sorted(found.items()))

    def replicated_parts(self) -> dict[str, Part]:
        """Which elements of the whole the entries of `replicated_tensors` are."""
        found = {}
        for p in self.parameters_in_order():
            found[p.name] = p.part
            for entry, t in self.replicated_state(p).items():
                found[f"{p.name}:{entry}"] = p.part if t.shape == p.local.shape else Part.whole(t.shape)
        return dict(sorted(found.items()))

    def replicated_value(self, parameter: Parameter) -> Tensor:
        """`parameter.local` as `apply` left it: the memory itself, unless local work changes that one."""
        return parameter.local

    @contextmanager
    def replica(self) -> Iterator[None]:
        """The model has the replicated parameters meanwhile, to be evaluated or saved: it always has, but for
        strategies that train others in it between calls of `step`."""
        yield

    def merged(self, round_: int, n_rounds: int) -> int:
        """The last round up to this one that changes the replica, of a run of so many; 0: none does."""
        return round_

    def counts_after(self, turn: Turn, seed_of: Callable[[int], int]) -> int | None:
        """The last round whose samples of a peer, with these seeds of rounds, do not count in the turn's mean
        any more; None: only the turn's own do."""
        return None

    @property
    def has_own_model(self) -> bool:
        """Whether this peer keeps parameters of its own from round to round that are not the replica's, for
        their own sake."""
        return False

    @contextmanager
    def own_model(self) -> Iterator[None]:
        """The model has those meanwhile, to be evaluated or saved."""
        yield

    def begin(self) -> None:
        """Before round 1: the replicated state beside the parameters is zero again."""
        for p in self.parameters_in_order():
            for t in self.replicated_state(p).values():
                t.zero_()

    def change(self, options: Mapping[str, Any]) -> None:
        """From the next round on these have other values, in every parameter group. Raises ConfigError."""
        for name in options.keys() - set(self.facts.changeable):
            raise ConfigError(f"{name} cannot change: {', '.join(self.facts.changeable)} can")
        changed = [{**group, **options} for group in self.param_groups]
        for group in changed:
            self.facts.options.check({**self.defaults, **group})
        for group in self.param_groups:
            group.update(options)

    def told(self) -> str | None:
        """What the options come to for this model, where they do not say it themselves; None: they do."""
        return None

    def option(self, name: str) -> Any:
        """An option that holds for the whole strategy."""
        return self.param_groups[0][name]

    def count(self, what: str, n: int = 1) -> None:
        """Adds to one of the counters; those at zero do not appear."""
        if n:
            self.counters[what] = self.counters.get(what, 0) + n

    # --------------------------------------------------------------------------------- rounds

    @abstractmethod
    def fields(self, turn: Turn | None = None) -> Fields:
        """What a payload of that round looks like to a receiver; None: with all that any round sends."""

    @property
    def most_batches(self) -> int:
        """How many batches `propose` draws when it is allotted all of the work."""
        return prod(int(self.option(name)) for name in self.facts.batches)

    @property
    def staleness(self) -> int:
        """Commits that are missing when a round's work is done. With 1 `work_ahead` does all of it before the
        commit of the round before is applied; a replica's first work is done where it is."""
        return 0

    @property
    def batches(self) -> int:
        """How many it draws next, one at least."""
        n = self.allotted.n_batches
        return self.most_batches if n is None else max(1, min(n, self.most_batches))

    @abstractmethod
    def propose(self, draw: Draw, turn: Turn) -> Payload:
        """The local work of one round. Does not change a parameter."""

    def propose_from_grad(self, turn: Turn) -> Payload:
        """The same from the gradients that are in place. Raises ConfigError where a strategy uses none."""
        raise ConfigError(f"{type(self).__name__} uses no gradients: call step(closure) with the loss")

    def absorb_gradients(self, turn: Turn) -> bool:
        """Takes the gradients in place in, as local work of the round; False, with nothing done, if they are
        the round's last: then `propose_from_grad` takes them."""
        return False

    def propose_again(self, turn: Turn) -> Payload | None:
        """What missed its commit, for another round, without further work; None: it cannot be sent like that.
        Does not change a parameter."""
        return None

    def work_ahead(self, draw: Draw, turn: Turn, sent: Payload | None = None) -> bool:
        """Work for the next round while the offer of this one, `turn`, is under way: a piece at a time, and
        False, with nothing done, if there is none to do. `draw`: the one of `propose`, further batches; of a
        strategy of some staleness those of the next round. `sent`: the payload of that offer, which a peer
        that was started anew does not know any more. Does not change a parameter. (`step` has nothing to do
        meanwhile: its collectives block.)"""
        return False

    @contextmanager
    def moved_by(self, sent: Payload | None, turn: Turn) -> Iterator[None]:
        """The model is meanwhile where a peer's work is done that has sent this in the round and has not seen
        its commit; None: it has sent nothing. Only with some `staleness`."""
        yield

    def resume(self) -> None:
        """The next gradients in place will belong to the next round: called by `step` after `apply`."""

    @abstractmethod
    def check(self, payload: Payload, turn: Turn) -> None:
        """Raises `BadPayload` for a payload that `apply` must not see; as exact as `apply`."""

    @abstractmethod
    def apply(self, shares: Sequence[Share], turn: Turn, own: Own) -> None:
        """Exact: one committed round. `shares` in the ledger's order, each one already checked."""

    def apply_many(self, rounds: Sequence[Round]) -> None:
        """Exact: committed rounds in order, with the bits of one `apply` after the other, maybe sooner.

        If it is interrupted the parameters are in no known state.
        """
        for r in rounds:
            self.apply(r.shares, r.turn, r.own)

    def audit(
        self, payloads: Sequence[Payload], draw: Draw, turns: Sequence[Turn], n_batches: int
    ) -> list[Evidence | None]:
        """What speaks for offers of one round when their work is done again; None: that cannot be told.

        `payloads`: as they came through `check`, all compared with the same work where that can be; `draw`:
        takes batches, of which `n_batches` are enough; `turns`: of the round, with the seeds of the payloads'
        peers. The model is in eval mode, with the parameters as they were before that round. Changes nothing,
        local state included.
        """
        return [None] * len(payloads)

    def scored_parts(self, payloads: Sequence[Payload], turn: Turn) -> list[Payload]:
        """What `scores` needs of payloads that came through `check`, in memory of their own: not much."""
        return [{} for _ in payloads]

    def scores(self, parts: Sequence[Payload], turn: Turn) -> list[float] | None:
        """How far each of a round's payloads points where the others do, from -1 to 1, by their
        `scored_parts`. None: that cannot be told. Changes nothing."""
        return None

    def cosines(self, payload: Payload, others: Sequence[Payload], turn: Turn) -> list[float] | None:
        """How far each of the others points where the payload does, from -1 to 1; all of one round, and they
        came through `check`. None: that cannot be told. Changes nothing."""
        return None

    def noise(self, shares: Sequence[Share], turn: Turn) -> Noise | None:
        """Of the round that was applied last. None: that says nothing, or cannot be told of one payload."""
        return None

    def known_payload(self, fill: Fill, salt: int) -> Payload:
        """Fixed bits that `check` accepts, for `Facts.known_updates`; another payload for every salt.

        By default all elements that `fields` allows are filled, with another salt for every name.
        """
        fields = self.fields().items()
        return {
            name: tuple(fill(f.dtype, f.n_elements, salt + i) for f in row)
            for i, (name, row) in enumerate(fields)
        }

    def batch_bytes(self) -> int:
        """How many bytes of payloads are worth collecting for one `apply_many`; 0: one round at a time."""
        return 0

    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Local work without a swarm, and if that completes a round: exchange with `peers` and apply.

        With a closure it is a whole round. The closure returns the loss and does not call `backward`: the
        strategy does, if it needs gradients; such a strategy calls it once per micro-batch, and it may take
        another batch each time. Returns `last_loss`, if any. Without a closure the gradients that are in
        place are used (and left there), and several steps may make a round.
        """
        turn = turn_of_step(self.counters.get("steps", 0) + 1, int(self.option("seed")), self.peers)
        if self.peers is not None:
            self.peers.prepare(self)
        if closure is None:
            self.last_loss = None
            if self.absorb_gradients(turn):
                return None
            payload = self.propose_from_grad(turn)
        else:
            batch = closure
            payload = self.propose(lambda: batch, turn)
        self.apply(*self._exchanged(payload, turn))
        self.count("steps")
        if closure is None:
            self.resume()
        return self.last_loss

    def _exchanged(self, payload: Payload, turn: Turn) -> tuple[list[Share], Turn, Own]:
        """The arguments of `apply`."""
        if self.peers is not None:
            shares, own = self.peers.exchange(self, payload, turn, self.n_batches)
            return shares, turn, own
        self.check(payload, turn)
        return [Share(turn.own_seed, self.n_batches, payload)], turn, "counted"

    # --------------------------------------------------------------------------------- state

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: torch's own would leave out what subclasses add. Hooks and peers stay."""
        # A learning rate scheduler patches `step` of an instance; connections cannot be copied.
        left_out = ("_optimizer_", "step", "peers", "ranks", "_in_order")
        return {name: v for name, v in self.__dict__.items() if not name.startswith(left_out)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch's own, which no strategy has

    def state_dict(self) -> dict[str, Any]:
        """torch's, and the counters. Of sharded parameters DTensors, so that `torch.distributed.checkpoint`
        knows what they are; what is packed to be sent is this rank's alone."""
        for parameter in self.parameters_in_order():  # loaders fill in what is there
            self.begin_state(parameter)
        whole = self._plain_state_dict()
        whole["state"] = shared(whole["state"], [p for group in self.param_groups for p in group["params"]])
        whole["param_groups"][0][COUNTERS] = counters_as_option(self.counters, whole["state"])
        return whole

    def _plain_state_dict(self) -> dict[str, Any]:
        return {**_UNCOMPILED_STATE(self), COUNTERS: dict(self.counters)}

    def local_state_dict(self) -> dict[str, Any]:
        """`state_dict` without what `replicated_tensors` holds: for a file beside a snapshot."""
        parameters = {p.tensor: p for p in self.parameters_in_order()}
        whole = self._plain_state_dict()
        in_torch_order = [p for group in self.param_groups for p in group["params"]]
        replicated = {i: self.replicated_state(parameters[p]) for i, p in enumerate(in_torch_order)}
        whole["state"] = {
            i: {entry: value for entry, value in entries.items() if entry not in replicated[i]}
            for i, entries in whole["state"].items()
        }
        return {**whole, "is_local": True}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores bit for bit; a `local_state_dict` leaves what is replicated as it is. Tensors keep their
        dtype; those within containers (packed sends) stay on the CPU, the others go to their parameter's
        device. Parameters go by number, or by name as `torch.distributed.checkpoint` calls them. Raises
        ConfigError for another model's state."""
        groups = state_dict["param_groups"]
        refuse_other_model(groups, self.param_groups)
        counters = counters_of(state_dict)
        entries_by_position = by_position(state_dict["state"], groups)
        groups = [{k: v for k, v in group.items() if k != COUNTERS} for group in groups]
        # torch would cast every tensor to the parameter's dtype: it restores the groups only.
        # A state of an earlier version has no value for options that are younger: they keep the default.
        complete = [group | {k: v for k, v in self.defaults.items() if k not in group} for group in groups]
        state = State()
        if state_dict.get("is_local", False):  # before torch empties the state
            kept = {p.tensor: self.replicated_state(p) for p in self.parameters_in_order()}
            state.update({p: dict(entries) for p, entries in kept.items() if entries})
        _UNCOMPILED_LOAD(self, {"state": {}, "param_groups": complete})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, entries in entries_by_position.items():
            p = parameters[i]
            part = parts_of(p, self.ranks.count)[self.ranks.index]
            here = part_of(entries, part, local_of(p)) if is_sharded(p) else entries
            state[p] |= {name: restored(value, p.device) for name, value in here.items()}
        self.state = state
        self.counters = counters


def _are_those(groups: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> bool:
    """The very same dicts."""
    return len(groups) == len(others) and all(a is b for a, b in zip(groups, others, strict=True))


def _refuse_parameters(
    named: Sequence[tuple[str, torch.nn.Parameter]], taken: set[str], kind: type[Strategy]
) -> None:
    """Raises ConfigError for a name that is `taken`, or there twice, and for what a replica cannot hold."""
    for name, p in named:
        if name in taken:
            raise ConfigError(f"two parameters are called {name!r}")
        refuse_placement(name, p)
        if p.dtype != torch.float32 and not (p.dtype == torch.bfloat16 and kind.takes_bfloat16):
            also = " or bfloat16" if kind.takes_bfloat16 else f" with {kind.__name__}"
            raise ConfigError(f"parameter {name!r} is {p.dtype}: replicas are float32{also}")
        if ":" in name:
            raise ConfigError(f"parameter {name!r}: a colon stands between a parameter and its state")
        taken.add(name)


def turn_of_step(round: int, seed: int, peers: Peers | None) -> Turn:
    """The round of a `step`, without a swarm that says what it fixes."""
    words = hashlib.blake2b(b"thinwire step %d %d" % (seed, round), digest_size=16).digest()
    shared, own = (int.from_bytes(words[i : i + 8], "little") for i in (0, 8))
    own = peers.own_seed(shared) if peers is not None else own
    return Turn(round=round, shared_seed=shared, own_seed=own, lr_factor=1.0)


def refuse_names(payload: Payload, expected: Iterable[str]) -> None:
    """Raises BadPayload unless the payload's names are exactly those that are expected."""
    strange = sorted(set(payload).symmetric_difference(expected))
    if strange:
        raise BadPayload("layout", f"missing or unknown: {', '.join(strange[:3])}")


def named_of(group: Mapping[str, Any]) -> list[tuple[str, torch.nn.Parameter]]:
    """The named parameters of a group, as users and torch write them. Raises ConfigError without names."""
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    if "param_names" in group:
        params = list(zip(group["param_names"], params, strict=True))
    if not all(isinstance(entry, tuple) for entry in params):
        raise ConfigError("parameters need their names: pass model.named_parameters()")
    return params
