"""Strategies and compressors by name, built from the plain dict that a run's config and record 0 hold.

    {"name": "decoupled", "lr": 3e-3, "beta": 0.95, "compressor": {"name": "dct_topk", "k": 32}}
    {"name": "spsa", "lr": 1e-6, "eps": 1e-3, "probes": 16}

The options are the keyword arguments of the class. A new strategy or compressor is one file and one row here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, Final

from ..compression.base import Compressor
from ..compression.errors import ConfigError
from .base import NamedParameters, Strategy
from .options import nearest

# Rows name a class: its module is loaded when it is asked for.
STRATEGIES: Final = {
    "decoupled": "thinwire.optim.decoupled:Decoupled",
    "diloco": "thinwire.optim.diloco:Diloco",
    "spsa": "thinwire.optim.spsa:Spsa",
}
COMPRESSORS: Final = {
    "dct_topk": "thinwire.compression.codecs.dct_topk:DctTopK",
    "dense": "thinwire.compression.codecs.dense:Dense",
    "none": "thinwire.compression.codecs.none:Nothing",
    "random_k": "thinwire.compression.codecs.random_k:RandomK",
    "slicing": "thinwire.compression.codecs.slicing:Slicing",
    "striding": "thinwire.compression.codecs.striding:Striding",
    "topk": "thinwire.compression.codecs.topk:TopK",
}
DEFAULT_COMPRESSOR: Final = {"name": "dct_topk"}


def build_strategy(config: Mapping[str, Any], named_parameters: NamedParameters) -> Strategy:
    """Raises ConfigError for what is unknown (with the nearest known name), missing or out of range."""
    options = complete_config(config)
    kind = _class_of("strategy", options.pop("name"), STRATEGIES)
    if "compressor" in options:
        options["compressor"] = build_compressor(options["compressor"])
    strategy: Strategy = kind(named_parameters, **options)
    return strategy


def build_compressor(config: Mapping[str, Any]) -> Compressor:
    """As `build_strategy`, for {"name": "dct_topk", "k": 32, ...}."""
    options = _complete("compressor", config, COMPRESSORS)
    name = options.pop("name")
    try:
        compressor: Compressor = _class_of("compressor", name, COMPRESSORS)(**options)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"compressor {name}: {e}") from e
    return compressor


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every default spelled out, so that a later version's defaults change no run.

    Values are not checked yet: `build_strategy` does.
    """
    options = _complete("strategy", config, STRATEGIES)
    if "compressor" in options:
        compressor = options["compressor"]
        if not isinstance(compressor, Mapping):
            raise ConfigError(f"compressor = {compressor!r}: write a table, {DEFAULT_COMPRESSOR}")
        options["compressor"] = _complete("compressor", compressor, COMPRESSORS)
    return options


def _complete(what: str, config: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    if "name" not in config:
        raise ConfigError(f"a {what} needs a name: one of {', '.join(sorted(table))}")
    name = config["name"]
    known = _options_of(what, name, table)
    for key in config.keys() - {"name"}:
        if key not in known:
            raise ConfigError(f"{what} {name} has no option {key!r}: {nearest(key, known)}")
    merged = {key: config.get(key, default) for key, default in known.items()}
    missing = [key for key, value in merged.items() if value is inspect.Parameter.empty]
    if missing:
        raise ConfigError(f"{what} {name} needs {', '.join(missing)}")
    return {"name": name, **merged}


def _options_of(what: str, name: str, table: Mapping[str, str]) -> dict[str, Any]:
    """Option -> default, as the class spells them; `Parameter.empty` for one that must be given."""
    signature = inspect.signature(_class_of(what, name, table))
    options = {p.name: p.default for p in signature.parameters.values() if p.name != "named_parameters"}
    if "compressor" in options:
        options["compressor"] = DEFAULT_COMPRESSOR
    return options


def _class_of(what: str, name: str, table: Mapping[str, str]) -> Any:
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"unknown {what} {name!r}: {nearest(name, table)}")
    return _load(table[name])


@cache
def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)
