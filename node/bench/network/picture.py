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
    from matplotlib.ticker import FuncFormatter

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

    figure = Figure(figsize=(10, 15.5), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    *rows, costs, (cpu, words) = figure.subplots(4, 2)
    times = [axes for row in rows for axes in row]
    for axes, (title, topologies) in zip(times, by_size.items(), strict=True):
        _draw_times(axes, title, topologies)
        if axes is not times[0]:
            axes.sharey(times[0])
    times[0].autoscale_view()
    _draw_costs(costs[0], "time of a round, dealt", "round_s", by_peers)
    _draw_costs(costs[1], "bytes of a peer in a round, dealt", "peer_bytes", by_peers)
    _draw_costs(cpu, "CPU time of the coordinator in a round, dealt", "coordinator_cpu_s", by_peers)
    for axes in (*times, costs[0], cpu):
        axes.yaxis.set_major_formatter(_as_seconds())
    costs[1].yaxis.set_major_formatter(as_bytes())
    _explain(words, times[0], cpu)
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
    _scale(axes, title, "size of a payload")
    axes.xaxis.set_major_formatter(as_bytes())
    axes.set_ylabel("time of a round (10 s of it work)")


def _draw_costs(axes: Axes, title: str, key: str, by_peers: Mapping[int, Mapping[int, Figures]]) -> None:
    """A curve for each size of payloads; what is received dashed."""
    from matplotlib.ticker import FuncFormatter

    for i, (n_bytes, figures) in enumerate(by_peers.items()):
        style: dict[str, Any] = {"color": COLOURS[3 + i], "markersize": 5}
        values, label = [f[key] for f in figures.values()], f"payloads of {as_bytes()(n_bytes)}"
        axes.plot(list(figures), values, f"{MARKERS[3 + i]}-", label=label, **style)
        if key == "peer_bytes":
            axes.plot(list(figures), [f["received_bytes"] for f in figures.values()], "--", **style)
    _scale(axes, title, "peers (coordinator 1 Gbit/s)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _position: f"{n:,.0f}"))


def _explain(words: Axes, times: Axes, costs: Axes) -> None:
    """One legend for all panels of a kind, where no curve is."""
    words.set_axis_off()
    ways, _ = times.get_legend_handles_labels()
    (p99,) = words.plot([], [], "k--", label="99th percentile (median: solid)")
    few = f"fewer than {MOST:.0%} of the offers count: time\nfor as many as there are peers"
    (hollow,) = words.plot([], [], "ko", markerfacecolor="none", label=few)
    first = words.legend(handles=[*ways, p99, hollow], title="against a payload's size", loc="upper left")
    words.add_artist(first)
    sizes, _ = costs.get_legend_handles_labels()
    (received,) = words.plot([], [], "k--", label="received (sent, in the mean: solid)")
    words.legend(handles=[*sizes, received], title="against the number of peers", loc="lower left")


def _as_seconds() -> FuncFormatter:
    """Of an axis of times."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda s, _position: f"{s:,.0f} s" if s >= 1 else f"{1000 * s:g} ms")


def _scale(axes: Axes, title: str, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.grid(visible=True, alpha=0.3)
