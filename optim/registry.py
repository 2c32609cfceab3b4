"""Strategies and compressors by name, built from the plain dict that a run's config and record 0 hold.

    {"name": "decoupled", "lr": 3e-3, "beta": 0.95, "compressor": {"name": "dct_topk", "k": 32}}
    {"name": "spsa", "lr": 1e-6, "eps": 1e-3, "probes": 16}

The options of a strategy are the fields of its dataclass, those of a compressor the keyword arguments of its
class. A new strategy or compressor is one file and one row here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, Final

from ..compression.base import Compressor
from ..compression.errors import ConfigError
from .base import NamedParameters, Strategy
from .options import REQUIRED, nearest


def decoupled() -> type[Strategy]:
    from .decoupled import Decoupled

    return Decoupled


def diloco() -> type[Strategy]:
    from .diloco import Diloco

    return Diloco


def spsa() -> type[Strategy]:
    from .spsa import Spsa

    return Spsa


STRATEGIES: Final[Mapping[str, Callable[[], type[Strategy]]]] = {
    "decoupled": decoupled,
    "diloco": diloco,
    "spsa": spsa,
}
"""Rows load a strategy's module when they are called, not before."""

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


def strategy_class(name: object) -> type[Strategy]:
    """The class of a strategy, with what there is to know before one is built. Raises ConfigError for an
    unknown name, with the nearest known one."""
    return STRATEGIES[_known("strategy", name, STRATEGIES)]()


def build_strategy(config: Mapping[str, Any], named_parameters: NamedParameters) -> Strategy:
    """Raises ConfigError for what is unknown (with the nearest known name), missing or out of range."""
    options = complete_config(config)
    build: Callable[..., Strategy] = strategy_class(options.pop("name"))
    if "compressor" in options:
        options["compressor"] = build_compressor(options["compressor"])
    return build(named_parameters, **options)


def build_compressor(config: Mapping[str, Any]) -> Compressor:
    """As `build_strategy`, for {"name": "dct_topk", "k": 32, ...}."""
    options = _complete_compressor(config)
    name = options.pop("name")
    try:
        compressor: Compressor = _compressor_class(name)(**options)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"compressor {name}: {e}") from e
    return compressor


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every default spelled out, so that a later version's defaults change no run.

    Values are not checked yet: `build_strategy` does. Raises ConfigError for unknown and missing names.
    """
    name = _name_in("strategy", config, STRATEGIES)
    defaults = strategy_class(name).facts.options.defaults()
    if "compressor" in defaults:
        defaults["compressor"] = DEFAULT_COMPRESSOR
    options = _complete("strategy", name, config, defaults)
    if "compressor" in options:
        compressor = options["compressor"]
        if not isinstance(compressor, Mapping):
            raise ConfigError(f"compressor = {compressor!r}: write a table, {DEFAULT_COMPRESSOR}")
        options["compressor"] = _complete_compressor(compressor)
    return options


def _complete_compressor(config: Mapping[str, Any]) -> dict[str, Any]:
    name = _name_in("compressor", config, COMPRESSORS)
    signature = inspect.signature(_compressor_class(name))
    defaults = {
        p.name: REQUIRED if p.default is p.empty else p.default for p in signature.parameters.values()
    }
    return _complete("compressor", name, config, defaults)


def _complete(what: str, name: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults`: of every option; `REQUIRED` for one that must be given."""
    for key in config.keys() - {"name"}:
        if key not in defaults:
            raise ConfigError(f"{what} {name} has no option {key!r}: {nearest(key, defaults)}")
    merged = {key: config.get(key, default) for key, default in defaults.items()}
    missing = [key for key, value in merged.items() if value is REQUIRED]
    if missing:
        raise ConfigError(f"{what} {name} needs {', '.join(missing)}")
    return {"name": name, **merged}


def _name_in(what: str, config: Mapping[str, Any], known: Iterable[str]) -> str:
    if "name" not in config:
        raise ConfigError(f"a {what} needs a name: one of {', '.join(sorted(known))}")
    return _known(what, config["name"], known)


def _known(what: str, name: object, known: Iterable[str]) -> str:
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"unknown {what} {name!r}: {nearest(name, known)}")
    return name


def _compressor_class(name: str) -> Any:
    return _load(COMPRESSORS[_known("compressor", name, COMPRESSORS)])


@cache
def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)
