"""Metrics in Prometheus' text format: what a scrape is shown, and how a node's travel over its session."""

from __future__ import annotations

import math
import platform
import zlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from prometheus_client import CollectorRegistry, Info, Metric, generate_latest
from prometheus_client.registry import Collector

from .messages import MAX_METRICS_BYTES, PROTOCOL_VERSION, Metrics
from .streams import BadFrame

BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of round durations; from quick rounds in a cluster to slow ones over thin links."""

MAX_TEXT_BYTES: Final = 2**19


class Shown(Collector):
    """A registry as it is scraped: without what was not measured yet (NaN), and without the times at which
    counters were made, which would be half of all series and tell nothing."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            family.samples = [
                s for s in family.samples if not math.isnan(s.value) and not s.name.endswith("_created")
            ]
            yield family


def text_of(registry: CollectorRegistry) -> bytes:
    """In Prometheus' text format."""
    return generate_latest(Shown(registry))


def build_info(registry: CollectorRegistry, role: str) -> None:
    """What is running here, as the labels of a metric that is always 1."""
    try:
        ours = version("thinwire")
    except PackageNotFoundError:  # a checkout that was never installed
        ours = "unknown"
    info = Info("thinwire_build", "The program that answers", registry=registry)
    info.info(
        {
            "role": role,
            "version": ours,
            "protocol": str(PROTOCOL_VERSION),
            "python": platform.python_version(),
        }
    )


def packed(text: bytes) -> Metrics:
    """What a node answers with. Text that does not fit is left out: a node has some 200 lines."""
    data = zlib.compress(text)
    if len(text) > MAX_TEXT_BYTES or len(data) > MAX_METRICS_BYTES:
        data = zlib.compress(b"# the metrics of this node are too large to be sent\n")
    return Metrics(text=data)


def unpacked(metrics: Metrics) -> bytes:
    """Raises BadFrame for what `packed` does not make, whatever it would grow to."""
    unzip = zlib.decompressobj()
    try:
        text = unzip.decompress(metrics.text, MAX_TEXT_BYTES)
    except zlib.error as e:
        raise BadFrame("metrics", f"metrics that are not compressed: {e}") from e
    if not unzip.eof or unzip.unused_data:
        raise BadFrame("metrics", f"metrics of more than {MAX_TEXT_BYTES} bytes, or cut ones")
    return text
