"""`thinwire config --reference`: every key of a run file as a page, made from the classes that check them.

The meaning of a key is the docstring below its field, so that page and code cannot say different things.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ...compression.registry import COMPRESSORS, DEFAULT_COMPRESSOR, compressor_of_new_run
from ...optim.options import REQUIRED, Number, Whole
from ...optim.registry import STRATEGIES, of_new_run, strategy_class
from ..config import RunConfig, is_section
from .docstrings import meanings
from .toml import toml_value

HEAD = """\
# Every key of a run file

`thinwire config --reference` prints this page; it is made from the code that checks run files. A file to
begin with comes from `thinwire init`. What the command line says (`--set section.key=value`) goes before the
environment (`THINWIRE_SECTION__KEY`), that before the file, and that before the default. Defaults are those
of new runs; a strategy's may depend on its compressor ([strategies.md](strategies.md)): here it has the one
that it has by default. A run keeps what its record 0 says. A key that is not here is refused.
"""

NEEDED = "must be given"
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}


@dataclass(frozen=True, slots=True)
class Key:
    """A line of the page. `default`: as in TOML, or in words; `range`: "" where the type says all."""

    name: str
    type: str
    default: str
    range: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a run file; `title` as it stands there, and of which kind, if there are several."""

    title: str
    meaning: str
    keys: tuple[Key, ...]


def reference() -> str:
    """The page, in Markdown."""
    return HEAD + "".join(_markdown(table) for table in tables())


def tables() -> Iterator[Table]:
    """All tables of a run file, in the order of its classes."""
    for name, field in RunConfig.model_fields.items():
        if name == "strategy":
            yield from _strategies()
            yield from _compressors()
        else:
            yield from _section(name, section_of(field.annotation))


def section_of(annotation: Any) -> type[BaseModel]:
    """The class of a table, be it optional."""
    found: list[type[BaseModel]] = [a for a in (annotation, *get_args(annotation)) if is_section(a)]
    return found[0]


def _section(title: str, kind: type[BaseModel]) -> Iterator[Table]:
    keys, inner, texts = [], [], meanings(kind)
    for name, field in kind.model_fields.items():
        if any(is_section(a) for a in (field.annotation, *get_args(field.annotation))):
            inner.append((f"{title}.{name}", section_of(field.annotation)))
            continue
        default = NEEDED if field.default is PydanticUndefined else toml_value(field.default)
        bounds = _bounds(field.metadata)
        keys.append(Key(name, type_in_words(field.annotation), default, bounds, texts.get(name, "")))
    yield Table(f"[{title}]", " ".join((kind.__doc__ or "").split()), tuple(keys))
    for name, section in inner:
        yield from _section(name, section)


def _strategies() -> Iterator[Table]:
    for name, strategy in STRATEGIES.items():
        options = strategy.facts.options
        hints, texts = get_type_hints(options, include_extras=True), meanings(options)
        about = " ".join((inspect.getdoc(inspect.getmodule(strategy)) or "").split("\n\n")[0].split())
        of_new_runs = _of_new_runs(name)
        yield Table(
            f'[strategy] with name = "{name}"',
            about.split(" Per parameter")[0].rstrip(".: ") + ".",
            tuple(
                _option(option, hints[option], of_new_runs.get(option, default), texts.get(option, ""))
                for option, default in options.defaults().items()
                if option != "seed"  # a swarm's rounds bring their own
            ),
        )


def _of_new_runs(name: str) -> dict[str, Any]:
    """The options that new runs have at other values than the defaults, if their file says nothing."""
    defaults = strategy_class(name).facts.options.defaults()
    needed = {key: 1.0 for key, default in defaults.items() if default is REQUIRED and key != "compressor"}
    found = of_new_run({"name": name, **needed})
    return {key: value for key, value in found.items() if key not in needed}


def _compressors() -> Iterator[Table]:
    for name, kind in COMPRESSORS.items():
        hints, texts = get_type_hints(kind, include_extras=True), meanings(kind)
        about = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
        known = {p.name: p.default for p in inspect.signature(kind).parameters.values()}
        of_new_runs = compressor_of_new_run({"name": name})
        keys = tuple(
            _option(option, hints[option], of_new_runs.get(option, default), texts.get(option, ""))
            for option, default in known.items()
        )
        yield Table(f'[strategy.compressor] with name = "{name}"', about, keys)


def _option(name: str, hint: Any, default: Any, meaning: str) -> Key:
    if name == "compressor":
        return Key(
            name, "table", toml_value(default if default is not REQUIRED else DEFAULT_COMPRESSOR), "", meaning
        )
    is_required = default is REQUIRED or default is inspect.Parameter.empty
    rules = getattr(hint, "__metadata__", ())
    bounds = " and ".join(_rule(r) for r in rules if isinstance(r, Number | Whole))
    return Key(name, type_in_words(hint), NEEDED if is_required else toml_value(default), bounds, meaning)


def _rule(rule: Number | Whole) -> str:
    if isinstance(rule, Whole):
        return f"{rule.at_least} to {rule.at_most}"
    bounds = [(rule.at_least, ">="), (rule.above, ">"), (rule.at_most, "<="), (rule.below, "<")]
    return ", ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None)


def _bounds(metadata: list[Any]) -> str:
    found = [
        f"{sign} {bound}"
        for rule in metadata
        for name, sign in _BOUNDS.items()
        if (bound := getattr(rule, name, None)) is not None
    ]
    return ", ".join(found)


def type_in_words(annotation: Any) -> str:
    """As people call it: "whole number", "list of text"."""
    if hasattr(annotation, "__value__"):  # an alias
        annotation = annotation.__value__
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Annotated, Union, UnionType):
        kinds = inner[:1] if origin is Annotated else inner
        return " or ".join(type_in_words(a) for a in kinds if a is not NoneType)
    if origin is Literal:
        return ", ".join(toml_value(a) for a in inner)
    if origin is tuple:
        return f"list of {type_in_words(inner[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "table"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _markdown(table: Table) -> str:
    lines = [f"\n## `{table.title}`\n", f"{table.meaning}\n" if table.meaning else ""]
    if table.keys:
        lines += ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    for key in table.keys:
        default = key.default if key.default in ("", NEEDED) else f"`{_cell(key.default)}`"
        cells = (f"`{key.name}`", _cell(key.type), default, _cell(key.range), _cell(key.meaning))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(line for line in lines if line) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
