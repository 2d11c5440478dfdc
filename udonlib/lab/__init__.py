"""What notebooks show; nothing outside imports it."""

import os
import sys

LOADING = "udon-loading"  # the output that says that something is about to happen


def _say_that_it_loads() -> None:
    """Show a line before the imports that take seconds; `views.style.use_renderer` takes it away."""
    if not os.environ.get("JPY_SESSION_NAME") or os.environ.get("UDON_LIVE") == "0" or "IPython" not in sys.modules:
        return
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    if hasattr(get_ipython(), "kernel"):
        text = "Loading: the first time this takes some seconds ..."
        display({"text/html": f"<i>{text}</i>", "text/plain": text}, raw=True, display_id=LOADING)


_say_that_it_loads()
