"""What users import who train from a loop of their own: names that stay, whichever modules they come from.

    from thinwire.node.loop.api import join

    with join(ticket, model, batches, loss) as swarm:  # the model has the swarm's weights now
        for outcome in swarm:                          # one agreed round each, until the run is over
            print(outcome.round, outcome.loss, outcome.peers, outcome.lr)

`model` is any module, `batches` any iterable (a DataLoader, say), `loss(model, batch)` gives a mean loss. The
run's strategy decides what a round's local work is (gradients of some batches, inner steps of an optimizer,
probes), so it calls `loss`; there is no optimizer, no `backward()` and no gradient of one's own. In the body
of the loop the model is the replica after `outcome.round`, to be evaluated, logged, saved, but not changed;
this node's offer for the next round is under way meanwhile. `break`, an exception and Ctrl-C leave the swarm
cleanly.

- `join` takes part in a run, as `Swarm`; `Outcome` is what a round came to.
- `host` starts a coordinator for a model of one's own, in this process, as `Host`. `thinwire coordinator
  --task package.module:function` starts one in a process of its own; the nodes are the same.
- `load_weights`: the newest weights of a state folder into a model, when nobody serves the run any more.

Importing this loads torch, and no backend. What is not named here may move from one version to the next.
"""

from __future__ import annotations

from .host import Host, host
from .join import join
from .swarm import Outcome, Swarm
from .weights import load_weights

__all__ = ["Host", "Outcome", "Swarm", "host", "join", "load_weights"]
