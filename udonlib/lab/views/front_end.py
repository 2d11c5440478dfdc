"""What every control of the notebooks has: a name to be found by, an answer while a cell trains, a still, patience.

A notebook that was saved and is opened again has no widgets, and neither has its export: "model not found". So each is
shown through `Still`, which leaves a picture or HTML of it in the notebook.
"""

import re
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from IPython.display import display
from ipywidgets import HTML, Button, DOMWidget, VBox

from udonlib.runs.watch import duration

Control = TypeVar("Control", bound=DOMWidget)
KEEP_SECONDS = 5.0  # between two stills of a widget that changes by itself


def named(widget: Control, name: str) -> Control:
    """Give a widget the CSS class `udon-<name>`; signs that a class cannot have become _."""
    widget.add_class("udon-" + re.sub(r"[^A-Za-z0-9_-]", "_", name))
    return widget


def answering(widget: Control) -> Control:
    """Have a control's messages answered by whichever thread of the kernel is free.

    ipykernel 7.4 sends them to the thread that published last, which is the busy one while a cell trains.
    """
    if hasattr(widget.comm, "_reply_subshell_for"):
        widget.comm._reply_subshell_for = None
    return widget


def button(name: str, text: str, tip: str, icon: str = "") -> Button:
    """A button with a name, as wide as its text. `icon` is one of Font Awesome's."""
    return answering(named(Button(description=text, tooltip=tip, icon=icon, layout={"width": "auto"}), name))


class Still:
    """A widget on show, and what a saved notebook keeps of it: HTML in an output of its own, above the widget's.

    The living widget brings the style that hides the still; where it is not found, the still shows, and hides the front
    end's word on that. (In one output with the widget a still would never show: JupyterLab takes the widget's view.)

    Args:
        widget: to show.
        html: what is seen of it.
    """

    def __init__(self, widget: DOMWidget, html: str) -> None:
        self._name = f"udon-still-{secrets.token_hex(4)}"
        self._html, self._next = html, time.monotonic() + KEEP_SECONDS
        hiding = f"<style>.jp-OutputArea-child:has(.{self._name}), .{self._name} {{ display: none; }}</style>"
        alive = VBox([HTML(hiding, layout={"display": "none"}), widget])
        view: Any = alive._repr_mimebundle_()
        self._place = display(self._bundle(), raw=True, display_id=True)
        self._living = display({**view, "text/plain": ""}, raw=True, display_id=True)

    def keep(self, make: Callable[[], str], now: bool = False) -> bool:
        """Replace the still by a newer one, unless one is so new already that this can wait. Whether it was replaced.

        Args:
            make: gives the HTML.
            now: do not wait.
        """
        if not now and time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + KEEP_SECONDS
        html = make()
        if html != self._html:
            self._html = html
            if self._place is not None:  # else there is no notebook here
                self._place.update(self._bundle(), raw=True)
        return True

    def leave(self, html: str) -> None:
        """Let the still take the widget's place for good."""
        self.keep(lambda: html, now=True)
        if self._living is not None:
            self._living.update({"text/plain": ""}, raw=True)

    def _bundle(self) -> dict[str, str]:
        """The still. Its style hides a view that has become words, as of a widget that was not found."""
        lost = f".jp-OutputArea-child:has(.{self._name}) + .jp-OutputArea-child:has(> .jupyter-widgets)"
        style = f"<style>{lost} {{ display: none; }}</style>"
        return {"text/html": f'<div class="{self._name}">{style}{self._html}</div>', "text/plain": ""}


class Ticking:
    """Says a text with the seconds since, once a second, as long as the block runs."""

    def __init__(self, text: str, say: Callable[[str], None]) -> None:
        self._text, self._say, self._end = text, say, threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _tick(self) -> None:
        began = time.monotonic()
        while True:
            self._say(f"{self._text}; {duration(time.monotonic() - began)} so far. Everything else goes on.")
            if self._end.wait(1.0):
                return
