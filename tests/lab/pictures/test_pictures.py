"""Figures drawn without a browser show the same data at the same places, in the same colours, and nothing is cut."""

import base64
import io

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from udonlib.lab.pictures import pictures
from udonlib.lab.pictures.data import PictureError
from udonlib.lab.views.charts import panels
from udonlib.lab.views.style import TEMPLATE

RED, BLUE, GREEN = "#ff0000", "#0000ff", "#00a000"
PLAIN = {"template": TEMPLATE, "width": 900, "height": 450, "margin": {"l": 100, "r": 100, "t": 50, "b": 50}}
LEFT, RIGHT, TOP, BOTTOM = 100, 800, 50, 400  # of its panel


def drawn(figure: go.Figure, **layout: object) -> np.ndarray:
    """The pixels of a picture: red, green, blue, opacity."""
    png = pictures.draw(figure.update_layout(layout).to_dict())
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(int)


def where(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Which pixels have a colour, or nearly."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels[..., :3] - wanted).max(axis=2) < 40) & (pixels[..., 3] > 200)


def at(pixels: np.ndarray, colour: str) -> tuple[float, float]:
    """The middle of what has a colour: x, y."""
    rows, columns = np.nonzero(where(pixels, colour))
    return float(columns.mean()), float(rows.mean())


def test_a_point_is_where_its_numbers_say():
    figure = go.Figure(go.Scatter(x=[2.5], y=[9], mode="markers", marker={"color": RED, "size": 10}))
    pixels = drawn(figure, **PLAIN, xaxis_range=[0, 10], yaxis_range=[0, 10])
    assert pixels.shape == (450, 900, 4)
    assert at(pixels, RED) == pytest.approx((LEFT + 0.25 * 700, BOTTOM - 0.9 * 350), abs=1)
    assert 60 < where(pixels, RED).sum() < 95  # a disc of ten pixels


def test_numbers_may_be_stored_as_bytes():
    stored = {"dtype": "f4", "bdata": base64.b64encode(np.float32([2.5]).tobytes()).decode()}
    figure = {"data": [{"x": stored, "y": [5], "mode": "markers", "marker": {"color": RED, "size": 10}}]}
    figure["layout"] = {"xaxis": {"range": [0, 10]}, "yaxis": {"range": [0, 10]}, "margin": PLAIN["margin"]}
    pixels = np.asarray(Image.open(io.BytesIO(pictures.draw(figure))).convert("RGBA")).astype(int)
    assert at(pixels, RED) == pytest.approx((LEFT + 0.25 * 700, 225), abs=1)


def test_a_logarithmic_axis_and_categories_have_their_places():
    dot = {"mode": "markers", "marker": {"color": RED, "size": 10}}
    figure = go.Figure(go.Scatter(x=[10], y=["b"], **dot))
    pixels = drawn(
        figure,
        **PLAIN,
        xaxis={"type": "log", "range": [0, 2]},
        yaxis={"categoryorder": "array", "categoryarray": ["a", "b", "c"], "range": [-0.5, 2.5]},
    )
    assert at(pixels, RED) == pytest.approx(((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2), abs=1)


def test_lines_may_go_in_steps_and_have_gaps():
    look = {"mode": "lines", "line": {"color": RED, "width": 4, "shape": "hv"}}
    figure = go.Figure(go.Scatter(x=[0, 5, None, 8, 10], y=[2, 6, None, 8, 8], **look))
    red = where(drawn(figure, **PLAIN, xaxis_range=[0, 10], yaxis_range=[0, 10]), RED)
    height = {x: np.flatnonzero(red[:, LEFT + 70 * x]).mean() for x in (2, 4, 9)}
    assert height == pytest.approx({2: BOTTOM - 70, 4: BOTTOM - 70, 9: BOTTOM - 280}, abs=2)
    assert not red[:, LEFT + 70 * 6 + 35].any()


def test_stacked_areas_lie_on_each_other():
    fig = panels("Shares", [""], 1, 1, height=450)
    for name, shares, colour in (("a", [20, 60], RED), ("b", [80, 40], BLUE)):
        area = go.Scatter(x=[0, 10], y=shares, name=name, mode="lines", stackgroup="s", fillcolor=colour)
        fig.add_trace(area.update(line={"color": colour, "width": 0.5, "shape": "hv"}))
    pixels = drawn(fig, showlegend=False, margin=PLAIN["margin"], xaxis_range=[0, 10], yaxis_range=[0, 100])
    column = slice(TOP, BOTTOM), (LEFT + RIGHT) // 2
    assert where(pixels, RED)[column].sum() == pytest.approx(0.2 * 350, abs=2)
    assert where(pixels, BLUE)[column].sum() == pytest.approx(0.8 * 350, abs=2)


@pytest.mark.parametrize(("mode", "top"), [("group", 10), ("stack", 15)])
def test_bars_stand_beside_or_on_each_other_from_zero(mode, top):
    figure = go.Figure([go.Bar(x=["a"], y=[10], marker_color=RED), go.Bar(x=["a"], y=[5], marker_color=BLUE)])
    pixels = drawn(figure, **PLAIN, barmode=mode, showlegend=False)
    red, blue = (where(pixels, colour) for colour in (RED, BLUE))
    heights = [each.any(axis=1).sum() for each in (red, blue)]
    assert heights[0] == pytest.approx(2 * heights[1], abs=3)
    assert heights[0] == pytest.approx(350 * 0.95 * 10 / top, abs=3)  # some room above the highest
    beside = red.any(axis=0) & blue.any(axis=0)
    assert beside.any() == (mode == "stack")
    lowest = np.flatnonzero(red.any(axis=1)).max()
    assert lowest == pytest.approx(BOTTOM, abs=2)


def test_bars_of_two_levels_name_both():
    names = [("flags", "flags", "earth", "earth"), ("student", "teacher", "student", "teacher")]
    figure = go.Figure(go.Bar(x=names, y=[4, 3, 2, 1], marker={"color": RED, "pattern": {"shape": ["", "/", "", "/"]}}))
    red = where(drawn(figure, **PLAIN | {"margin": {"l": 100, "r": 100, "t": 50, "b": 110}}), RED)
    columns = red.any(axis=0)
    assert (np.diff(columns.astype(int)) == 1).sum() == 4
    solid, hatched = red[:, LEFT + 88].sum(), red[:, LEFT + 88 + 175].sum()
    assert hatched < 0.75 * solid * 0.95  # white lines across it, besides being lower


def test_error_bars_reach_from_low_to_high():
    error = {"array": [3], "arrayminus": [1], "color": BLUE, "thickness": 2, "width": 5}
    figure = go.Figure(go.Scatter(x=[5], y=[5], mode="markers", marker={"color": RED, "size": 6}, error_y=error))
    pixels = drawn(figure, **PLAIN, xaxis_range=[0, 10], yaxis_range=[0, 10])
    rows = np.flatnonzero(where(pixels, BLUE).any(axis=1))
    assert (rows.min(), rows.max()) == pytest.approx((BOTTOM - 8 * 35, BOTTOM - 4 * 35), abs=2)


def test_a_heatmap_has_the_scales_colours_and_its_numbers():
    heat = go.Heatmap(x=["a", "b"], y=["c"], z=[[0, 1]], colorscale=[[0, RED], [1, BLUE]], showscale=False)
    pixels = drawn(go.Figure(heat), **PLAIN)
    for colour, x in ((RED, LEFT + 175), (BLUE, LEFT + 525)):
        assert at(pixels, colour) == pytest.approx((x, 225), abs=2)
    numbered = drawn(go.Figure(heat.update(text=[["7", "8"]], texttemplate="%{text}")), **PLAIN)
    assert 20 < (numbered != pixels).any(axis=2).sum() < 400


def test_marks_across_a_panel_and_notes_are_at_their_places():
    figure = go.Figure(go.Scatter(x=[0, 10], y=[0, 10], mode="lines", line_color=BLUE))
    figure.add_vline(5, line={"color": RED, "width": 3})
    note = {"text": '<span style="color:#00a000">■</span> name', "showarrow": False, "font_color": "#000000"}
    figure.add_annotation(x=1, y=1, xref="x", yref="paper", yanchor="bottom", **note)
    pixels = drawn(figure, **PLAIN, xaxis_range=[0, 10], yaxis_range=[0, 10])
    assert at(pixels, RED) == pytest.approx(((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2), abs=3)
    x, y = at(pixels, GREEN)  # left of the name, which is centred at 1
    assert LEFT < x < LEFT + 70
    assert TOP - 20 < y < TOP


@pytest.mark.parametrize("lies", [False, True])
def test_no_name_is_cut_however_long(lies):
    fig = panels("A title", ["one", "two"], 1, 2, height=430)
    for column in (1, 2):
        fig.add_trace(go.Scatter(x=[0, 1], y=[1e6, 2e6], name="a rather long name of a domain"), row=1, col=column)
    fig.add_trace(go.Scatter(x=[0, 1], y=[1, 2], name="another long name"), row=1, col=1)
    fig.update_yaxes(title="a title of the axis", col=1)
    layout = {"legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}} if lies else {}
    ink = drawn(fig, **layout)[..., 3] > 0
    for border in (ink[:3], ink[-3:], ink[:, :3], ink[:, -3:]):
        assert not border.any()
    beside = ink[:, 880:].sum()
    assert (beside > 0) != lies or lies


def test_the_page_is_transparent_and_an_empty_panel_stays_empty():
    fig = panels("T", ["one", "two"], 1, 2, height=300)
    fig.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines"), row=1, col=1)
    pixels = drawn(fig)
    assert (pixels[..., 3] == 0).mean() > 0.9
    assert not pixels[100:, 480:, 3].any()  # no axis without data


def test_a_figure_without_data_says_why():
    fig = go.Figure().update_layout(template=TEMPLATE, title="Nothing", height=200)
    fig.add_annotation(text="because", showarrow=False).update_xaxes(visible=False).update_yaxes(visible=False)
    rows = np.flatnonzero((drawn(fig)[..., 3] > 0).any(axis=1))
    assert rows.min() < 60
    assert 85 < rows.max() < 130


@pytest.mark.parametrize(
    ("figure", "what"),
    [
        (go.Figure(go.Box(y=[1])), "trace 'box'"),
        (go.Figure(go.Scatter(x=[1], y=[1], mode="markers", marker_symbol="hourglass")), "marker 'hourglass'"),
        (go.Figure(go.Scatter(y=[1])).add_hrect(0, 1), "shape 'rect'"),
        (go.Figure(go.Scatter(y=[1, 2], fill="tozeroy")), "trace 'scatter'"),
        (go.Figure(go.Scatter(x=["2020-01-01"], y=[1])).update_xaxes(type="date"), "axis of type 'date'"),
        (go.Figure(go.Scatter(y=[1])).add_annotation(text="here", x=0, y=1), "arrow"),
        (go.Figure(go.Bar(x=[[1], [2], [3]], y=[1])), "form"),
    ],
)
def test_what_only_a_browser_draws_is_named(figure, what):
    with pytest.raises(PictureError, match=what):
        pictures.draw(figure.to_dict())
