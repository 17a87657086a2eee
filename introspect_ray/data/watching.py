"""A look at something every so often, from a thread, while a block runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watching(look: Callable[[], bool], every_s: float, name: str) -> Iterator[None]:
    """While the block runs, a thread calls `look` every `every_s` seconds, as long as it says True.

    Args:
        name: of the thread.
    """
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(every_s):
            if not look():
                return

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
