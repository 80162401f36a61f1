"""Sliders above a picture, in JupyterLab; the picture alone elsewhere.

A *view* is a picture that is drawn once and then moved: ``update(**values)`` takes the sliders' values (``views`` has
those of the thesis' objects). ``explore`` puts the sliders above it. The picture is an ordinary output of the cell,
replaced in place when a slider moves, so that a stored notebook, the book, and a run without JupyterLab show it as it
starts.
"""

import io
import typing

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .alttext import describe

VIEW = "application/vnd.jupyter.widget-view+json"


class Bank(typing.NamedTuple):
    """A row of upright sliders, all at 0; their values reach the view as one tuple."""

    count: int
    low: float
    high: float


def start(spec):
    """Where a control starts: a list's first entry, the third of (low, high, start), zeros of a bank."""
    if isinstance(spec, Bank):
        return (0.0,) * spec.count
    return spec[0] if isinstance(spec, list) else spec[2]


def _control(name, spec):
    import ipywidgets

    if isinstance(spec, Bank):
        look = dict(orientation="vertical", readout=False, layout=dict(width="30px", height="110px"))
        look |= dict(
            min=spec.low, max=spec.high, step=(spec.high - spec.low) / 100, style=dict(description_width="0px")
        )
        row = [ipywidgets.FloatSlider(0, description=f"{name} {i + 1}", **look) for i in range(spec.count)]
        return ipywidgets.HBox([ipywidgets.Label(name), *row])
    if isinstance(spec, list):
        return ipywidgets.Dropdown(options=spec, description=name)
    low, high, value = spec
    whole = all(isinstance(v, int) for v in spec)
    step = {} if whole else {"step": (high - low) / 100}
    return (ipywidgets.IntSlider if whole else ipywidgets.FloatSlider)(
        value, min=low, max=high, description=name, **step
    )


def _value(control):
    return tuple(c.value for c in control.children[1:]) if hasattr(control, "children") else control.value


def explore(view, **controls):
    """Show a view with its sliders: ``name=[options]``, ``name=(low, high, start)`` or ``name=Bank(...)``.

    Returns
    -------
    Figure
        As it starts, to be saved.
    """
    import ipywidgets
    from IPython import display as show

    def picture(values):
        return show.Image(view.png(**values), format="png", alt=describe(view.figure))

    rows = {name: _control(name, spec) for name, spec in controls.items()}
    box = ipywidgets.Box(list(rows.values()), layout={"flex_flow": "row wrap"})
    text = f"sliders, when run in JupyterLab: {', '.join(controls)}"
    show.display(
        {VIEW: {"version_major": 2, "version_minor": 0, "model_id": box.model_id}, "text/plain": text}, raw=True
    )
    shown = show.display(picture({name: start(spec) for name, spec in controls.items()}), display_id=True)

    def moved(change):
        shown.update(picture({name: _value(row) for name, row in rows.items()}))

    for row in rows.values():
        for slider in getattr(row, "children", (row,)):
            slider.observe(moved, "value")
    return view.figure


class View:
    """A picture with artists that ``update`` moves; not a pyplot figure, which a cell would show a second time."""

    def __init__(self, columns, size=(9, 3.2), **options):
        self.figure = Figure(figsize=size)
        self.axes = np.atleast_1d(self.figure.subplots(1, columns, **options))

    def update(self, **values):
        """Move the artists to these values."""
        raise NotImplementedError

    def table(self):
        """The numbers drawn, a DataFrame."""
        return self.numbers

    def png(self, **values):
        """Redraw; the picture as the bytes of a PNG."""
        self.update(**values)
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        if self.figure.get_layout_engine() is not None:  # room for titles and labels is made once: it is slow
            self.figure.set_layout_engine("none")
        buffer = io.BytesIO()  # savefig would draw twice
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
