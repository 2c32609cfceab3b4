"""The public face of compressors: documented, and light."""

from __future__ import annotations

import subprocess
import sys

from thinwire.compression import api


def test_every_name_is_there_and_documented() -> None:
    assert api.__doc__ is not None
    for name in api.__all__:
        assert hasattr(api, name)
        assert f"`{name}`" in api.__doc__, name


def test_importing_it_loads_no_backend() -> None:
    code = "import sys, thinwire.compression.api; print(sorted({'numba', 'triton'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
