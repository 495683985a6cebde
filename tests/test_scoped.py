"""A value within a `with` block holds on one thread."""

import threading

import pytest

from gradient_accumulator_tf.replicated.scoped import ScopedValue
from gradient_accumulator_tf.replicated.side_effects import held_back, perform


@pytest.mark.fast
def test_blocks_nest_and_an_error_ends_them():
    scoped = ScopedValue("default")
    with pytest.raises(ZeroDivisionError), scoped.set_to("outer") as value:
        assert value == scoped.value == "outer"
        with scoped.set_to(None):
            assert scoped.value is None
        assert scoped.value == "outer"
        raise ZeroDivisionError
    assert scoped.value == "default"


def test_two_values_are_apart():
    one, two = ScopedValue(1), ScopedValue(2)
    with one.set_to(3):
        assert (one.value, two.value) == (3, 2)


@pytest.mark.fast
def test_threads_that_take_turns_see_their_own_value():
    scoped, seen, turns = ScopedValue(0), [], threading.Barrier(2, timeout=10)

    def replica(number):
        turns.wait()
        with scoped.set_to(number):
            turns.wait()  # both are inside
            seen.append((number, scoped.value))
            turns.wait()
        seen.append((0, scoped.value))

    threads = [threading.Thread(target=replica, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(0, 0), (0, 0), (1, 1), (2, 2)]


def test_actions_wait_where_side_effects_are_held_back():
    done = []
    with held_back() as outer:
        with held_back() as inner:
            perform(lambda: done.append("inner"))
        perform(lambda: done.append("outer"))
        assert (done, len(inner), len(outer)) == ([], 1, 1)
    for action in (*inner, *outer):
        perform(action)
    assert done == ["inner", "outer"]
