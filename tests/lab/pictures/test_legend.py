"""The legend of a figure that is drawn without a browser: whom it names, and the room that it takes."""

import pytest

from udonlib.lab.pictures.canvas import Canvas
from udonlib.lab.pictures.data import Trace
from udonlib.lab.pictures.legend import ENTRY, Legend


def legend(*specs: dict, **layout) -> Legend:
    traces = [Trace({"y": [1], "name": f"name {n}"} | spec, n, False) for n, spec in enumerate(specs)]
    return Legend(traces, layout, Canvas(900, 450, 13, "#000000"))


def names(found: Legend) -> list[str]:
    return [trace.name for trace in found.entries]


def test_it_names_what_is_not_hidden_and_stays_away_from_a_single_trace():
    assert names(legend({}, {"showlegend": False}, {})) == ["name 0", "name 2"]
    assert names(legend({})) == []
    assert names(legend({"showlegend": True})) == ["name 0"]
    assert names(legend({}, {}, showlegend=False)) == []


def test_its_order_is_that_of_what_lies_on_each_other():
    assert names(legend({}, {}, legend={"traceorder": "reversed"})) == ["name 1", "name 0"]
    assert names(legend({"type": "bar"}, {"type": "bar"}, barmode="stack")) == ["name 1", "name 0"]


def test_beside_the_panels_it_takes_its_width_from_them():
    short, long = (legend({"name": name}, {}) for name in ("a", "a name that is very long"))
    assert short.right(70, 900, 870) > long.right(70, 900, 870) + 100
    assert legend({}).right(70, 900, 870) == 870
    assert short.bottom(70, 900, 85, 450, 390) == 390


def test_below_the_panels_it_takes_as_many_rows_as_it_needs():
    lying = {"orientation": "h", "x": 0, "y": -0.1}
    one, three = (legend(*[{}] * n, legend=lying) for n in (3, 20))
    places = [each.bottom(70, 900, 85, 450, 440) for each in (one, three)]
    assert places[0] - places[1] == pytest.approx(2 * ENTRY / 1.1, abs=1)
    assert one.right(70, 900, 870) == 870
    assert legend({}, {}, legend=lying | {"yref": "container"}).bottom(70, 900, 85, 450, 390) == 390
