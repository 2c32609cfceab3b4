"""Invitations: a coordinator's word, signed, that so many identities may come into its run.

An invitation stands in a ticket in the place of the access token, and the coordinator keeps none: it knows
its own signature again, and those of the founder and of the seats of its committee. How often one was used,
the ledger says.

"inv1-" + base64url(msgpack [name, uses, expiry, nonce, signature]). Signed are the words "thinwire
invitation", a zero byte, and msgpack [run id, name, uses, expiry, nonce].
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Final, Self

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError

from ....compression.errors import ConfigError
from ..identity import is_signed_by
from ..messages import BadMessage, Record, Signature, decode_record, digest_of, encode_record

PREFIX: Final = "inv1-"
MAX_CHARS: Final = 200
"""Of the text: what fits into the place of a token."""

MAX_USES: Final = 2**16
_DOMAIN: Final = b"thinwire invitation\0"
_NONCE_BYTES: Final = 8
_TOLD_BYTES: Final = 6
_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$"


class Invitation(Record):
    """`uses`: identities that it lets in; `expires_s`: seconds since 1970, 0: never; `nonce`: no two
    invitations are the same."""

    name: Annotated[str, Field(pattern=_NAME)]
    uses: Annotated[int, Field(ge=1, le=MAX_USES)]
    expires_s: Annotated[int, Field(ge=0, lt=2**40)]
    nonce: Annotated[bytes, Field(min_length=_NONCE_BYTES, max_length=_NONCE_BYTES)]
    signature: Signature

    @classmethod
    def make(
        cls, key: Ed25519PrivateKey, run_id: bytes, name: str, uses: int, expires_s: int, nonce: bytes
    ) -> Self:
        """Signed with the coordinator's key. Raises ConfigError for a name or number that it cannot have."""
        try:
            plain = cls(name=name, uses=uses, expires_s=expires_s, nonce=nonce, signature=bytes(64))
        except ValidationError as e:
            raise ConfigError(_wrong(name, uses)) from e
        return plain.model_copy(update={"signature": key.sign(plain._signed(run_id))})

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `text` gave; its signature is not checked. Raises ConfigError, and nothing else."""
        if not is_invitation(text) or len(text) > MAX_CHARS:
            raise ConfigError(f"this is no invitation: one starts with {PREFIX}")
        body = text.removeprefix(PREFIX)
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            return decode_record(cls, data)
        except (binascii.Error, ValueError, BadMessage) as e:
            raise ConfigError("the invitation is damaged: copy the whole ticket again") from e

    def text(self) -> str:
        """As it stands in a ticket."""
        return PREFIX + base64.urlsafe_b64encode(encode_record(self)).decode().rstrip("=")

    def is_of(self, run_id: bytes, coordinator: str) -> bool:
        """Whether the coordinator of this run, by its peer id, has signed it."""
        return is_signed_by(coordinator, self.signature, self._signed(run_id))

    def in_ledger(self, run_id: bytes) -> str:
        """How admissions name it: two invitations of one name differ."""
        return f"{self.name}#{digest_of(self._signed(run_id))[:_TOLD_BYTES].hex()}"

    def is_over(self, now_s: float) -> bool:
        """`now_s`: seconds since 1970."""
        return 0 < self.expires_s <= now_s

    def _signed(self, run_id: bytes) -> bytes:
        fields = [run_id, self.name, self.uses, self.expires_s, self.nonce]
        packed: bytes = msgpack.packb(fields, use_bin_type=True)
        return _DOMAIN + packed


def is_invitation(text: str) -> bool:
    """Whether `text`, from the place of a token, means to be one."""
    return text.startswith(PREFIX)


def _wrong(name: str, uses: int) -> str:
    if not 1 <= uses <= MAX_USES:
        return f"an invitation lets in 1 to {MAX_USES} identities, not {uses}"
    return (
        f"{name[:60]!r} is no name for an invitation: up to 40 letters, digits and . _ - are, and a "
        f"letter or digit is the first, as in lab-7"
    )
