"""Families of Prometheus metrics, named as ours are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from ..protocol.exposition import BUCKETS_S


def gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(f"thinwire_{name}", words, value=value)


def counter(name: str, words: str, value: float) -> Metric:
    return CounterMetricFamily(f"thinwire_{name}", words, value=value)


def labelled(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    words: str,
    label: str,
    values: Mapping[str, float],
) -> Metric:
    family = kind(f"thinwire_{name}", words, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def complete(counts: Mapping[str, int], keys: Sequence[str]) -> dict[str, int]:
    """With a zero for what has not happened yet, so that its first time is seen as a rise."""
    return {key: counts.get(key, 0) for key in keys}


def histogram(name: str, words: str, counts: Sequence[int], total_s: float) -> Metric:
    """`counts`: of each bucket of `BUCKETS_S` alone, and of what took longer; `total_s`: of all."""
    bounds = [*map(str, BUCKETS_S), "+Inf"]
    buckets = list(zip(bounds, accumulate(counts), strict=True))
    return HistogramMetricFamily(f"thinwire_{name}", words, buckets=buckets, sum_value=total_s)
