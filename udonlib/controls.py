"""What every control of the notebooks has: a name to be found by, and an answer while a cell trains."""

import re
from typing import TypeVar

from ipywidgets import Button, DOMWidget

Control = TypeVar("Control", bound=DOMWidget)


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
