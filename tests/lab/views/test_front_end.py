"""What a saved notebook keeps of a widget: a still that the living widget hides."""

import re

import ipywidgets
import pytest
from ipywidgets import Button

from tests.helpers.waiting import wait_until
from udonlib.lab.views import front_end
from udonlib.lab.views.front_end import Still, Ticking, answering, button, named

VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def shown(monkeypatch) -> list[dict]:
    """The outputs of a cell, each as it is now."""
    outputs: list[dict] = []

    def display(bundle, raw, display_id):
        assert raw
        assert display_id
        outputs.append(bundle)
        number = len(outputs) - 1

        class Handle:
            def update(self, new, raw):
                assert raw
                outputs[number] = new

        return Handle()

    monkeypatch.setattr(front_end, "display", display)
    return outputs


def test_a_widget_is_shown_below_its_still_which_it_hides(shown):
    Still(ipywidgets.IntSlider(), "<b>as it was</b>")
    still, living = shown
    assert set(still) == {"text/html", "text/plain"}
    assert "<b>as it was</b>" in still["text/html"]
    [name] = re.findall(r'<div class="([\w-]+)">', still["text/html"])
    hiding, slider = ipywidgets.widgets.widget._instances[living[VIEW]["model_id"]].children
    assert re.search(rf"\.{name} {{ display: none; }}", hiding.value)
    assert isinstance(slider, ipywidgets.IntSlider)


def test_where_there_are_no_widgets_only_the_still_has_something_to_show(shown):
    Still(ipywidgets.IntSlider(), "<b>as it was</b>")
    assert shown[1].keys() == {VIEW, "text/plain"}
    assert shown[0]["text/plain"] == shown[1]["text/plain"] == ""  # a terminal shows neither


def test_two_widgets_do_not_hide_each_others_stills(shown):
    for _ in range(2):
        Still(ipywidgets.IntSlider(), "")
    names = [re.findall(r'<div class="([\w-]+)">', bundle["text/html"])[0] for bundle in (shown[0], shown[2])]
    assert len(set(names)) == 2


def test_a_still_is_replaced_by_newer_ones_now_and_then_or_at_once(shown, monkeypatch):
    still, made = Still(ipywidgets.IntSlider(), "one"), []

    def make() -> str:
        made.append(1)
        return "two"

    assert not still.keep(make)
    assert made == []  # not even made
    assert still.keep(make, now=True)
    assert ">two<" in shown[0]["text/html"].replace("</style>", ">")
    still._next = 0
    assert still.keep(lambda: "three")
    assert "three" in shown[0]["text/html"]


def test_a_still_may_take_the_widgets_place(shown):
    Still(ipywidgets.IntSlider(), "one").leave("<i>the end</i>")
    assert "<i>the end</i>" in shown[0]["text/html"]
    assert shown[1] == {"text/plain": ""}


def test_a_name_becomes_a_class():
    assert "udon-lock-a_b_c" in named(Button(), "lock-a b/c")._dom_classes


def test_a_control_is_answered_by_whichever_thread_is_free():
    one, other = Button(), Button()
    one.comm._reply_subshell_for = "the thread that published last"
    assert answering(one) is one
    assert one.comm._reply_subshell_for is None
    assert answering(other) is other
    assert getattr(other.comm, "_reply_subshell_for", None) is None


def test_a_button_says_what_it_does_and_is_answered():
    made = button("stop", "Stop", "after this step", "stop")
    assert (made.description, made.tooltip, made.icon) == ("Stop", "after this step", "stop")
    assert "udon-stop" in made._dom_classes


def test_who_waits_is_told_the_seconds_until_the_work_ends():
    said: list[str] = []
    with Ticking("computing", said.append):
        wait_until(lambda: len(said) == 3, "the second of two seconds")
    assert [text.split("; ")[0] for text in said] == ["computing"] * 3
    assert len(set(said)) == 3
    n = len(said)
    with pytest.raises(ZeroDivisionError), Ticking("failing", said.append):
        1 / 0  # noqa: B018
    assert len(said) in (n, n + 1)  # its thread has ended
