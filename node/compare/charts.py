"""Pictures: of a comparison (held-out loss against what was sent and what was computed), of times."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from .comparison import Outcome

# Okabe and Ito's, which stay apart for the colour-blind too; and another marker for each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = "osD^vPX*"

COLOURS_OF_PNG = 64
"""With the shades between them and white."""


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def comparison_png(title: str, unit: str, outcomes: Sequence[Outcome], ddp_bytes_per_step: float) -> bytes:
    """`unit`: of the loss. `ddp_bytes_per_step`: per peer. Raises ImportError without matplotlib.

    No pyplot: that wants a display, and keeps global state.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # and not what the user's matplotlib is set up for
    by_bytes, by_steps = figure.subplots(1, 2, sharey=True)
    shown = [outcome for outcome in outcomes if outcome.has_rounds]
    _draw_curves(shown, by_bytes, by_steps)
    n_steps = max((p.steps for outcome in shown for p in outcome.curve), default=0)
    _bytes_axis(by_bytes, ddp_bytes_per_step * n_steps)
    by_steps.set_xlabel("steps (data-parallel training would exchange gradients after each)")
    by_bytes.set_ylabel(f"held-out loss ({unit})")
    for axes in (by_bytes, by_steps):
        axes.grid(visible=True, which="major", alpha=0.3)
    handles, labels = by_bytes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    figure.suptitle(title)
    return png(figure)


def _draw_curves(outcomes: Sequence[Outcome], by_bytes: Axes, by_steps: Axes) -> None:
    """One curve of held-out losses for each, on both axes."""
    for i, outcome in enumerate(outcomes):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4.5,
            "linewidth": 1.6,
            "label": outcome.plan.label,
        }
        sent = [p for p in outcome.curve if p.payload_bytes > 0]  # a logarithm has no place for zero
        by_bytes.plot([p.payload_bytes for p in sent], [p.held_out for p in sent], **style)
        by_steps.plot([p.steps for p in outcome.curve], [p.held_out for p in outcome.curve], **style)


Bars = Mapping[str, tuple[float, float, float]]
"""What was measured: median, least and most."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One benchmark: bars[size], in this unit."""

    unit: str
    bars: Mapping[str, Bars]


def bars_png(title: str, panels: Mapping[str, Panel]) -> bytes:
    """A panel for each benchmark: bars with their spread across them, sizes next to each other. Raises
    ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [sum(len(bars) for bars in panel.bars.values()) for panel in panels.values()]
    heights = [0.8 + 0.24 * n for n in rows]
    figure = Figure(figsize=(10, 0.6 + sum(heights)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, panel) in zip(all_axes, panels.items(), strict=True):
        _draw_panel(axes, panel)
        axes.set_title(name)
    figure.suptitle(title)
    return png(figure)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    """What was measured from top to bottom, the sizes of each as bars next to each other."""
    sizes = panel.bars
    whats = list(dict.fromkeys(what for times in sizes.values() for what in times))
    width = 0.8 / len(sizes)
    for i, (size, times) in enumerate(sizes.items()):
        for what, (middle, least, most) in times.items():
            axes.barh(
                whats.index(what) + i * width,
                middle,
                height=width,
                xerr=[[middle - least], [most - middle]],
                color=COLOURS[i % len(COLOURS)],
                label=size if what == next(iter(times)) else None,
            )
    axes.set_yticks([i + 0.4 - width / 2 for i in range(len(whats))], whats)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(panel.unit)
    axes.grid(visible=True, axis="x", alpha=0.3)
    if any(sizes):
        axes.legend(fontsize="small")


def png(figure: Figure) -> bytes:
    """In few colours, which takes a third of the bytes. Raises ImportError without matplotlib."""
    from PIL import Image

    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(COLOURS_OF_PNG).save(file, format="png", optimize=True)
    return file.getvalue()


def _bytes_axis(axes: Axes, ddp_bytes: float) -> None:
    """Logarithmic, in words of people, with what data-parallel training of all steps would send."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, numticks=12))
    axes.xaxis.set_major_formatter(as_bytes())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("payload bytes sent per peer, so far")
    if ddp_bytes > 0:
        axes.axvline(
            ddp_bytes,
            color="grey",
            linestyle="--",
            linewidth=1,
            label="data-parallel, all steps (ring all-reduce)",
        )


def as_bytes() -> FuncFormatter:
    """Of an axis of bytes, in words of people."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda n, _position: _power(n))


def _power(n: float) -> str:
    """1e6 -> '1 MB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:g} {unit}"
        n /= 1000
    raise AssertionError
