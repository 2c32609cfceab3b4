"""What users of compressors import: names that stay, whichever modules they come from.

    from thinwire.compression.api import DctTopK, Part, Turn

    compressor, part = DctTopK(k=32, bits=8), Part.whole(x.shape)
    turn = Turn(round=1, shared_seed=1, own_seed=2, lr_factor=1.0)
    packed = compressor.pack(x.flatten(), part, turn)
    compressor.check(packed, part, turn)                        # raises BadPayload
    mean = compressor.decode([packed], [1.0], part, turn)       # the same bits on every device

- `DctTopK`, `TopK`, `RandomK`, `Striding`, `Slicing`, `Dense`, `Nothing`: the compressors;
  `build_compressor`: from a table such as {"name": "dct_topk", "k": 32}; `COMPRESSORS`: which there are.
- `encode_payload`, `decode_payload`, `layout_hash`, `max_bytes_of`: payloads as bytes, with a checksum.
- `fingerprint` of `parameter_sums`: eight bytes that tell whether replicas agree.
- For a compressor of one's own: `Compressor`, what it is called with (`Part`, `Turn`, `Source`, `Target`,
  `Step`, `Change`, `Reduce`) and what it makes (`Field`, `Fields`, `Packed`, `Payload`, `PendingPacks`,
  `Entries`).
- `ThinwireError`, `ConfigError`, `BadPayload` and its `BadReason`: what is raised.

Importing this loads torch, and no backend. What is not named here may move from one version to the next.
"""

from __future__ import annotations

from .base import (
    Change,
    Compressor,
    Entries,
    Field,
    Fields,
    Packed,
    Part,
    Payload,
    PendingPacks,
    Reduce,
    Source,
    Step,
    Target,
    Turn,
)
from .codecs.dct_topk import DctTopK
from .codecs.dense import Dense
from .codecs.none import Nothing
from .codecs.random_k import RandomK
from .codecs.slicing import Slicing
from .codecs.striding import Striding
from .codecs.topk import TopK
from .errors import BadPayload, BadReason, ConfigError, ThinwireError
from .fingerprint import fingerprint, parameter_sums
from .registry import COMPRESSORS, build_compressor
from .wire import decode as decode_payload
from .wire import encode as encode_payload
from .wire import layout_hash, max_bytes_of

__all__ = [
    "COMPRESSORS",
    "BadPayload",
    "BadReason",
    "Change",
    "Compressor",
    "ConfigError",
    "DctTopK",
    "Dense",
    "Entries",
    "Field",
    "Fields",
    "Nothing",
    "Packed",
    "Part",
    "Payload",
    "PendingPacks",
    "RandomK",
    "Reduce",
    "Slicing",
    "Source",
    "Step",
    "Striding",
    "Target",
    "ThinwireError",
    "TopK",
    "Turn",
    "build_compressor",
    "decode_payload",
    "encode_payload",
    "fingerprint",
    "layout_hash",
    "max_bytes_of",
    "parameter_sums",
]
