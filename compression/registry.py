"""Compressors by name, built from the plain dict that a run's config and record 0 hold.

    {"name": "dct_topk", "k": 32, "group_size": 4096, "bits": 8}

The options are the keyword arguments of the class. A new compressor is one file in codecs/, one row here and
one row of the contract suite.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from .base import Compressor
from .codecs.dct_topk import DctTopK
from .codecs.dense import Dense
from .codecs.none import Nothing
from .codecs.random_k import RandomK
from .codecs.slicing import Slicing
from .codecs.striding import Striding
from .codecs.topk import TopK
from .errors import ConfigError, nearest

# All of them are cheap to import: kernels load when they are needed.
COMPRESSORS: Final[Mapping[str, type[Compressor]]] = {
    "dct_topk": DctTopK,
    "dense": Dense,
    "none": Nothing,
    "random_k": RandomK,
    "slicing": Slicing,
    "striding": Striding,
    "topk": TopK,
}

DEFAULT_COMPRESSOR: Final = {"name": "dct_topk"}


NEW_RUNS: Final[Mapping[str, Mapping[str, Any]]] = {"dct_topk": {"indices": "rice"}}
"""Options that new runs have at other values than the defaults: those are what older ledgers mean."""


def compressor_of_new_run(
    config: Mapping[str, Any], recorded: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """The same with `NEW_RUNS` where it says nothing. `recorded`: what record 0 holds of a run that is gone
    on with, and stands. What is no compressor stays what it is."""
    name = config.get("name") if isinstance(config, Mapping) else None
    known = NEW_RUNS.get(name, {}) if isinstance(name, str) else {}
    if recorded is not None:
        known = {key: recorded[key] for key in known if key in recorded and recorded["name"] == name}
    return {**known, **config} if known else config


def build_compressor(config: Mapping[str, Any]) -> Compressor:
    """Raises ConfigError for what is unknown (with the nearest known name), missing or out of range."""
    options = complete_compressor(config)
    name = options.pop("name")
    try:
        return COMPRESSORS[name](**options)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"compressor {name}: {e}") from e


def complete_compressor(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every default spelled out; values are not checked yet.

    Raises ConfigError for a name or options that are unknown or missing.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"compressor = {config!r}: write a table, {DEFAULT_COMPRESSOR}")
    if "name" not in config:
        raise ConfigError(f"a compressor needs a name: one of {', '.join(sorted(COMPRESSORS))}")
    name = config["name"]
    if not isinstance(name, str) or name not in COMPRESSORS:
        raise ConfigError(f"unknown compressor {name!r}: {nearest(name, COMPRESSORS)}")
    known = {p.name: p.default for p in inspect.signature(COMPRESSORS[name]).parameters.values()}
    for key in config.keys() - {"name"}:
        if key not in known:
            raise ConfigError(f"compressor {name} has no option {key!r}: {nearest(key, known)}")
    options = {key: config.get(key, default) for key, default in known.items()}
    if missing := [key for key, value in options.items() if value is inspect.Parameter.empty]:
        raise ConfigError(f"compressor {name} needs {', '.join(missing)}")
    return {"name": name, **options}
