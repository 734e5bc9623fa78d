"""Pictures drawn with matplotlib, as SVG that takes its colours from the page or as a file of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.files import write_named
from ..core import ElastiqError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LINE = "#010203", "#010204"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216", "#010217", "#010218")
"""Stand-ins for colours: the page's stylesheet decides what they look like, in light and in dark."""
_ON_PAPER = {INK: "#1d2733", LINE: "#d5dbe3"} | dict(
    zip(SERIES, ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#1864ab", "#e67700", "#495057"), strict=True)
)
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.7,
    "text.parse_math": False,
    "legend.frameon": False,
}
_FEW_TICKS = 7
_SIZE = (5.6, 3.7)
"""Inches; 72 points of the page each."""
_WIDE = 8.0


@dataclass(frozen=True)
class Line:
    """One curve; `labels` stand beside its points, `faint` draws it thin and dashed."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    colour: int = 0
    faint: bool = False


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    references: Sequence[tuple[str, float, int]] = (),
    log_y: bool = False,
    whole_x: bool = False,
    size: tuple[float, float] = _SIZE,
) -> str:
    """Inline SVG of curves over one axis. references: (name, height, colour) of dotted horizontal lines."""
    return _svg(_figure(lines, x_label, y_label, references, log_y, whole_x, size), seed=f"{x_label}{y_label}")


def save_line_chart(
    file: Path,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    references: Sequence[tuple[str, float, int]],
    log_y: bool,
) -> None:
    """The same picture as a file on white; the suffix names the kind.

    Raises ElastiqError for another kind than .png or .svg, and if it cannot be written.
    """
    if file.suffix not in (".png", ".svg"):
        raise ElastiqError(f"{file}: pictures are .png or .svg; name one of these")
    figure = _figure(lines, x_label, y_label, references, log_y, whole_x=False, colours=_ON_PAPER)
    picture, metadata = io.BytesIO(), {"Date": None} if file.suffix == ".svg" else None
    figure.savefig(picture, format=file.suffix[1:], dpi=160, facecolor="white", metadata=metadata)
    write_named(file, picture.getvalue())


def _figure(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    references: Sequence[tuple[str, float, int]],
    log_y: bool,
    whole_x: bool,
    size: tuple[float, float] = _SIZE,
    colours: dict[str, str] | None = None,
) -> Figure:
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ElastiqError("report: matplotlib is not installed; run pip install 'elastiq[report]'") from None

    paint = {c: c for c in (INK, LINE, *SERIES)} if colours is None else colours
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), paint[INK])
    with matplotlib.rc_context(_STYLE | ink | {"axes.edgecolor": paint[LINE], "grid.color": paint[LINE]}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for line in lines:
            _draw(axes, line, paint[SERIES[line.colour % len(SERIES)]])
        for name, height, colour in references:
            axes.axhline(height, color=paint[SERIES[colour % len(SERIES)]], linestyle=":", linewidth=1.6, label=name)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.tick_params(which="both", length=0)
        if log_y:
            _log_axis(axes)
        if whole_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(lines) + len(references) > 1:
            figure.legend(loc="outside upper center", ncols=2 if size[0] < _WIDE else 5, fontsize=9.5)
        axes.margins(x=0.06, y=0.12)
        figure.draw_without_rendering()
    return figure


def _draw(axes: Axes, line: Line, colour: str) -> None:
    if line.faint:
        axes.plot(line.x, line.y, "--", color=colour, linewidth=1.1, alpha=0.75, label=line.name)
        return
    axes.plot(line.x, line.y, "o-", color=colour, linewidth=2.2, markersize=5.5, label=line.name)
    for x, y, label in zip(line.x, line.y, line.labels, strict=False):
        axes.annotate(
            label, (x, y), xytext=(6, 7), textcoords="offset points", fontsize=10, color=colour, weight="bold"
        )


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    narrow = high / low < 30
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if narrow else (1.0,), numticks=_FEW_TICKS)
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    """A number beside an axis: 0.01, 1e-5, 20,000."""
    if 1e-3 <= value < 1e6:
        return f"{value:,.10g}"
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].replace("+", ""), f"{value:.3g}")


def _svg(figure: Figure, seed: str) -> str:
    """The figure as an <svg> element that scales with the page and is painted by its stylesheet."""
    import matplotlib

    buffer = io.StringIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": seed}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1var(--font)", svg)
    for stand_in, variable in {INK: "--ink", LINE: "--line"}.items():
        svg = svg.replace(stand_in, f"var({variable})")
    for index, stand_in in enumerate(SERIES):
        svg = svg.replace(stand_in, f"var(--series-{index + 1})")
    return svg
