"""Draws `bench network -o FILE.png`: where which way of giving payloads wins, and what a round costs."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import TYPE_CHECKING, Any, Final

from ...compare.charts import COLOURS, MARKERS, as_bytes, png
from .curves import Figures
from .swarm import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES: Final[Mapping[Topology, str]] = {
    "coordinator": "all from the coordinator",
    "maker": "from its maker",
    "dealt": "dealt",
}

MOST: Final = 0.8
"""Of the offers: where fewer count, rounds end without those that are slow, and their time says little."""


def network_png(
    by_size: Mapping[str, Mapping[Topology, Mapping[int, Figures]]],
    by_peers: Mapping[int, Mapping[int, Figures]],
) -> bytes:
    """See `curves`. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10, 12), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    *rows, (sent, cpu) = figure.subplots(3, 2)
    times = [axes for row in rows for axes in row]
    for axes, (title, topologies) in zip(times, by_size.items(), strict=True):
        _draw_times(axes, title, topologies)
        if axes is not times[0]:
            axes.sharey(times[0])
    times[0].plot([], [], "k--", label="99th percentile")
    few = f"fewer than {MOST:.0%} of the offers count:\ntime for as many as there are peers"
    times[0].plot([], [], "ko", markerfacecolor="none", label=few)
    times[0].legend(fontsize="small")
    _draw_costs(sent, "a peer's bytes in a round: sent (mean), received dashed", by_peers, "peer_bytes")
    _draw_costs(cpu, "coordinator: CPU seconds of a round", by_peers, "coordinator_cpu_s")
    sent.yaxis.set_major_formatter(as_bytes())
    sent.yaxis.set_major_locator(LogLocator(numticks=8))
    return png(figure)


def _draw_times(axes: Axes, title: str, topologies: Mapping[Topology, Mapping[int, Figures]]) -> None:
    """Medians as lines, 99th percentiles dashed; hollow where few offers count."""
    for i, (topology, sizes) in enumerate(topologies.items()):
        style: dict[str, Any] = {"color": COLOURS[i], "markersize": 5}
        for key, line in (("round_s", f"{MARKERS[i]}-"), ("round_p99_s", "--")):
            values = [f[key] if f["offers_counted"] >= MOST else nan for f in sizes.values()]
            axes.plot(list(sizes), values, line, label=NAMES[topology] if key == "round_s" else None, **style)
        few = {n: f["all_counted_s"] for n, f in sizes.items() if f["offers_counted"] < MOST}
        axes.plot(list(few), list(few.values()), MARKERS[i], markerfacecolor="none", **style)
    _scale(axes, title, "payload")
    axes.xaxis.set_major_formatter(as_bytes())
    axes.set_ylabel("seconds of a round (work: 10 s)")


def _draw_costs(axes: Axes, title: str, by_peers: Mapping[int, Mapping[int, Figures]], key: str) -> None:
    for i, (n_bytes, figures) in enumerate(by_peers.items()):
        style: dict[str, Any] = {"color": COLOURS[i], "markersize": 5}
        values = [f[key] for f in figures.values()]
        axes.plot(
            list(figures), values, f"{MARKERS[i]}-", label=f"payloads of {as_bytes()(n_bytes)}", **style
        )
        if key == "peer_bytes":
            axes.plot(list(figures), [f["received_bytes"] for f in figures.values()], "--", **style)
    _scale(axes, title, "peers (dealt, coordinator 1 Gbit/s)")
    axes.legend(fontsize="small")


def _scale(axes: Axes, title: str, label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.grid(visible=True, alpha=0.3)
