"""The code cells of a notebook, in order, in this process: `python run_notebook.py FILE.ipynb`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def cells(path: Path, kind: str) -> list[tuple[str, str]]:
    """(id, source) of all of this kind."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [(c["id"], "".join(c["source"])) for c in notebook["cells"] if c["cell_type"] == kind]


def main(path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for name, source in cells(path, "code"):
        exec(compile(source, f"{path.name}:{name}", "exec"), namespace)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
