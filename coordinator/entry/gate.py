"""The gate of a run: who may come in, by the token, by an invitation, or because it is known."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, cast

from ...compression.errors import ConfigError
from ..ledger import Ledger
from ..protocol.messages import AccessEntry, Rejected, digest_of
from ..protocol.trust.invitation import Invitation, is_invitation
from .rates import Bucket, Rate
from .rules import EntryRules, Mode

ASK = "thinwire invite STATE --name NAME makes one, on the coordinator's machine"
NEWCOMERS: Final = Rate(0.5, 1024.0)
"""Identities that come with the token: a run has room for 65,536 of them in all its time."""

WRONG_TOKEN = "the ticket's token is wrong: ask for a new ticket"
BANNED = "this peer was banned from the run: ask whoever runs the coordinator"


class Gate:
    """`token`: of the run's tickets; `banned`: peer ids; `wall_ms`: the time by which invitations end;
    `rejected` counts by reason. `access`: as the ledger has it, where a record tells: then it is that, for
    all seats alike, and the others count for nothing."""

    def __init__(
        self,
        ledger: Ledger,
        token: str,
        banned: Iterable[str],
        rules: EntryRules,
        wall_ms: Callable[[], int],
        rejected: Counter[Rejected],
        access: AccessEntry | None = None,
    ) -> None:
        self._ledger, self._rules, self._wall_ms, self._rejected = ledger, rules, wall_ms, rejected
        self._token = digest_of(_bytes(token))
        self._newcomers = Bucket(NEWCOMERS, wall_ms() / 1000)
        self.banned = frozenset(banned)
        if access is not None:
            self.follow(access)

    @property
    def mode(self) -> str:
        """See `EntryRules`."""
        return self._rules.mode

    def change_token(self, token: str) -> None:
        """The one before lets nobody in any more who is not in already."""
        self._token = digest_of(_bytes(token))

    def change_rules(self, rules: EntryRules) -> None:
        """Who is in already stays."""
        self._rules = rules

    @property
    def access(self) -> AccessEntry:
        """All of this, as a record has it."""
        listed = tuple(sorted(self._rules.peers))
        banned = tuple(sorted(self.banned))
        return AccessEntry(token=self._token, mode=self._rules.mode, banned=banned, listed=listed)

    def follow(self, access: AccessEntry) -> None:
        """What a record says."""
        self._token, self.banned = access.token, frozenset(access.banned)
        self._rules = EntryRules(cast("Mode", access.mode), frozenset(access.listed))

    def check(self, peer_id: str, shown: str) -> str:
        """`shown`: from the peer's ticket. Returns the invitation, as admissions name it; "": it needs none.

        Who was let in before needs to show nothing: the transport has proved who it is. So tokens change and
        invitations end while nodes train. Raises ConfigError.
        """
        if peer_id in self.banned:
            raise self._refused("banned", BANNED)
        if self._rules.mode == "listed":
            if peer_id not in self._rules.peers:
                raise self._refused("uninvited", _not_listed(peer_id))
            return ""
        if self._ledger.index_of(peer_id) is not None:
            return ""
        if is_invitation(shown):
            return self._by_invitation(shown)
        if self._rules.mode == "invited":
            text = "this run takes invited peers only, and the ticket holds no invitation: ask for one"
            raise self._refused("uninvited", f"{text} ({ASK})")
        if not self._is_token(shown):
            raise self._refused("token", WRONG_TOKEN)
        return ""

    def newcomer(self) -> None:
        """One is about to come in by the token. Raises ConfigError: there are too many of them."""
        if not self._newcomers.take(1, self._wall_ms() / 1000):
            raise self._refused("rate", "too many new identities come with the run's ticket: try again later")

    def check_looker(self, shown: str) -> None:
        """Somebody with this token, or invitation (used up, too), asks for the status. Raises ConfigError."""
        if is_invitation(shown):
            self._in_time(shown)
        elif not self._is_token(shown):
            raise self._refused("token", WRONG_TOKEN)

    def _is_token(self, shown: str) -> bool:
        return hmac.compare_digest(digest_of(_bytes(shown)), self._token)

    def _by_invitation(self, shown: str) -> str:
        invitation = self._in_time(shown)
        name = invitation.in_ledger(self._ledger.run_id)
        if self._ledger.invited.uses(name) >= invitation.uses:
            raise self._refused("uninvited", _used_up(invitation))
        return name

    def _in_time(self, shown: str) -> Invitation:
        try:
            return self._signed(shown)
        except ConfigError as e:
            raise self._refused("uninvited", str(e)) from e

    def _signed(self, shown: str) -> Invitation:
        """One of this run's, in time. Raises ConfigError."""
        invitation = Invitation.parse(shown)
        signers = {self._ledger.genesis.coordinator, *self._ledger.committee.seats}
        if not any(invitation.is_of(self._ledger.run_id, signer) for signer in signers):
            text = "the invitation was not signed by this run's coordinator for this run"
            raise ConfigError(f"{text}: ask for a new one ({ASK})")
        if invitation.is_over(self._wall_ms() / 1000):
            raise ConfigError(f"the invitation {invitation.name} has expired: ask for a new one ({ASK})")
        return invitation

    def _refused(self, reason: Rejected, text: str) -> ConfigError:
        self._rejected[reason] += 1
        return ConfigError(text)


def _not_listed(peer_id: str) -> str:
    return (
        f"this run takes listed peers only, and {peer_id} is not among them: whoever runs the coordinator "
        f"can name it (thinwire run STATE listed PEER ..., with all the others), or open the run"
    )


def _used_up(invitation: Invitation) -> str:
    who = "1 identity, which has" if invitation.uses == 1 else f"{invitation.uses} identities, which have"
    return (
        f"the invitation {invitation.name} lets in {who} come with it: start the node with the --state "
        f"folder that it had before, or ask for a new one ({ASK})"
    )


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")
