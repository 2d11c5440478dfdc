"""What a kernel answers while a cell only looks on: widgets live, also in a page that was reloaded meanwhile.

    with Reception() as reception:
        while ... and not reception.is_replaced:
            reception.serve()

A kernel does one thing after the other, so a cell that waits for hours would leave all others waiting. Here the cell
takes the messages itself: those of widgets, and those that a page asks when it is opened, are answered at once; the
rest, as the cells that are to run next, waits in its order. Where a cell is to run that another page has asked for, or
this one after a reload, then the cell that looks on has been left behind: `is_replaced`. It is to end, what its page
had asked for is dropped, since nobody would see it, and the others' turn comes.

The messages lie in a socket of ipykernel 7 that only the kernel's main thread reads, which is where a cell runs. With
another kernel, or none, nothing is answered: `works` is False.
"""

from __future__ import annotations

import inspect
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from IPython.core.getipython import get_ipython

ENDING_SECONDS, POLL_SECONDS = 1.5, 0.02  # between an interrupt and what it was for
HAND_SECONDS = 5.0  # that one thread waits for the other at most
ANSWERED = ("comm_open", "comm_msg", "comm_close", "comm_info_request", "kernel_info_request")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let an interrupt wait until the block is left: of a message that is half read the rest would be read as one."""
    came: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])


class Reception:
    """Answers messages in place of a busy kernel, as a context; `serve()` is to be called several times a second."""

    def __init__(self) -> None:
        self.is_replaced = False
        self._is_open = True
        self._waiting: list[tuple[str, Any]] = []  # who asked, and the message
        kernel: Any = getattr(get_ipython(), "kernel", None)
        self._kernel = kernel
        self._inbox: Any = None
        with suppress(AttributeError):
            manager = kernel.shell_channel_thread.manager
            if threading.current_thread() is kernel.shell_channel_thread.parent_thread:
                self._inbox = manager.get_shell_channel_to_subshell_pair(None)
                self._outbox = manager.get_subshell_to_shell_channel_socket(None)
                self._client = kernel.get_parent("shell")["header"]["session"]

    @property
    def works(self) -> bool:
        """Whether it can answer here."""
        return self._inbox is not None

    def __enter__(self) -> Reception:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let the kernel have what waits. From then on nothing is taken any more: nobody would hand it on."""
        self._is_open = False
        if not self.works:
            return
        with _undisturbed():
            # The thread that brings messages stands still meanwhile: what it brings overtakes nothing that waits.
            stands, known = threading.Event(), threading.Event()
            back: list[Any] = []

            def hand_back() -> None:
                stands.set()
                known.wait(HAND_SECONDS)
                for frames in back:
                    self._inbox.from_socket.send_multipart(frames, copy=False)

            self._kernel.shell_channel_thread.io_loop.add_callback(hand_back)
            stands.wait(HAND_SECONDS)
            self._take_all()
            for client, frames in self._waiting:
                if self.is_replaced and client == self._client:
                    self._drop(frames)
                else:
                    back.append(frames)
            self._waiting = []
            known.set()

    def is_ending(self, seconds: float = ENDING_SECONDS) -> bool:
        """Whether the kernel is being shut down or restarted: it is interrupted before. Waits for the word of that."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if getattr(self._kernel, "_shutdown_message", None) is not None:
                return True
            time.sleep(POLL_SECONDS)
        return False

    def serve(self) -> None:
        """Answer what can be answered now; nothing once the context is left."""
        if self.works and self._is_open:
            with _undisturbed():
                self._take_all()

    def _take_all(self) -> None:
        inbox = self._inbox.to_socket
        while inbox.poll(0):
            frames = inbox.recv_multipart(copy=False)
            self._waiting.append(("", frames))
            self._take(frames)

    def _take(self, frames: Any) -> None:
        try:
            header = self._read(frames, content=False)[1]["header"]
        except Exception:  # none that is read here, such as the kernel's own word that it stops aborting
            return
        kind, client = header["msg_type"], header["session"]
        self._waiting[-1] = (client, frames)
        if kind in ANSWERED:
            self._waiting.pop()
            self._answer(kind, *self._read(frames))
        elif kind == "execute_request" and client != self._client:
            self.is_replaced = True

    def _read(self, frames: Any, content: bool = True) -> tuple[Any, Any]:
        """Who sent a message, and the message. One that was read with its content is refused the next time."""
        idents, rest = self._kernel.session.feed_identities(frames, copy=False)
        return idents, self._kernel.session.deserialize(rest, content=content, copy=False)

    def _answer(self, kind: str, idents: Any, message: Any) -> None:
        kernel, parent = self._kernel, self._kernel.get_parent("shell")
        kernel._publish_status("busy", "shell", parent=message)
        try:
            done = kernel.shell_handlers[kind](self._outbox, idents, message)
            if inspect.iscoroutine(done):
                with suppress(StopIteration):
                    done.send(None)  # none of these waits for anything
        except Exception:
            kernel.log.error("a message was not answered: %s", kind, exc_info=True)
        finally:
            kernel._publish_status("idle", "shell", parent=message)
            kernel._publish_status("busy", "shell", parent=parent)

    def _drop(self, frames: Any) -> None:
        with suppress(Exception):
            idents, message = self._read(frames)
            if message["header"]["msg_type"] == "execute_request":
                self._kernel._send_abort_reply(self._outbox, message, idents)
                self._kernel._publish_status("idle", "shell", parent=message)
