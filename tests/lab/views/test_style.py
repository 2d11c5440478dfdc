"""Colours that everybody can tell apart on every page, and a renderer that never blocks a notebook."""

import base64
import copy
import importlib.util
import io
import itertools
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from PIL import Image

from tests.helpers.waiting import SECONDS
from udonlib import lab
from udonlib.lab.pictures import pictures
from udonlib.lab.views import style

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    to_cones = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    to_cones.append([0.0883024619, 0.2817188376, 0.6299787005])
    to_lab = [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099]]
    to_lab.append([0.0259040371, 0.7827717662, -0.8086757660])
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ np.clip(rgb, 0, 1))


def contrast(first: str, second: str) -> float:
    lighter, darker = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] + 0.05 for c in (first, second)), reverse=True)
    return lighter / darker


@pytest.mark.parametrize("sight", SIGHT)
def test_domain_colours_can_be_told_apart_with_every_kind_of_sight(sight):
    seen = [oklab(np.array(SIGHT[sight]) @ linear(colour)) for colour in style.PALETTE]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 0.08


def test_colours_stand_out_from_light_and_dark_pages():
    for colour in style.PALETTE:
        assert contrast(colour, "#ffffff") > 2.4
        assert contrast(colour, "#111111") > 3.2
    for page in ("#ffffff", "#111111"):
        assert contrast(style.TEXT, page) > 4


def test_a_domain_of_the_benchmarks_has_one_colour_alone_and_among_others():
    all_eight = style.domain_colours(["emoji", "flags", "logos", "icons", "fonts", "kanji", "fashion", "earth"])
    assert len(set(all_eight.values())) == 8
    assert style.domain_colours(["kanji"]) == {"kanji": all_eight["kanji"]}
    assert len(set(style.domain_colours("cars sop inshop inat met gldv2 food2k rp2k".split()).values())) == 8


def test_other_domains_get_colours_of_their_own_whatever_their_order():
    names = ["shoes", "plates", "emoji", "birds", "doors"]
    colours = style.domain_colours(names)
    assert list(colours) == names
    assert len(set(colours.values())) == len(names)
    assert style.domain_colours(reversed(names)) == colours
    many = style.domain_colours(f"domain {i}" for i in range(16))
    assert {list(many.values()).count(colour) for colour in style.PALETTE} == {2}


@pytest.fixture
def default_renderer():
    before, png = pio.renderers.default, pio.renderers["png"]
    yield
    pio.renderers.default = before
    pio.renderers["png"] = png


def shown(figure: go.Figure) -> dict[str, str]:
    """What a notebook stores of a figure."""
    return pio.renderers._build_mime_bundle(figure.to_dict())


def no_browser(monkeypatch) -> None:
    from choreographer.browsers.chromium import Chromium

    monkeypatch.setattr(Chromium, "find_browser", classmethod(lambda cls, **_: None))


def no_kaleido(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kaleido" else found(name))


@pytest.mark.parametrize("without", [no_browser, no_kaleido])
def test_without_a_browser_figures_are_stored_with_a_picture_and_need_no_network(
    without, monkeypatch, capsys, default_renderer
):
    without(monkeypatch)
    assert style.use_renderer() == "plotly_mimetype+png"
    bundle = shown(go.Figure(go.Bar(y=[1], marker_color="#ff0000")))
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/png"}
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).convert("RGBA")
    assert picture.size == (style.PNG_WIDTH, 450)
    assert (np.asarray(picture) == (255, 0, 0, 255)).all(axis=2).sum() > 10_000
    assert capsys.readouterr().out == ""


def test_a_figure_that_only_a_browser_draws_goes_without_a_picture_and_says_so(monkeypatch, capsys, default_renderer):
    no_browser(monkeypatch)
    style.use_renderer()
    assert set(shown(go.Figure(go.Box(y=[1, 2])))) == {"application/vnd.plotly.v1+json"}
    assert capsys.readouterr().out == (
        "A figure has no static picture: only Chrome or Chromium draws its trace 'box'.\n"
    )


def test_the_browser_starts_while_the_notebook_goes_on(monkeypatch, default_renderer):
    come, drawn = threading.Event(), []
    monkeypatch.setattr(style, "_start_the_one_browser", lambda: come.wait(SECONDS))
    monkeypatch.setattr(style, "_by_the_one_browser", lambda *_: drawn.append(come.is_set()) or b"png")
    style.use_renderer()  # at once
    assert not come.is_set()
    threading.Timer(0.1, come.set).start()
    assert shown(go.Figure(go.Bar(y=[1])))["image/png"] == base64.b64encode(b"png").decode()
    assert drawn == [True]  # a figure waits for it


