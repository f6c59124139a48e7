"""The visual language of the lab: what a colour, a marker and a line mean, and how numbers are written.

These are plain tables and functions, so that matplotlib figures, widgets and reports can all use them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .errors import unknown_name

COLOURS: dict[str, dict[str, str]] = {
    "light": {
        "background": "#ffffff",
        "panel": "#f5f6f8",
        "text": "#1b1e23",
        "muted": "#5b6470",
        "line": "#d5d9df",
        "accent": "#0063a3",
        "exact": "#111417",
        "baseline": "#767c85",
    },
    "dark": {
        "background": "#16181c",
        "panel": "#1f2227",
        "text": "#e8eaed",
        "muted": "#a0a7b1",
        "line": "#3a3f47",
        "accent": "#6cb6f0",
        "exact": "#f3f4f6",
        "baseline": "#9aa1ab",
    },
}
"""Colours of each theme. `exact` is for exact attention, `baseline` for as many independent draws."""

SAMPLER_COLOURS: dict[str, str] = {
    "stratified": "#56B4E9",
    "systematic": "#0072B2",
    "sobol": "#009E73",
    "halton": "#E69F00",
    "lattice": "#F0E442",
    "head-tail": "#D55E00",
    "learned": "#CC79A7",
}
"""Colours of samplers, from the set of Okabe and Ito, which colour-blind readers can tell apart.

