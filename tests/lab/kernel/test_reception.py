"""A kernel answers while a cell looks on: a real kernel, and two clients that ask it, as two pages do."""

import os
import time

import pytest
from jupyter_client.manager import KernelManager

from tests import PROJECT
from tests.helpers.waiting import SECONDS
from udonlib.lab.kernel.reception import Reception

LOOK = """
import time, ipywidgets
from udonlib.lab.kernel.reception import Reception
slider, seen = ipywidgets.IntSlider(), []
slider.observe(lambda change: seen.append(change["new"]), "value")
with Reception() as reception:
    print("looking", slider.comm.comm_id, flush=True)
    while not reception.is_replaced and 5 not in seen:
        reception.serve()
        time.sleep(0.01)
print("looked", reception.is_replaced, seen)
"""


class Page:
    """A client of a kernel, as a notebook's page is one."""

    def __init__(self, manager: KernelManager) -> None:
        self.client = manager.client(session=manager.session.clone())
        self.client.session.session = os.urandom(8).hex()  # each page has one of its own
        self.client.start_channels()

    def said(self, words: str) -> str:
        """The text that holds these words, once the kernel has printed it."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            message = self.client.get_iopub_msg(timeout=SECONDS)
            if words in message["content"].get("text", ""):
                return message["content"]["text"]
        raise AssertionError(f"waited in vain for {words!r}")

    def reply(self, request: str) -> dict:
        """The answer to a request."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            message = self.client.get_shell_msg(timeout=SECONDS)
            if message["parent_header"]["msg_id"] == request:
                return message["content"]
        raise AssertionError("waited in vain for a reply")

    def settle(self) -> None:
        """Wait until the kernel runs cells again: for a moment after an error it still answers "aborted"."""
        while self.reply(self.client.execute(""))["status"] == "aborted":
            time.sleep(0.01)

    def send(self, kind: str, **content: object) -> str:
        message = self.client.session.msg(kind, content)
        self.client.shell_channel.send(message)
        return message["header"]["msg_id"]


@pytest.fixture
def manager():
    kernel = KernelManager(kernel_name="python3")
    kernel.start_kernel(cwd=str(PROJECT), env=os.environ | {"JUPYTER_PREFER_ENV_PATH": "1"})
    yield kernel
    kernel.shutdown_kernel(now=True)


@pytest.fixture
def page(manager):
    opened = Page(manager)
    opened.client.wait_for_ready(timeout=SECONDS)
    yield opened
    opened.client.stop_channels()


def test_a_page_that_was_reloaded_finds_its_widgets_and_then_takes_over(manager, page):
    looking = page.client.execute(LOOK)
    queued = page.client.execute("print('of the page that is gone')")
    comm = page.said("looking").split()[1]
    page.client.stop_channels()

    again = Page(manager)
    known = again.reply(again.send("comm_info_request", target_name="jupyter.widget"))["comms"]
    assert comm in known
    assert again.reply(again.send("kernel_info_request"))["status"] == "ok"
    again.send("comm_msg", comm_id=comm, data={"method": "update", "state": {"value": 3}, "buffer_paths": []})
    own = again.client.execute("print('own')")
    assert again.said("looked") == "looked True [3]\n"  # the slider was heard, and the cell has ended by itself
    assert again.said("own") == "own\n"
    assert again.reply(own)["status"] == "ok"
    assert again.reply(again.client.execute("print('next')"))["status"] == "ok"
    again.client.stop_channels()
    assert looking != queued


def test_what_the_same_page_asks_for_waits_in_its_order(page):
    cells = [page.client.execute(code) for code in (LOOK, "print('second')", "print('third')")]
    comm = page.said("looking").split()[1]
    page.send("comm_msg", comm_id=comm, data={"method": "update", "state": {"value": 5}, "buffer_paths": []})
    assert page.said("looked") == "looked False [5]\n"
    assert page.said("second")
    assert page.said("third")
    assert [page.reply(cell)["status"] for cell in cells] == ["ok"] * 3


def test_what_was_handed_back_is_not_taken_again(page):
    late = LOOK + "time.sleep(0.5)\nreception.serve()\n"  # a last look, when the others are back where they were
    cells = [page.client.execute(code) for code in (late, "print('second')", "print('third')")]
    comm = page.said("looking").split()[1]
    page.send("comm_msg", comm_id=comm, data={"method": "update", "state": {"value": 5}, "buffer_paths": []})
    assert page.said("second")
    assert page.said("third")
    assert [page.reply(cell)["status"] for cell in cells] == ["ok"] * 3


def test_an_interrupt_ends_what_waits_as_ever(manager, page):
    for number in range(5):  # also where it comes while a message is read
        cells = [page.client.execute(code) for code in (LOOK, *["print('next')"] * 12)]
        page.said("looking")
        time.sleep(0.05 + 0.01 * number)  # until all have come: a kernel runs what comes after an interrupt
        manager.interrupt_kernel()
        assert [page.reply(cell)["status"] for cell in cells] == ["error", *["aborted"] * 12]
        page.settle()
        assert page.reply(page.client.execute("1"))["status"] == "ok"


def test_an_interrupt_before_a_restart_is_told_from_a_person_s(manager, page, tmp_path):
    code = LOOK.replace("with Reception() as reception:", "reception = Reception()\ntry:") + (
        "except KeyboardInterrupt:\n    open({!r}, 'w').write(str(reception.is_ending()))\n    raise\n"
    ).format(str(tmp_path / "ends"))
    code = code.replace('print("looked", reception.is_replaced, seen)\n', "")
    looking = page.client.execute(code)
    page.said("looking")
    manager.interrupt_kernel()
    assert page.reply(looking)["status"] == "error"
    assert (tmp_path / "ends").read_text() == "False"
    page.settle()
    page.client.execute(code)
    page.said("looking")
    manager.shutdown_kernel()
    assert (tmp_path / "ends").read_text() == "True"


def test_without_a_kernel_nothing_is_answered():
    with Reception() as reception:
        reception.serve()
        assert not reception.works
    assert not reception.is_replaced