@pytest.fixture
def started(monkeypatch):
    """A browser that is there."""
    monkeypatch.setattr(style, "_start_the_one_browser", lambda: None)


def test_a_browser_that_dies_costs_no_picture(monkeypatch, capsys, started):
    import kaleido

    calls = []

    def die(*_, **__):
        calls.append(1)
        raise RuntimeError("Executor is closed.")

    monkeypatch.setattr(kaleido, "calc_fig_sync", die)
    monkeypatch.setattr(kaleido, "calc_fig", die)
    monkeypatch.setattr(pictures, "draw", lambda figure, width: b"drawn")
    renderer = style._Pictures()
    figure = go.Figure(go.Bar(y=[1])).to_dict()
    drawn = [copy.copy(renderer).to_mimebundle(figure)["image/png"] for _ in range(3)]  # as plotly does
    assert [base64.b64decode(png) for png in drawn] == [b"drawn"] * 3
    assert len(calls) == 2  # the one browser, then one of its own
    assert capsys.readouterr().out.count("does not answer") == 1


def test_where_the_one_browser_hangs_each_figure_gets_its_own(monkeypatch, capsys, started):
    import kaleido

    over = threading.Event()

    async def draw(figure, opts, kopts):
        return b"png of " + opts["format"].encode()

    monkeypatch.setattr(style, "PNG_SECONDS", 3.0)  # enough for the one that does not hang
    monkeypatch.setattr(kaleido, "calc_fig_sync", lambda *_, **__: over.wait(SECONDS))
    monkeypatch.setattr(kaleido, "calc_fig", draw)
    renderer = style._Pictures()
    figure = go.Figure(go.Bar(y=[1])).to_dict()
    drawn = [copy.copy(renderer).to_mimebundle(figure)["image/png"] for _ in range(2)]
    over.set()
    assert [base64.b64decode(png) for png in drawn] == [b"png of png"] * 2
    assert renderer.ways == [style._by_a_browser_of_its_own]  # nobody waits for the other one again
    assert capsys.readouterr().out == ""


def test_a_teacher_looks_the_same_however_the_others_are_listed():
    looks = style.teacher_looks(["b", "a", "c"])
    assert looks == style.teacher_looks(["c", "b", "a", "a"])
    assert len({(look.colour, look.symbol, look.dash) for look in looks.values()}) == 3
    assert len(style.teacher_looks("abcdef")) == 6


def test_a_line_says_that_it_loads_until_figures_can_be_shown(monkeypatch, started, default_renderer):
    shown: list[tuple[str, str]] = []

    def noted(bundle, raw, display_id=""):
        shown.append((bundle["text/html"], display_id))

    kernel = SimpleNamespace(kernel=None)
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: kernel)
    monkeypatch.setattr("IPython.display.display", noted)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    lab._say_that_it_loads()  # a batch: nobody looks
    monkeypatch.setenv("JPY_SESSION_NAME", "runs.ipynb")
    monkeypatch.setenv("UDON_LIVE", "0")
    lab._say_that_it_loads()
    assert shown == []
    monkeypatch.delenv("UDON_LIVE")
    lab._say_that_it_loads()
    [(text, place)] = shown
    assert "Loading" in text
    monkeypatch.setattr(style, "get_ipython", lambda: kernel)
    monkeypatch.setattr(style, "display", noted)
    monkeypatch.setattr(style, "update_display", noted)
    style.use_renderer()
    assert ("", place) in shown


HUNG = """
import asyncio
import kaleido._sync_server
from choreographer.browsers.chromium import Chromium

class Hung:
    def __init__(self, **options):
        pass

    async def __aenter__(self):
        await asyncio.sleep(1e6)

    async def __aexit__(self, *error):
        pass

kaleido._sync_server.Kaleido = Hung
Chromium.find_browser = classmethod(lambda *_, **__: "chromium")
from udonlib.lab.views import style

style.LEAVE_SECONDS = 0.1
style.use_renderer()
style.pio.renderers["png"]._browser.join()
print("over")
"""


def test_a_process_ends_though_its_browser_never_came_up():
    pytest.importorskip("kaleido")
    ended = subprocess.run([sys.executable, "-c", HUNG], capture_output=True, text=True, timeout=SECONDS)
    assert (ended.returncode, ended.stdout) == (0, "over\n"), ended.stderr
