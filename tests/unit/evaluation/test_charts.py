"""Tests of the charts of the report: coordinates of points, ticks and labels."""

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtrain.evaluation import charts


@given(st.floats(1e-6, 1e12))
def test_ticks_are_few_and_within_the_range(end):
    found = charts.ticks(end)
    assert found[0] == 0 and 3 <= len(found) <= 7 and found[-1] <= end * (1 + 1e-9)
    assert math.isclose(found[-1], end, rel_tol=0.5)


def test_chart_places_points():
    chart = charts.chart("loss", pd.Series([0, 5, 10], index=[0, 50, 100]), width=360, height=190)
    assert chart["raw"] == chart["smooth"] == "40.0,166.0 194.0,87.0 348.0,8.0"
    assert chart["x_ticks"][0] == (40.0, "0") and chart["x_ticks"][-1] == (348.0, "100")
    assert charts.chart("loss", pd.Series([0.0], index=[1]))["raw"] == "348.0,166.0"


def test_long_curves_are_thinned_and_smoothed():
    points = pd.Series([i % 2 for i in range(3001)])
    assert len(charts.chart("loss", points)["raw"].split()) <= charts.POINTS
    assert all(abs(y - 0.5) < 0.01 for _, y in charts.smoothed(points).items())


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (0.25, "0.25"), (999, "999"), (1500, "1.5k"), (2e6, "2M"), (3e9, "3G")]
)
def test_short_numbers(value, text):
    assert charts.short(value) == text
