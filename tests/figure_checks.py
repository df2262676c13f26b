"""What holds of every figure: checked on what matplotlib has drawn."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxpaged.looks import style


def painted(size: tuple[float, float], paint: Callable[[Figure], None]) -> Figure:
    """The figure, laid out and drawn, whose legends cover nothing and are whole."""
    figure = style.make(size, paint)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    whole = figure.bbox
    assert not any(axes.get_legend() for axes in figure.axes), "a legend lies within its axes"
    for legend in figure.legends:
        place = legend.get_window_extent(renderer)
        assert whole.x0 <= place.x0 and place.x1 <= whole.x1 and whole.y0 <= place.y0, "a legend is cut off"
        for axes in figure.axes:
            box = axes.get_tightbbox(renderer)
            assert box is not None and not place.overlaps(box), "a legend covers what belongs to axes"
        for text in figure.texts:
            assert not place.overlaps(text.get_window_extent(renderer)), "a legend covers a text"
    return figure
