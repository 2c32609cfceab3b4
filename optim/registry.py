"""Strategies by name, built from the plain dict that a run's config and record 0 hold.

    {"name": "decoupled", "lr": 3e-3, "beta": 0.95, "compressor": {"name": "dct_topk", "k": 32}}
    {"name": "spsa", "lr": 1e-6, "eps": 1e-3, "probes": 16}

The options of a strategy are the fields of its dataclass. A new strategy is one file and one row here;
compressors stand in compression/registry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from ..compression.errors import ConfigError, nearest
from ..compression.registry import (
    DEFAULT_COMPRESSOR,
    build_compressor,
    complete_compressor,
    compressor_of_new_run,
)
from .base import NamedParameters, Strategy
from .decoupled import Decoupled
from .diloco import Diloco
from .gossip.strategy import Gossip
from .options import REQUIRED
from .sapo import Sapo
from .spsa import Spsa
from .subspace import Subspace

# All of them are cheap to import: kernels load when they are needed.
STRATEGIES: Final[Mapping[str, type[Strategy]]] = {
    "decoupled": Decoupled,
    "diloco": Diloco,
    "gossip": Gossip,
    "sapo": Sapo,
    "spsa": Spsa,
    "subspace": Subspace,
}

MAX_LR: Final = 100.0
"""What a plain gradient step of a tiny model may still want."""


def strategy_class(name: object) -> type[Strategy]:
    """The class of a strategy, with what there is to know before one is built. Raises ConfigError for an
    unknown name, with the nearest known one."""
    if not isinstance(name, str) or name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}: {nearest(name, STRATEGIES)}")
    return STRATEGIES[name]


def has_compressor(name: object) -> bool:
    """Whether payloads of this strategy are a compressor's. Raises ConfigError."""
    return "compressor" in strategy_class(name).facts.options.defaults()


def build_strategy(config: Mapping[str, Any], named_parameters: NamedParameters) -> Strategy:
    """Raises ConfigError for what is unknown (with the nearest known name), missing or out of range."""
    options = complete_config(config)
    build: Callable[..., Strategy] = strategy_class(options.pop("name"))
    if "compressor" in options:
        options["compressor"] = build_compressor(options["compressor"])
    return build(named_parameters, **options)


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every default spelled out, so that a later version's defaults change no run.

    Values are not checked yet: `build_strategy` does. Raises ConfigError for unknown and missing names.
    """
    if "name" not in config:
        raise ConfigError(f"a strategy needs a name: one of {', '.join(sorted(STRATEGIES))}")
    name = config["name"]
    facts = strategy_class(name).facts
    defaults = facts.options.defaults()
    if "compressor" in defaults:
        defaults["compressor"] = facts.compressor or DEFAULT_COMPRESSOR
    options = _complete(name, config, defaults)
    if "compressor" in options:
        options["compressor"] = complete_compressor(options["compressor"])
    return options


def recorded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`complete_config`, as record 0 has it: without what is not used (`Facts.only_with`)."""
    whole, facts = complete_config(config), strategy_class(config["name"]).facts
    defaults = facts.options.defaults()
    unused = {key: others for key, others in facts.only_with.items() if whole[key] == defaults[key]}
    left_out = {*unused, *(other for others in unused.values() for other in others)}
    return {key: value for key, value in whole.items() if key not in left_out}


def of_new_run(config: Mapping[str, Any], recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The same with `Facts.in_runs` where it says nothing. `recorded`: what record 0 holds of a run that is
    gone on with, and stands; options that it does not know are what they are by default. Raises
    ConfigError."""
    known = strategy_class(config.get("name")).facts.in_runs
    if "compressor" in config:
        its_record = None if recorded is None else recorded.get("compressor")
        config = {**config, "compressor": compressor_of_new_run(config["compressor"], its_record)}
    if recorded is not None:
        return {**{name: recorded[name] for name in known if name in recorded}, **config}
    values: dict[str, Any] = {}
    for name, value in known.items():
        whole = complete_config({**values, **config})
        values[name] = config[name] if name in config else value(whole) if callable(value) else value
    return {**values, **config}


def complete_new_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """What record 0 of a new run holds, but for what its other sections decide. Raises ConfigError."""
    return complete_config(of_new_run(config))


def _complete(name: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults`: of every option; `REQUIRED` for one that must be given."""
    for key in config.keys() - {"name"}:
        if key not in defaults:
            raise ConfigError(f"strategy {name} has no option {key!r}: {nearest(key, defaults)}")
    merged = {key: config.get(key, default) for key, default in defaults.items()}
    missing = [key for key, value in merged.items() if value is REQUIRED]
    if missing:
        raise ConfigError(f"strategy {name} needs {', '.join(missing)}")
    return {"name": name, **merged}


def refuse_unlikely(config: Mapping[str, Any]) -> None:
    """Of what nobody means: a slip of the hand. For new runs and changes; ledgers hold what they hold.
    Raises ConfigError with the range."""
    lr = config.get("lr")
    if isinstance(lr, int | float) and not 0 <= lr <= MAX_LR:
        raise ConfigError(f"strategy.lr = {lr:g}: between 0 and {MAX_LR:g}, e.g. 3e-3 (spsa: 1e-6 to 3e-3)")


def check_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Whether a run may give these options other values while it trains. Raises ConfigError, with those that
    can be changed."""
    if not changes:
        return
    facts = strategy_class(config.get("name")).facts
    for name in changes:
        if name not in config and name not in facts.options.defaults():
            raise ConfigError(f"unknown key 'strategy.{name}'; {nearest(name, facts.changeable)}")
        if name not in facts.changeable:
            known = ", ".join(f"strategy.{option}" for option in facts.changeable)
            raise ConfigError(
                f"strategy.{name} stands in record 0 and cannot change. What can: {known}. For the rest "
                f"start a new run."
            )
    refuse_unlikely(changes)
    facts.options.check(complete_config({**config, **changes}))
