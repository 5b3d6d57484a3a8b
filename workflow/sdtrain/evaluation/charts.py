"""Line charts of the report: the coordinates of points, ticks and labels."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

POINTS = 300  # of a curve


def chart(title: str, series: pd.Series, width: int = 360, height: int = 190) -> dict[str, Any]:
    """Return the coordinates of a curve (index x, value y) and of its ticks; both axes begin at 0."""
    left, bottom, top, right = 40, 24, 8, 12
    x_max, y_max = max(series.index.max(), 1e-9), max(series.max(), 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + x / x_max * (width - left - right)
        return round(across, 1), round(height - bottom - y / y_max * (height - bottom - top), 1)

    def line(values: pd.Series) -> str:
        thin = values.iloc[:: math.ceil(len(values) / POINTS)]
        return " ".join("{},{}".format(*place(x, y)) for x, y in zip(thin.index.tolist(), thin.tolist(), strict=True))

    return {
        "title": title,
        "size": (width, height),
        "frame": (left, top, width - right, height - bottom),
        "x_ticks": [(place(x, 0)[0], short(x)) for x in ticks(x_max)],
        "y_ticks": [(place(0, y)[1], short(y)) for y in ticks(y_max)],
        "raw": line(series),
        "smooth": line(smoothed(series)),
    }


def smoothed(series: pd.Series) -> pd.Series:
    """Return the centred mean over a window of a 15th of the points."""
    return series.rolling(2 * (len(series) // 30) + 1, center=True, min_periods=1).mean()


def ticks(end: float) -> list[float]:
    """Return three to six round numbers from 0 to `end`."""
    unit = 10 ** math.floor(math.log10(end / 2.5))
    step = next(unit * factor for factor in (1, 2, 5, 10) if end / (unit * factor) < 6)
    return [i * step for i in range(int(end / step) + 1)]


def short(value: float) -> str:
    """Return a number in a short form, such as 1.5k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
