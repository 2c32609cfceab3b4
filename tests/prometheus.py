"""What tests of metrics share: the parser's view of an exposition, and Debian's Prometheus and promtool."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families


def samples(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Sample name -> labels -> value."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[name][tuple(sorted(labels.items()))]


def series(text: str) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Every series there is."""
    return {(name, labels) for name, by_labels in samples(text).items() for labels in by_labels}


def check_conventions(text: str) -> None:
    """Prefix, help, `_total` for counters only, and labels that are no peer's."""
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("thinwire_"), family.name
        assert len(family.documentation) > 5, f"{family.name} has no help"
        assert family.type in {"counter", "gauge", "histogram", "info"}, family
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total"), sample
            assert not sample.name.endswith("_created"), sample
            allowed = {"kind", "result", "reason", "phase", "state", "device", "le"}
            if family.name not in {"thinwire_build", "thinwire_build_info"}:
                assert set(sample.labels) <= allowed, sample
            assert not any(v.startswith("12D3Koo") for v in sample.labels.values()), sample


@dataclass(frozen=True)
class Tools:
    """Paths of the programs."""

    prometheus: str
    promtool: str

    def check_metrics(self, text: str) -> str:
        """What promtool finds wrong with it."""
        done = subprocess.run(
            [self.promtool, "check", "metrics"],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout + done.stderr


def find_tools(folder: Path) -> Tools:
    """Those of the machine, or of Debian's package unpacked into `folder`; skips where neither can be had."""
    installed = shutil.which("prometheus"), shutil.which("promtool")
    if installed[0] and installed[1]:
        return Tools(installed[0], installed[1])
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("no prometheus in PATH, and no apt-get to fetch Debian's package with")
    fetched = subprocess.run(
        ["apt-get", "-q", "download", "prometheus"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    packages = list(folder.glob("prometheus_*.deb"))
    if fetched.returncode or not packages:
        pytest.skip(f"Debian's package prometheus cannot be had: {fetched.stderr.strip()[-200:]}")
    subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(folder)], check=True, timeout=60)
    return Tools(str(folder / "usr/bin/prometheus"), str(folder / "usr/bin/promtool"))
