"""Executes a notebook in the working directory with Jupyter's own kernel, and prints what its cells print:
`python run_notebook.py FILE.ipynb`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def cells(path: Path, kind: str) -> list[tuple[str, str]]:
    """(id, source) of all of this kind."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [(c["id"], "".join(c["source"])) for c in notebook["cells"] if c["cell_type"] == kind]


def main(path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    executed = NotebookClient(notebook, timeout=90, kernel_name="python3").execute()
    for cell in executed.cells:
        for output in cell.get("outputs", ()):
            sys.stdout.write(output.get("text", ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