`exact` and `monte-carlo` have the theme's own colours.
"""

SAMPLER_MARKERS: dict[str, str] = {
    "exact": "",
    "monte-carlo": "o",
    "stratified": "^",
    "systematic": "s",
    "sobol": "D",
    "halton": "v",
    "lattice": "P",
    "head-tail": "X",
    "learned": "*",
}
"""Markers of samplers, by matplotlib's names; `figures.MARKERS` of the dashboard has Bokeh's."""

MAX_PLACES = 8
"""Decimal places of a number with an interval, at most."""

MAX_DECADES = 7
"""Decades of a logarithmic axis of which each has a tick; of more decades every second or third has one."""

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

QUANTITIES = {
    "num_samples": "draws per row",
    "num_tokens": "tokens",
    "bits_per_byte": "bits per byte",
    "shots": "shots a row",
}
"""What people call the numbers that runs write under short names."""

SEQUENTIAL = "cividis"
"""Colour map for probabilities and other positive numbers."""

DIVERGING = "RdBu_r"
"""Colour map for signed differences, centred on zero."""


def sampler_style(sampler: str, theme: str) -> dict[str, Any]:
    """Return the line style of a sampler, as matplotlib's `plot` takes it.

    Parameters
    ----------
    sampler : str
        Name of the sampler. One that is not in the tables gets the accent colour and a round marker.
    theme : str
        "light" or "dark".

    Returns
    -------
    dict
        `color`, `marker` and `linestyle`.

    Raises
    ------
    ArgumentError
        If there is no such theme.

    Examples
    --------
    >>> sampler_style("systematic", "light")
    {'color': '#0072B2', 'marker': 's', 'linestyle': '-'}
    """
    colours = colours_of(theme)
    if sampler == "exact":
        return {"color": colours["exact"], "marker": "", "linestyle": "-"}
    if sampler == "monte-carlo":
        return {"color": colours["baseline"], "marker": "o", "linestyle": "--"}
    colour = SAMPLER_COLOURS.get(sampler, colours["accent"])
    return {"color": colour, "marker": SAMPLER_MARKERS.get(sampler, "o"), "linestyle": "-"}


def colours_of(theme: str) -> dict[str, str]:
    """Return the colours of a theme, "light" or "dark".

    Raises
    ------
    ArgumentError
        If there is no such theme.
    """
    if theme not in COLOURS:
        raise unknown_name("theme", theme, COLOURS)
    return COLOURS[theme]


def matplotlib_style(theme: str) -> dict[str, Any]:
    """Return the rcParams of a theme, for `matplotlib.rc_context`.

    Raises
    ------
    ArgumentError
        If there is no such theme.
    """
    c = colours_of(theme)
    return {
        "figure.facecolor": c["background"],
        "axes.facecolor": c["background"],
        "savefig.facecolor": c["background"],
        "text.color": c["text"],
        "axes.labelcolor": c["text"],
        "axes.edgecolor": c["muted"],
        "axes.titlecolor": c["text"],
        "xtick.color": c["muted"],
        "ytick.color": c["muted"],
        "xtick.labelcolor": c["text"],
        "ytick.labelcolor": c["text"],
        "grid.color": c["line"],
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 10.5,
        "font.size": 10,
        "font.family": "sans-serif",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 6,
        "figure.dpi": 110,
        "savefig.dpi": 150,
        "svg.fonttype": "path",
        "svg.hashsalt": "qtx_lab",
        "figure.constrained_layout.use": True,
    }


def quantity(name: str) -> str:
    """What people call a number that runs write under a short name.

    >>> quantity("num_samples"), quantity("standard_error")
    ('draws per row', 'standard error')
    """
    return QUANTITIES.get(name, name.replace("_", " "))


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks of a logarithmic axis and their labels: 1, 2 and 5 of every decade, only 1 from three decades on.

    Where there is none of these, there is one in the middle.

    Parameters
    ----------
    low, high : float
        The ends of the axis, both positive.

    Examples
    --------
    >>> log_ticks(0.04, 0.3)
    [(0.05, '0.05'), (0.1, '0.1'), (0.2, '0.2')]
    >>> [text for _, text in log_ticks(3e-7, 0.6)]
    ['10⁻⁶', '10⁻⁵', '10⁻⁴', '10⁻³', '10⁻²', '10⁻¹']
    """
    first, last = math.log10(low), math.log10(high)
    stride = math.ceil(max(1, last - first) / MAX_DECADES)
    exponents = [e for e in range(math.floor(first), math.ceil(last) + 1) if e % stride == 0]
    factors = (1, 2, 5) if last - first < 3 else (1,)
    ticks = [float(f"{m}e{e}") for e in exponents for m in factors]
    middle = float(f"{10 ** ((first + last) / 2):.3g}")
    ticks = [tick for tick in ticks if low <= tick <= high] or [middle]
    return list(zip(ticks, tick_labels(ticks), strict=True))


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of the positive ticks of one axis: plain numbers, or all powers where one is small or large.

    >>> tick_labels([0.001, 0.2, 100]), tick_labels([2e-5, 0.001, 1])
    (['0.001', '0.2', '100'], ['2×10⁻⁵', '10⁻³', '1'])
    """
    is_plain = all(1e-4 <= tick < 1e6 for tick in ticks)
    return [digits(tick, 3) if is_plain else _power(tick, 3) for tick in ticks]


def digits(value: float, count: int) -> str:
    """A number in at most `count` significant digits, with a power of ten where it is small or large.

    The browser's `digits` writes the same.

    >>> digits(0.012345, 3), digits(-1234.5, 3), digits(1.44e-7, 3), digits(0, 3)
    ('0.0123', '−1230', '1.44×10⁻⁷', '0')
    """
    if not math.isfinite(value):
        return "–"
    rounded = float(f"{abs(value):.{count}g}")
    is_plain = rounded == 0 or 1e-4 <= rounded < 1e6
    text = f"{rounded:.{max(count, 6)}g}" if is_plain else _power(rounded, count)
    return f"−{text}" if value < 0 < rounded else text


def _power(value: float, count: int) -> str:
    mantissa, exponent = f"{value:.{count - 1}e}".split("e")
    factor = f"{float(mantissa):g}"
    if int(exponent) == 0:
        return factor
    power = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    return power if factor == "1" else f"{factor}×{power}"


def fixed(value: float, places: int) -> str:
    """A number with some decimal places; what is rounded to zero has no sign.

    >>> fixed(-0.0004, 3), fixed(-0.0006, 3)
    ('0.000', '−0.001')
    """
    text = f"{abs(value):.{places}f}"
    return f"−{text}" if value < 0 and float(text) > 0 else text


def with_error(value: float, half_width: float | None, *, sign: bool = False) -> str:
    """A number and half of its interval, with as many digits as that allows; `withError` of the browser.

    Parameters
    ----------
    value : float
    half_width : float or None
        Half of the 95 % interval; without one, or where it is 0, the number has three significant digits.
    sign : bool
        Whether a number above 0 has a sign, too, as differences do.

    Examples
    --------
    >>> with_error(0.08312, 0.0041), with_error(0.1504, 0.0213), with_error(0.1504, None)
    ('0.083 ± 0.004', '0.150 ± 0.021', '0.15')
    >>> with_error(0.00071, 0.00032, sign=True), with_error(-0.0001, 0.003, sign=True)
    ('+0.0007 ± 0.0003', '0.000 ± 0.003')
    >>> with_error(1.44e-7, None, sign=True), with_error(0.5, 1e-12)
    ('+1.44×10⁻⁷', '0.50000000 ± <0.00000001')
    """
    if not math.isfinite(value):
        return "–"
    if sign and value > 0:
        text = with_error(value, half_width)
        number = text.partition(" ")[0]
        return f"+{text}" if number.strip("0.") else text
    if half_width is None or not math.isfinite(half_width) or half_width <= 0:
        return digits(value, 3)
    if half_width < 0.5 * 10.0**-MAX_PLACES:  # a bar of zero would mean that the value is exact
        return f"{fixed(value, MAX_PLACES)} ± <{10.0**-MAX_PLACES:.{MAX_PLACES}f}"
    exponent = math.floor(math.log10(half_width) + 1e-9)
    one_digit = half_width / 10**exponent >= 3
    places = min(MAX_PLACES, max(0, 1 - exponent - one_digit))
    return f"{fixed(value, places)} ± {half_width:.{places}f}"
