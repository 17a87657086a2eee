"""Looks go on until one says no or the block ends, and none comes later."""

import threading
import time

import pytest

from introspect_ray.data.watching import watching


def test_it_looks_until_the_block_ends_even_if_that_fails():
    looks, thrice = [], threading.Event()

    def look():
        looks.append(threading.current_thread().name)
        if len(looks) == 3:
            thrice.set()
        return True

    def block():
        with watching(look, 0.001, "a name"):
            assert thrice.wait(60)
            raise ValueError

    with pytest.raises(ValueError):
        block()
    seen = len(looks)
    assert set(looks) == {"a name"}
    time.sleep(0.02)
    assert len(looks) == seen


def test_a_look_that_says_no_is_the_last():
    looks, looked = [], threading.Event()

    def look():
        looks.append(1)
        looked.set()
        return False

    with watching(look, 0.001, "a name"):
        assert looked.wait(60)
        time.sleep(0.02)
    assert looks == [1]
