"""What all figures share: colours, style, the empty figure, and the PNG file it becomes.

Nothing here needs a display or touches `pyplot`'s global state, and the same figure gives the same bytes.
"""

import contextlib
import io
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from core.files import atomic_write

# Okabe & Ito, "Color Universal Design" (2008): distinct with every common colour blindness.
ORANGE, SKY_BLUE, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILLION, PURPLE, GREY = "#D55E00", "#CC79A7", "#666666"

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    # A "$" in a name is a dollar sign, not the start of a formula.
    "text.parse_math": False,
}


def styled(more: Mapping[str, Any] | None = None) -> contextlib.AbstractContextManager[None]:
    """STYLE and `more` on matplotlib's defaults, whatever a matplotlibrc says; also a decorator."""
    return matplotlib.style.context(["default", {**STYLE, **(more or {})}])


def new_figure(width_in: float, height_in: float, title: str) -> Figure:
    """An empty figure at 120 dots per inch, with a title wrapped to its width."""
    figure = Figure(figsize=(width_in, height_in), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, int(width_in * 8)), fontsize=14, fontweight="bold")
    return figure


def png_bytes(figure: Figure) -> bytes:
    """The content of the figure's PNG file."""
    buffer = io.BytesIO()
    with styled():
        # without matplotlib's version in it, so that the bytes depend on the input alone
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def write_png(figure: Figure, path: str | Path) -> Path:
    """Write the figure, rendered completely first, as a PNG; return the path (RunError if that fails)."""
    content = png_bytes(figure)
    with atomic_write(path) as file:
        file.write(content)
    return Path(path)
