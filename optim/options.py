"""The options of a strategy: one frozen dataclass each, which says types, bounds and defaults in one place.

    @dataclass(frozen=True, kw_only=True)
    class SpsaOptions(Options):
        lr: Annotated[float, Number(at_least=0)]
        noise: Literal["sign", "gauss"] = "sign"

Its fields are the keyword arguments of the strategy, the keys of a run's `[strategy]` table, and, by way of
`Options.entries`, the entries of `param_groups`. What a field may hold is read from its type: `bool`, a
`Literal` of strings, or a number `Annotated` with its bounds; other types are checked by `Options.check` of
the dataclass itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache, wraps
from inspect import signature
from math import isfinite
from typing import (
    Annotated,
    Any,
    Concatenate,
    Final,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from ..compression.errors import ConfigError, nearest

ENTRY_OF: Final = {"params": "subset"}
"""Options that stand under another name in `param_groups`: torch has a use of its own for "params"."""

REQUIRED: Final = object()
"""In place of a default: the option must be given."""


class Rule(Protocol):
    """What an option may hold."""

    def refusal(self, value: object, options: Mapping[str, Any]) -> str | None:
        """None for a value that may stand there, else what it must be. `options`: all of them, by name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A finite number within the bounds that are not None."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def refusal(self, value: object, options: Mapping[str, Any]) -> str | None:
        bounds = [(self.at_least, ">="), (self.above, ">"), (self.at_most, "<="), (self.below, "<")]
        words = " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        return None if is_number and self._holds(value) else f"must be a number {words}".rstrip()  # type: ignore[arg-type]

    def _holds(self, x: float) -> bool:
        return (
            (self.at_least is None or x >= self.at_least)
            and (self.above is None or x > self.above)
            and (self.at_most is None or x <= self.at_most)
            and (self.below is None or x < self.below)
        )


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer in [at_least, at_most]; `at_most` may name another option, which is checked first."""

    at_least: int
    at_most: int | str

    def refusal(self, value: object, options: Mapping[str, Any]) -> str | None:
        most: int = options[self.at_most] if isinstance(self.at_most, str) else self.at_most
        if isinstance(value, int) and not isinstance(value, bool) and self.at_least <= value <= most:
            return None
        return f"must be a whole number from {self.at_least} to {most}"


@dataclass(frozen=True, slots=True)
class Truth:
    """True or false."""

    def refusal(self, value: object, options: Mapping[str, Any]) -> str | None:
        return None if isinstance(value, bool) else "must be true or false"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these words."""

    known: tuple[str, ...]

    def refusal(self, value: object, options: Mapping[str, Any]) -> str | None:
        return None if value in self.known else nearest(value, self.known)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the options of a strategy; see the module's docstring. A subclass adds its fields.

    Making one checks nothing: `check` does, for every parameter group that a strategy is given.
    """

    seed: Annotated[int, Whole(0, 2**64 - 1)] = 0
    """Unsigned 64-bit, for the rounds of `Strategy.step`; a swarm's rounds bring their own seeds."""

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Option -> default; `REQUIRED` for one that must be given."""
        return {f.name: _default_of(f) for f in fields(cls)}

    @classmethod
    def check(cls, entries: Mapping[str, Any]) -> None:
        """Raises ConfigError, in words for the user, for values out of their range.

        `entries`: of a parameter group, every option by its name there. Subclasses add what concerns several
        options at once.
        """
        rules: dict[str, Rule] = _rules_of(cls)  # type: ignore[arg-type]  # mypy asks its instances for a hash
        for name, rule in rules.items():
            if (must := rule.refusal(entries[name], entries)) is not None:
                raise ConfigError(f"{name} = {entries[name]!r}: {must}")

    def entries(self) -> dict[str, Any]:
        """What `param_groups` hold: values that a `state_dict` can be saved with, a compressor's `repr`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        seed = values.pop("seed")
        return {**{ENTRY_OF.get(name, name): _entry(name, v) for name, v in values.items()}, "seed": seed}


P = ParamSpec("P")
S = TypeVar("S")
N = TypeVar("N")
O = TypeVar("O", bound=Options)  # noqa: E741 - of options, as S of strategy and N of named parameters


def keywords_of(
    options: Callable[P, O],
) -> Callable[[Callable[[S, N, O], None]], Callable[Concatenate[S, N, P], None]]:
    """Makes a constructor that takes a dataclass of options take its fields as keyword arguments.

    Users write `Spsa(model.named_parameters(), lr=1e-6)`; checkers know the names and types.
    """

    def decorate(construct: Callable[[S, N, O], None]) -> Callable[Concatenate[S, N, P], None]:
        @wraps(construct)
        def with_keywords(self: S, named_parameters: N, /, *args: P.args, **keywords: P.kwargs) -> None:
            construct(self, named_parameters, options(*args, **keywords))

        first_two = list(signature(construct).parameters.values())[:2]
        shown = signature(construct).replace(parameters=[*first_two, *signature(options).parameters.values()])
        with_keywords.__signature__ = shown  # type: ignore[attr-defined]  # what `help` shows
        return with_keywords

    return decorate


def _default_of(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return REQUIRED if field.default is MISSING else field.default


def _entry(name: str, value: Any) -> Any:
    if name == "compressor":
        return repr(value)  # the sends in a `state_dict` are packed with it
    return dict(value) if isinstance(value, Mapping) else value


@cache
def _rules_of(kind: type[Options]) -> dict[str, Rule]:
    """By option; those that look at another option come after it."""
    hints = get_type_hints(kind, include_extras=True)
    found = {f.name: rule for f in fields(kind) if (rule := _rule_of(hints[f.name])) is not None}
    return dict(sorted(found.items(), key=lambda entry: isinstance(getattr(entry[1], "at_most", None), str)))


def _rule_of(type_: Any) -> Rule | None:
    if type_ is bool:
        return Truth()
    if get_origin(type_) is Literal:
        return Choice(get_args(type_))
    rules: list[Rule] = [r for r in getattr(type_, "__metadata__", ()) if isinstance(r, Number | Whole)]
    return rules[0] if rules else None
