"""Swarm sampling policy optimisation (SAPO, arXiv 2509.08721): reinforcement learning by peers that share
what they have written. Per round, on peer i, whose policy x_i is its own:

    sample  `samples` completions of each of `prompts` prompts: a group for each
    send    them, as numbers of tokens; which the prompts are follows from the peer's seed of the round
    choose  `own` groups of these, and `foreign` ones of what others sent in the round before
    A       = (r - mean r of the group) / deviation of r        r: rewards, which this peer works out itself
    x_i     after steps along the gradient of the mean of A log p(completion)

Groups whose rewards are all alike say nothing, and are not chosen; of what others sent each of them has its
turn, so that nobody has more than its part of the foreign groups.

Only what was written travels. The replica stays what it was in the beginning: `apply` changes nothing, peers'
models are local state (`export --own`), and any model that knows the same tokens may take part. Whoever
completes a prompt wrongly, on purpose too, can only have it counted as wrong.

A payload has a byte for every token, and 29 bytes of framing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from typing import Annotated, Any, ClassVar, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from ..compression.base import Field, Fields, Fill, Payload, Turn
from ..compression.errors import BadPayload, ConfigError
from .base import Draw, NamedParameters, Own, Share, Strategy, refuse_names
from .facts import Facts, KnownUpdate
from .inner.optimizers import check_inner, state_bytes
from .inner.phase import InnerPhase
from .inner.training import OwnTraining
from .options import Number, Options, Whole, keywords_of

TOKENS: Final = "tokens"
"""The one entry of a payload: uint8, prompt by prompt, completion by completion."""

MOST_HEARD: Final = 64
"""Peers of a round whose completions are kept for the next one."""

_HEARD: Final = "heard"
_LEAST: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Group:
    """Completions of prompt number `prompt` of a seed: uint8 (samples, length), and what each of them is
    worth against the others, float32 (samples,)."""

    seed: int
    prompt: int
    tokens_GC: Tensor
    advantage_G: Tensor


class Policy(Protocol):
    """Of the task: how a model writes, and what that is worth. `seed`: unsigned 64-bit."""

    def sample(self, seed: int, prompts: int, samples: int) -> Tensor:
        """uint8 (prompts, samples, length) on the CPU: what the model writes after this seed's prompts."""
        ...

    def rewards(self, seed: int, tokens_PGC: Tensor) -> Tensor:
        """float32 (prompts, samples) on the CPU: of completions, by whomever, of the prompts of the seed."""
        ...

    def loss(self, groups: Sequence[Group]) -> Tensor:
        """Minus the mean of the advantage times the log-probability of the completion."""
        ...


@dataclass(frozen=True, kw_only=True)
class SapoOptions(Options):
    """Of a run's `[strategy]`, and keyword arguments of `Sapo`."""

    lr: Annotated[float, Number(at_least=0)] = 1e-3
    """The inner optimizer's; schedules act on it."""
    weight_decay: Annotated[float, Number(at_least=0)] = 0.0
    """The inner optimizer's."""
    inner: str | Mapping[str, Any] = field(default_factory=lambda: {"name": "AdamW", "betas": [0.9, 0.95]})
    """One of torch's optimizers and its options, but for lr and weight_decay, which stand above."""
    inner_steps: Annotated[int, Whole(1, 2**10)] = 1
    """On the chosen groups, in a round."""
    max_grad_norm: Annotated[float, Number(at_least=0)] = 1.0
    """L2 norm of a step's gradient; 0: no limit."""

    prompts: Annotated[int, Whole(1, 2**12)] = 8
    """That a peer completes in a round."""
    samples: Annotated[int, Whole(2, 2**8)] = 8
    """Completions of each."""
    length: Annotated[int, Whole(1, 2**12)] = 2
    """Tokens of a completion, as the task has them."""
    vocabulary: Annotated[int, Whole(2, 2**8)] = 256
    """Tokens that there are, as the task has them."""

    own: Annotated[int, Whole(0, "prompts")] = 8
    """Of a peer's own groups so many are trained on, at most."""
    foreign: Annotated[int, Whole(0, 2**12)] = 8
    """And so many of the others'."""

    @classmethod
    def check(cls, entries: Mapping[str, Any]) -> None:
        super().check(entries)
        check_inner(entries["inner"], entries["weight_decay"])


