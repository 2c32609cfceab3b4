"""What tests of metrics share: the parser's view of an exposition, and Debian's Prometheus and promtool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
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


def names(text: str) -> set[str]:
    """Of every series that there can be, measured yet or not."""
    found = set()
    for kind, name in re.findall(r"^# TYPE (?=\S+ (\w+)$)(\S+)", text, re.MULTILINE):
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


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


def queries(monitoring: Path, rules: str = "rules/*.yml") -> list[str]:
    """Every expression in rules and dashboards."""
    in_rules = [
        rule["expr"]
        for path in sorted(monitoring.glob(rules))
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]
    dashboards = [json.loads(path.read_text()) for path in monitoring.glob("grafana/dashboards/*.json")]
    return in_rules + [expression for dashboard in dashboards for expression in _expressions(dashboard)]


def _expressions(of: Any) -> Iterator[str]:
    if isinstance(of, list):
        for one in of:
            yield from _expressions(one)
    elif isinstance(of, dict):
        for key, one in of.items():
            if key == "expr":
                yield one
            else:
                yield from _expressions(one)


@dataclass(frozen=True)
class Tools:
    """Paths of the programs."""

    prometheus: str
    promtool: str
    amtool: str

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
    """The machine's, or those of Debian's packages unpacked into `folder`; skips where neither can be had."""
    installed = [path for path in map(shutil.which, ("prometheus", "promtool", "amtool")) if path]
    if len(installed) == 3:
        return Tools(*installed)
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("no prometheus in PATH, and no apt-get to fetch Debian's package with")
    fetched = subprocess.run(
        ["apt-get", "-q", "download", "prometheus", "prometheus-alertmanager"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    packages = list(folder.glob("*.deb"))
    if fetched.returncode or len(packages) != 2:
        pytest.skip(f"Debian's packages of Prometheus cannot be had: {fetched.stderr.strip()[-200:]}")
    for package in packages:
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, timeout=60)
    return Tools(*(str(folder / "usr/bin" / name) for name in ("prometheus", "promtool", "amtool")))
