"""What all figures share: colours, look, the empty figure, and the PNG file that it becomes.

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

# Okabe & Ito, "Color Universal Design" (2008): told apart with every common colour blindness.
BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#666666"

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    # A "$" in a name is a dollar sign, not the start of a formula.
    "text.parse_math": False,
}


def styled(more: Mapping[str, Any] | None = None) -> contextlib.AbstractContextManager[None]:
    """The look above on matplotlib's own defaults, so that a matplotlibrc changes nothing; a decorator too.

    Args:
        more: further matplotlib settings, which come last.
    """
    return matplotlib.style.context(["default", {**STYLE, **(more or {})}])


def new_figure(width_in: float, height_in: float, title: str) -> Figure:
    """An empty figure at 120 pixels an inch, with a title wrapped to its width."""
    figure = Figure(figsize=(width_in, height_in), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, int(width_in * 8)), fontsize=14, fontweight="bold")
    return figure


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file's content, at its own size and resolution."""
    buffer = io.BytesIO()
    with styled():
        # matplotlib signs its files with its version; without that the bytes depend on input alone.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def write_png(figure: Figure, path: str | Path) -> Path:
    """Render first, write after, so that no failed drawing reaches the disk; return the path.

    Raises:
        RunError: the file cannot be written.
    """
    content = png_bytes(figure)
    with atomic_write(path) as file:
        file.write(content)
    return Path(path)