class Sapo(OwnTraining):
    """See the module's docstring. Nothing is replicated but the parameters as they began. Local: x_i, the
    inner optimizer's state, what others sent in the last round.

    Only for tasks that have a `Policy`, and only in a swarm, or in rounds with a closure: `step()` without
    one raises ConfigError.

    Counters: `applied`, the last round; `dropped_batches` whose loss or gradient was not finite;
    `dropped_rounds` whose x_i was not; `own` and `foreign` groups that were trained on.
    """

    facts: ClassVar[Facts] = Facts(
        options=SapoOptions,
        changeable=("lr", "weight_decay", "max_grad_norm"),
        small_model={"lr": 1e-3},
        # The replica as it began, own model, gradients.
        bytes_per_parameter=lambda options: 12.0 + state_bytes(options.get("inner", "AdamW")),
        is_audited=False,  # a peer's model is its own
        known_updates={"sapo update": KnownUpdate({}, 0x0D2C1CBDC60CB885, is_slow=True)},
    )
    takes_bfloat16: ClassVar[bool] = False  # inner steps in bfloat16 would mostly be rounded away

    policy: Policy | None = None
    """The task's, on the model with these parameters."""

    @keywords_of(SapoOptions)
    def __init__(self, named_parameters: NamedParameters, options: SapoOptions) -> None:
        self._losses: list[float] = []
        self._phase = InnerPhase(self)
        super().__init__(named_parameters, options)
        if self.ranks.count > 1:
            raise ConfigError("sapo trains on one rank of a node: start it with --ranks 1")
        self._refuse_muon_alone()

    def __getstate__(self) -> dict[str, Any]:
        """Copies have no policy."""
        return {name: v for name, v in super().__getstate__().items() if name not in ("policy", "_phase")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._phase = InnerPhase(self)

    def merged(self, round_: int, n_rounds: int) -> int:
        """No round changes the replica."""
        return 0

    @property
    def _shape(self) -> tuple[int, int, int]:
        return int(self.option("prompts")), int(self.option("samples")), int(self.option("length"))

    def fields(self, turn: Turn | None = None) -> Fields:
        return {TOKENS: (Field(torch.uint8, int(np.prod(self._shape))),)}

    def known_payload(self, fill: Fill, salt: int) -> Payload:
        ((name, (row,)),) = self.fields().items()
        tokens = fill(row.dtype, row.n_elements, salt).long() % int(self.option("vocabulary"))
        return {name: (tokens.to(torch.uint8),)}

    # --------------------------------------------------------------------------------- local work

    def propose(self, draw: Draw, turn: Turn) -> Payload:
        """Writes, and trains on what was chosen. `last_loss` is the share of completions without a reward."""
        self._begin(turn)
        draw()  # what a round counts for: the prompts are the seed's
        with self._inner_training():
            payload = self._send(turn)
            chosen = self._chosen(payload[TOKENS][0], turn)
            loss = partial(self._policy.loss, chosen)
            for _ in range(int(self.option("inner_steps")) if chosen else 0):
                self._train_on(loss, turn)
            self._losses = []
            self.count("dropped_rounds", self._phase.start_over_unless_finite())
        return payload

    def absorb_gradients(self, turn: Turn) -> bool:
        return False

    def propose_from_grad(self, turn: Turn) -> Payload:
        return Strategy.propose_from_grad(self, turn)

    @property
    def _policy(self) -> Policy:
        if self.policy is None:
            raise ConfigError(
                "sapo needs a task that writes and knows what that is worth (`policy`, see "
                "deploy/examples/arithmetic.py)"
            )
        return self.policy

    def _begin(self, turn: Turn) -> None:
        self._follow(turn)

    def _follow(self, turn: Turn) -> None:
        """What belongs to a replica that was moved to another round has nothing to do with it."""
        if turn.round != self.counters.get("applied", 0) + 1:
            self._phase.forget(self.parameters_in_order())
            self.counters["applied"] = turn.round - 1

    @torch.no_grad()
    def _send(self, turn: Turn) -> Payload:
        """With x_i in the model."""
        tokens_PGC = self._policy.sample(turn.own_seed, *self._shape[:2])
        if tuple(tokens_PGC.shape) != self._shape or int(tokens_PGC.max()) >= self.option("vocabulary"):
            raise ConfigError(
                f"the task writes {tokens_PGC.shape[-1]} tokens, up to {int(tokens_PGC.max())}: set "
                "strategy.length and strategy.vocabulary to what it has"
            )
        return {TOKENS: (tokens_PGC.flatten(),)}

    def _chosen(self, own: Tensor, turn: Turn) -> list[Group]:
        """To be trained on."""
        rng = np.random.Generator(np.random.Philox(key=turn.own_seed))
        mine, rewards_PG = self._groups(turn.own_seed, own)
        self.last_loss = 1.0 - float(rewards_PG.mean())
        heard = [self._groups(seed, tokens)[0] for seed, (tokens,) in self._heard.items()]
        by_peer = [[groups[i] for i in rng.permutation(len(groups))] for groups in heard if groups]
        by_peer = [by_peer[i] for i in rng.permutation(len(by_peer))]
        in_turns = [g for g in chain.from_iterable(zip_longest(*by_peer)) if g is not None]
        ours = [mine[i] for i in rng.permutation(len(mine))[: int(self.option("own"))]]
        theirs = in_turns[: int(self.option("foreign"))]
        self.count("own", len(ours))
        self.count("foreign", len(theirs))
        return [*ours, *theirs]

    def _groups(self, seed: int, tokens: Tensor) -> tuple[list[Group], Tensor]:
        """Those that say something, and all rewards."""
        tokens_PGC = tokens.view(self._shape)
        rewards_PG = self._policy.rewards(seed, tokens_PGC)
        found = []
        for i, reward_G in enumerate(rewards_PG):
            centred_G = reward_G - reward_G.mean()
            if float(centred_G.abs().max()) > _LEAST:
                found.append(Group(seed, i, tokens_PGC[i], centred_G / centred_G.std(correction=0)))
        return found, rewards_PG

    @property
    def _heard(self) -> dict[int, tuple[Tensor, ...]]:
        """Seed -> completions of a peer of the last round."""
        first = self.parameters_in_order()[0].tensor
        found: dict[int, tuple[Tensor, ...]] = self.state.get(first, {}).get(_HEARD, {})
        return found

    # --------------------------------------------------------------------------------- replicated work

    def check(self, payload: Payload, turn: Turn) -> None:
        refuse_names(payload, [TOKENS])
        packed, (field_,) = payload[TOKENS], self.fields()[TOKENS]
        if len(packed) != 1 or packed[0].dtype != torch.uint8 or packed[0].shape != (field_.n_elements,):
            raise BadPayload("shape", f"{field_.n_elements} tokens are expected")
        if int(packed[0].max()) >= self.option("vocabulary"):
            raise BadPayload("range", f"token {int(packed[0].max())} of {self.option('vocabulary')}")

    def apply(self, shares: Sequence[Share], turn: Turn, own: Own) -> None:
        """Changes no parameter: what others have written waits for the next round's work."""
        self._follow(turn)
        others = [share for share in shares if share.seed != turn.own_seed][:MOST_HEARD]
        first = self.parameters_in_order()[0].tensor
        self.state[first][_HEARD] = {share.seed: share.payload[TOKENS] for share in others}
        self.counters["applied"] = turn.round
