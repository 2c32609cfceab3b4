"""Values as a run file has them: the standard library reads TOML and does not write it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


def toml_value(value: Any) -> str:
    """As it is written in a run file; None, which TOML does not have, is "" (left out)."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(v) for v in value)}]"
    # Numbers, truths and texts read the same in JSON, but for escaped surrogates and DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_key(key: str) -> str:
    """Quoted where it must be."""
    return key if _BARE.fullmatch(key) else toml_value(key)


def toml_of(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """A whole file. `sections`: by their headers, "strategy.compressor" is one."""
    lines = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{toml_key(key)} = {toml_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"
