"""The commands about who may take part in a run. What they do is loaded when they run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..system.output import to_stdout
from .arguments import optional


@dataclass
class Invite:
    """Make a ticket that lets in so many identities, and no more: for a run that strangers may join.

      thinwire invite STATE --name lab-7                     for one machine
      thinwire invite STATE --name course --uses 30 --expires 7d

    It is signed with the coordinator's key, so that the coordinator need not run, nor hear of it. The ledger
    names it where it lets somebody in, and its uses are counted there. Who came with it comes back without
    using it again. In the run file, [admission] mode = "invited" lets in nobody else.
    """

    state: Annotated[Positional[Path], arg(metavar="STATE")]
    """The coordinator's state folder."""
    name: Annotated[str, arg(metavar="NAME")]
    """Whom it is for: letters, digits and . _ -, at most 40."""
    uses: Annotated[int, arg(metavar="N")] = 1
    """Identities that it lets in."""
    expires: Annotated[str, arg(metavar="TIME")] = "forever"
    """How long it lets anybody in: 12h, 7d, forever. Who is in stays."""

    def run(self) -> int:
        from .inviting import invitation

        to_stdout(invitation(self.state, self.name, self.uses, self.expires))
        return 0


@dataclass
class Identity:
    """Print the peer id of this machine's node: what [admission] peers of a run file lists.

    It is that of the node that `thinwire join` would start now: its key is made if it has none.
    """

    state: Annotated[Positional[Path | None], optional(metavar="STATE")] = None
    """The node's state folder (its --state). Default: as for thinwire join, the first of
    ~/.local/state/thinwire/node-0, node-1, ... that no node uses now."""

    def run(self) -> int:
        from .inviting import identity

        to_stdout(identity(self.state))
        return 0
