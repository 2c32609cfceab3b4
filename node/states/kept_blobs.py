"""Blobs of the run that a node keeps in its state folder: they need not come over the network again, and
without a network the folder can be exported."""

from __future__ import annotations

import logging
from pathlib import Path

from ...coordinator.protocol.files import write_aside
from ...coordinator.protocol.messages import BlobRef
from ..links.base import Link
from .opening import BLOBS, read_blob

log = logging.getLogger("thinwire.node")


class KeptBlobs:
    """Of one run, in `folder`; None: nothing is kept, every blob is fetched."""

    def __init__(self, link: Link, folder: Path | None) -> None:
        self._link, self._folder = link, None if folder is None else folder / BLOBS

    def has(self, ref: BlobRef) -> bool:
        """Whether it need not be fetched; its bytes are verified when they are read."""
        path = self._path(ref)
        return path is not None and path.is_file()

    def get(self, ref: BlobRef) -> bytes:
        """From the folder, else from the coordinator; then it is kept. Raises what `Link.fetch` raises."""
        data = self._read(ref)
        if data is None:
            data = self._link.fetch(ref.digest, ref.n_bytes)
            self._keep(ref, data)
        return data

    def _read(self, ref: BlobRef) -> bytes | None:
        path = self._path(ref)
        return None if path is None else read_blob(path, ref.digest, ref.n_bytes)

    def _keep(self, ref: BlobRef, data: bytes) -> None:
        path = self._path(ref)
        if path is None:
            return
        try:
            path.parent.mkdir(exist_ok=True)
            write_aside(path, data)
        except OSError as e:
            log.warning("%s cannot be kept, the next start fetches it again: %s", path, e)

    def _path(self, ref: BlobRef) -> Path | None:
        return None if self._folder is None else self._folder / ref.digest.hex()
