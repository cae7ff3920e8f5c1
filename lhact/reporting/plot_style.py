"""Names in, colours out; figures in, bytes out: how every picture looks.

Widths are those of a paper's column, fonts are 7 points there, so that a picture is set without
being scaled. Colours are those of Okabe and Ito, which the colour-blind can tell apart; their
yellow is left out, since a line of it does not show on white.
"""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

SINGLE, DOUBLE = 3.3, 7.0  # inches: one column of a paper, and both

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
COLOURS = (VERMILLION, BLUE, GREEN, ORANGE, PURPLE, SKY, BLACK)
ID_COLOUR, MARK_COLOUR, GRID_COLOUR = "#B0B0B0", "#404040", "#E4E4E4"
Dash = str | tuple[int, tuple[float, ...]]
# Dash of lines and marker of points, changed each time that the colours are used up.
ROUNDS: tuple[tuple[Dash, str], ...] = (("-", "o"), ((0, (3, 1)), "s"), ((0, (1, 1)), "^"))

# The same colour on every picture of every run, for the methods of the paper's table and its sets.
METHOD_COLOURS = {
    "msp": ORANGE,
    "odin": PURPLE,
    "energy": BLACK,
    "bats": SKY,
    "react": BLUE,
    "bfact": GREEN,
    "lhact": VERMILLION,
}
SET_COLOURS = {"iNaturalist": GREEN, "SUN": ORANGE, "Places": BLUE, "Textures": PURPLE}

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlepad": 3,
    "axes.labelpad": 2,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "lines.linewidth": 1.0,
    "lines.markersize": 4,
    "grid.color": GRID_COLOUR,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
    "figure.constrained_layout.wspace": 0.05,
    "legend.borderpad": 0.1,
    "legend.borderaxespad": 0.2,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # fonts as text that can be searched and edited; many venues ask for it
    "svg.hashsalt": "lhact",
}
# Nothing that changes from one run to the next.
METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}


def styled() -> AbstractContextManager[None]:
    """While it lasts, figures are made and saved in STYLE, whatever the user's own settings are;
    these are as before when it ends."""
    return matplotlib.style.context(STYLE, after_reset=True)


def settle(figure: Figure) -> Figure:
    """The figure with its layout made, once for all forms. Positions are rounded: the solver of the
    layout leaves other last digits each time, and an SVG names its parts by them."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis in figure.axes:
        rounded = (round(end, 6) for end in axis.get_position(original=True).bounds)
        axis.set_position(Bbox.from_bounds(*rounded), which="original")
    return figure


def render(figure: Figure, form: str) -> bytes:
    """The figure as the content of a file: `png` (300 dpi), `pdf` or `svg`. The same figure gives
    the same bytes. ValueError for another form."""
    if form not in METADATA:
        raise ValueError(f"a figure can be rendered as {', '.join(METADATA)}, got {form!r}")
    out = io.BytesIO()
    with styled():
        figure.savefig(out, format=form, metadata=METADATA[form])
    return out.getvalue()


@dataclass(frozen=True)
class Look:
    """How one method or set is drawn on every picture."""

    colour: str
    dash: Dash
    marker: str


def looks(names: Sequence[str], fixed: Mapping[str, str]) -> dict[str, Look]:
    """name -> its look: the fixed colours for those that have one, the colours left over for
    others, then the same colours dashed and with another marker, from the last on."""
    names = list(dict.fromkeys(names))
    used = [fixed[name] for name in names if name in fixed]
    solid, *others = ROUNDS
    spare = iter(
        [Look(colour, *solid) for colour in COLOURS if colour not in used]
        + [Look(colour, *other) for other in others for colour in reversed(COLOURS)]
    )
    rest = Look(ID_COLOUR, *solid)
    return {
        name: Look(fixed[name], *solid) if name in fixed else next(spare, rest) for name in names
    }


def label_logarithmic(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis: the more of them, the fewer powers of ten it spans."""
    low, high = axis.get_view_interval()
    labelled = (1, 2, 3, 5) if high < 11 * low else (1, 2, 5) if high < 120 * low else (1,)
    axis.set_major_locator(LogLocator(subs=labelled))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def distinct_stem(title: str, used: dict[str, int]) -> str:
    """The title as a file name that every system takes: letters, digits, '.', '_' and '-'. One
    that was used before, as systems that ignore case see it, gets a number."""
    stem = re.sub(r"[^A-Za-z0-9._]+", "-", title).strip("-.")[:100]
    used[stem.lower()] = count = used.get(stem.lower(), 0) + 1
    return stem if count == 1 else distinct_stem(f"{stem[:90]}-{count}", used)


def panels(
    colours: Mapping[str, str], kinds: int, height: float, most_columns: int = 4
) -> tuple[Figure, dict[str, list[Axes]]]:
    """A figure as wide as two columns, and for each name its `kinds` panels, one below the other,
    under the name in its colour. More names than columns go on in further rows. height: of a row,
    in inches."""
    columns = min(most_columns, len(colours))
    blocks = -(-len(colours) // columns)
    width = DOUBLE if columns > 2 else SINGLE * columns
    figure = Figure((width, 0.3 + height * kinds * blocks), layout="constrained")
    grid = figure.subplots(kinds * blocks, columns, squeeze=False)
    found = {}
    for number, (name, colour) in enumerate(colours.items()):
        block, column = divmod(number, columns)
        found[name] = list(grid[block * kinds : (block + 1) * kinds, column])
        found[name][0].set_title(name, loc="left", color=colour, weight="bold")
    for empty in grid[-kinds:, len(colours) - blocks * columns + columns :].flat:
        empty.set_axis_off()
    return figure, found


def in_first_column(axis: Axes) -> bool:
    place = axis.get_subplotspec()
    return place is not None and place.is_first_col()


def label_upright(axis: Axes, label: str) -> None:
    """The label and numbers of the upright axis, in the first column alone."""
    if in_first_column(axis):
        axis.set_ylabel(label)
    else:
        axis.tick_params(labelleft=False)


def line(colour: str, dash: object, label: str) -> Line2D:
    return Line2D([], [], color=colour, ls=dash, label=label)


def marker(marker: str, face: str, label: str) -> Line2D:
    return Line2D([], [], ls="", marker=marker, mfc=face, mec=MARK_COLOUR, label=label)


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """As many columns as the longest label leaves room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    room = figure.get_figwidth() / (0.42 + 0.058 * longest)
    columns = max(1, min(len(handles), int(room)))
    rows = -(-len(handles) // columns)
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows))
