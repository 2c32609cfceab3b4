"""Objects of the coordinator's own classes as plain data, and back: what a checkpoint keeps of its state.

    msgpack [contents of every object, in the order of their numbers]; the first one is the root

A value inside of contents is itself where it is plain, else [tag, ...].
Nothing in the bytes names code to be run: a class is looked up among those that are loaded of this package, a
method among those of an object. Objects that refer to one another, also in circles, do so again. What belongs
to the process has a name instead of contents.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from enum import Enum, IntEnum
from types import MethodType
from typing import Any, Final, NoReturn

import msgpack

_PLAIN: Final = frozenset({type(None), bool, int, float, str, bytes})
_CONTAINERS: Final[dict[str, type]] = {t.__name__: t for t in (list, dict, set, Counter, int)}
_PACKAGE: Final = __name__.rpartition(".checkpoints")[0]


class _Tag(IntEnum):
    """What begins a value that is not plain."""

    REF, TUPLE, FROZEN, ENUM, METHOD, NAMED, FIELDS = range(7)


NameOf = Callable[[Any], str | None]
"""Of what belongs to the process; None: it does not."""


class Unkept(ValueError):
    """Something that is not kept, or bytes that `encode` has not made."""


def encode(root: Any, name_of: NameOf) -> bytes:
    """Raises Unkept for what is neither plain, nor a container, nor of this package."""
    writer = _Writer(name_of)
    writer.value(root)
    try:
        packed: bytes = msgpack.packb(writer.contents(), use_bin_type=True)
    except OverflowError as e:
        raise Unkept("a number of more than 64 bits") from e
    return packed


def decode(data: bytes, named: Callable[[str], Any]) -> Any:
    """`named`: what has a name instead of contents. Raises Unkept."""
    try:
        return _Reader(msgpack.unpackb(data), named).object(0)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise Unkept(f"{type(e).__name__}: {e}") from e


class _Writer:
    """Numbers objects as they are met."""

    def __init__(self, name_of: NameOf) -> None:
        self._name_of = name_of
        self._numbers: dict[int, int] = {}
        self._objects: list[Any] = []

    def contents(self) -> list[list[Any]]:
        """Of all objects, those too that are met in them."""
        found: list[list[Any]] = []
        while len(found) < len(self._objects):
            found.append(self._contents(self._objects[len(found)]))
        return found

    def value(self, x: Any) -> Any:
        """As it stands in the contents of another."""
        kind = type(x)
        if kind in _PLAIN:
            return x
        if (name := self._name_of(x)) is not None:
            return [_Tag.NAMED, name]
        return self._immutable(x, kind) or self._numbered(x)

    def _immutable(self, x: Any, kind: type) -> list[Any] | None:
        """None: it is not, and may be shared."""
        if kind in (tuple, frozenset):
            return [_Tag.TUPLE if kind is tuple else _Tag.FROZEN, self._values(x)]
        if isinstance(x, Enum):
            return [_Tag.ENUM, *_name_of(kind), x.name]
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return [_Tag.FIELDS, *_name_of(kind), self._values(x)]
        if isinstance(x, MethodType):
            return [_Tag.METHOD, self.value(x.__self__), x.__name__]
        return None

    def _numbered(self, x: Any) -> list[Any]:
        number = self._numbers.setdefault(id(x), len(self._objects))
        if number == len(self._objects):
            self._objects.append(x)
        return [_Tag.REF, number]

    def _values(self, xs: Collection[Any]) -> list[Any]:
        if not set(map(type, xs)) <= _PLAIN:
            return [self.value(x) for x in xs]
        return sorted(xs, key=repr) if isinstance(xs, set | frozenset) else list(xs)

    def _contents(self, x: Any) -> list[Any]:
        """["object", module, class, state] or [container, values, ...] or [mapping, keys, values, ...]."""
        kind = type(x)
        if kind in (list, set):
            return [kind.__name__, self._values(x)]
        if kind is deque:
            return ["deque", self._values(x), x.maxlen]
        if kind in (dict, Counter):
            return [kind.__name__, self._values(x), self._values(x.values())]
        if kind is defaultdict:
            return ["defaultdict", self._values(x), self._values(x.values()), _factory_of(x)]
        if isinstance(x, tuple | list | dict | set | frozenset | str | bytes | int | float):
            _refuse(kind)  # with contents that are not in its attributes
        return ["object", *_name_of(kind), self.value(x.__getstate__())]


class _Reader:
    """Makes an object when it is first asked for."""

    def __init__(self, contents: list[list[Any]], named: Callable[[str], Any]) -> None:
        self._contents, self._named = contents, named
        self._made: dict[int, Any] = {}

    def object(self, number: int) -> Any:
        """What has this number."""
        if number not in self._made:
            contents = self._contents[number]
            made = self._made[number] = _empty(contents)  # first: what it refers to may refer to it
            self._fill(made, contents)
        return self._made[number]

    def _fill(self, made: Any, contents: list[Any]) -> None:
        match contents:
            case ["object", _, _, state]:
                _restore(made, self._value(state))
            case ["dict" | "Counter" | "defaultdict", keys, values, *_]:
                dict.update(made, zip(self._values(keys), self._values(values), strict=True))
            case ["set", values]:
                made.update(self._values(values))
            case [_, values, *_]:
                made.extend(self._values(values))

    def _value(self, x: Any) -> Any:
        found: Any = x
        if isinstance(x, list):
            match x:
                case [_Tag.REF, number]:
                    found = self.object(number)
                case [_Tag.TUPLE, values]:
                    found = tuple(self._values(values))
                case [_Tag.FROZEN, values]:
                    found = frozenset(self._values(values))
                case [_Tag.ENUM, module, cls, name]:
                    found = _class_of(module, cls)[name]  # type: ignore[index]
                case [_Tag.METHOD, of, name]:
                    found = _method_of(self._value(of), name)
                case [_Tag.NAMED, name]:
                    found = self._named(name)
                case [_Tag.FIELDS, module, cls, values]:
                    found = _fields_of(_class_of(module, cls))(self._values(values))
                case _:
                    raise Unkept(f"no value: {x!r:.80}")
        return found

    def _values(self, xs: list[Any]) -> list[Any]:
        return [self._value(x) for x in xs]


def _empty(contents: list[Any]) -> Any:
    match contents:
        case ["object", module, name, _]:
            return object.__new__(_class_of(module, name))
        case ["deque", _, maxlen]:
            return deque(maxlen=maxlen)
        case ["defaultdict", _, _, factory]:
            return defaultdict(_CONTAINERS[factory])
        case [name, *_]:
            return _CONTAINERS[name]()
    raise Unkept("an object without contents")


def _refuse(cls: type) -> NoReturn:
    raise Unkept(f"{cls.__module__}.{cls.__qualname__} is nothing that is kept")


def _is_ours(module: str) -> bool:
    return module.startswith(f"{_PACKAGE}.")


def _name_of(cls: type) -> tuple[str, str]:
    if not _is_ours(cls.__module__) or "." in cls.__qualname__:
        _refuse(cls)
    return cls.__module__, cls.__qualname__


def _class_of(module: str, name: str) -> type:
    found = vars(sys.modules[module])[name] if _is_ours(module) else None
    if not isinstance(found, type) or found.__module__ != module:
        raise Unkept(f"{module}.{name} is no class that is kept")
    return found


def _fields_of(cls: type) -> Callable[[Sequence[Any]], Any]:
    if not issubclass(cls, tuple):
        raise Unkept(f"{cls.__qualname__} is no named tuple")
    make: Callable[[Sequence[Any]], Any] = cls._make  # type: ignore[attr-defined]
    return make


def _method_of(thing: Any, name: str) -> Any:
    found = getattr(thing, name) if _is_ours(type(thing).__module__) else None
    if not isinstance(found, MethodType):
        raise Unkept(f"{name} is no method that is kept")
    return found


def _factory_of(x: defaultdict[Any, Any]) -> str:
    name = getattr(x.default_factory, "__name__", "")
    if _CONTAINERS.get(name) is not x.default_factory:
        _refuse(type(x))
    return name


def _restore(made: Any, state: Any) -> None:
    """`state`: of the object's `__getstate__`."""
    if hasattr(type(made), "__setstate__"):
        made.__setstate__(state)
        return
    for attributes in state if isinstance(state, tuple) else (state,):
        for name, value in (attributes or {}).items():
            object.__setattr__(made, name, value)
