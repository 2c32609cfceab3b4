"""What users of strategies import: names that stay, whichever modules they come from.

In a training loop, alone or under torchrun; every keyword is a field of the strategy's options:

    from thinwire.optim.api import Spsa, group_optimizer

    optimizer = Spsa(model.named_parameters(), lr=1e-6)
    optimizer = group_optimizer({"name": "decoupled", "lr": 3e-3}, model.named_parameters())
    loss = optimizer.step(lambda: loss_of(model, batch))

- `Decoupled`, `Diloco`, `Spsa`, `Subspace`: the strategies, and `DecoupledOptions`, `DilocoOptions`,
  `SpsaOptions`, `SubspaceOptions`: their options, with types, bounds and defaults.
- `build_strategy`, `complete_config`: from the table of a run's `[strategy]`; `strategy_class`, `STRATEGIES`:
  which there are. `build_compressor`: from a table such as {"name": "dct_topk", "k": 32}.
- `group_optimizer`, `join_group`, `verify_group`: over a `torch.distributed` process group.
- For a strategy of one's own: `Strategy`, what it is called with (`NamedParameters`, `Parameter`, `Draw`,
  `Closure`, `Turn`, `Share`, `Round`, `Own`, `Payload`, `Allotment`), and what describes it (`Facts`,
  `KnownUpdate`, `Options`, `Number`, `Whole`, `keywords_of`).

Importing this loads torch, and no backend. What is not named here may move from one version to the next.
"""

from __future__ import annotations

from ..compression.base import Payload, Turn
from ..compression.registry import build_compressor
from .base import Allotment, Closure, Draw, NamedParameters, Own, Parameter, Round, Share, Strategy
from .decoupled import Decoupled, DecoupledOptions
from .diloco import Diloco, DilocoOptions
from .facts import Facts, KnownUpdate
from .group import group_optimizer, join_group, verify_group
from .options import Number, Options, Whole, keywords_of
from .registry import STRATEGIES, build_strategy, complete_config, strategy_class
from .spsa import Spsa, SpsaOptions
from .subspace import Subspace, SubspaceOptions

__all__ = [
    "STRATEGIES",
    "Allotment",
    "Closure",
    "Decoupled",
    "DecoupledOptions",
    "Diloco",
    "DilocoOptions",
    "Draw",
    "Facts",
    "KnownUpdate",
    "NamedParameters",
    "Number",
    "Options",
    "Own",
    "Parameter",
    "Payload",
    "Round",
    "Share",
    "Spsa",
    "SpsaOptions",
    "Strategy",
    "Subspace",
    "SubspaceOptions",
    "Turn",
    "Whole",
    "build_compressor",
    "build_strategy",
    "complete_config",
    "group_optimizer",
    "join_group",
    "keywords_of",
    "strategy_class",
    "verify_group",
]
