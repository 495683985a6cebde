"""An attribute is replaced from the first block that needs it to the last."""

import threading

import pytest

from gradient_accumulator_tf._keras.substitutions import Substitutions


class Owner:
    of_class = "class"

    def __init__(self):
        self.own = "own"

    def method(self, word):
        return f"method {word}"


@pytest.mark.fast
@pytest.mark.parametrize("name, original", [("own", "own"), ("of_class", "class")])
def test_nested_blocks_replace_once_and_restore_last(name, original):
    substitutions, owner = Substitutions(), Owner()
    before = dict(vars(owner))
    with substitutions.replaced(owner, name, lambda value: [value]):
        with substitutions.replaced(owner, name, lambda value: [value]):
            assert getattr(owner, name) == [original]
        assert getattr(owner, name) == [original]
    assert vars(owner) == before


def test_an_error_inside_restores():
    substitutions, owner = Substitutions(), Owner()
    with pytest.raises(ZeroDivisionError), substitutions.replaced(owner, "own", lambda _: 1):
        raise ZeroDivisionError
    assert owner.own == "own"
    with substitutions.replaced(owner, "own", lambda _: 2):
        assert owner.own == 2


def test_an_error_in_making_the_value_leaves_nothing():
    substitutions, owner = Substitutions(), Owner()
    with pytest.raises(ZeroDivisionError):
        with substitutions.replaced(owner, "own", lambda _: 1 / 0):
            pass
    assert owner.own == "own"
    with substitutions.replaced(owner, "own", lambda _: 2):
        assert owner.own == 2


def test_attributes_and_objects_are_apart():
    substitutions, one, two = Substitutions(), Owner(), Owner()
    with substitutions.replaced(one, "own", lambda _: 1):
        with substitutions.replaced(two, "own", lambda _: 2):
            assert (one.own, two.own, one.of_class) == (1, 2, "class")
        assert (one.own, two.own) == (1, "own")


@pytest.mark.fast
def test_interleaved_threads_keep_it_until_both_left():
    substitutions, owner, seen = Substitutions(), Owner(), []
    second_is_in, first_is_out = threading.Event(), threading.Event()

    def first():
        with substitutions.replaced(owner, "own", lambda _: 1):
            second.start()
            second_is_in.wait(10)
        first_is_out.set()

    def enter_second():
        with substitutions.replaced(owner, "own", lambda _: 1):
            second_is_in.set()
            first_is_out.wait(10)
            seen.append(owner.own)

    second = threading.Thread(target=enter_second)
    first()
    second.join()
    assert (seen, owner.own) == ([1], "own")


def test_each_block_on_a_thread_has_a_function_of_its_own():
    substitutions, owner = Substitutions(), Owner()
    before = dict(vars(owner))
    with substitutions.routed(owner, "method", lambda method, word: f"outer {method(word)}"):
        with substitutions.routed(owner, "method", lambda method, word: f"inner {method(word)}"):
            assert owner.method("a") == "inner method a"
        assert owner.method("b") == "outer method b"
    assert owner.method("c") == "method c"
    assert vars(owner) == before


@pytest.mark.fast
def test_interleaved_threads_have_functions_of_their_own():
    substitutions, owner, seen = Substitutions(), Owner(), []
    second_is_in, first_is_out = threading.Event(), threading.Event()

    def first():
        with substitutions.routed(owner, "method", lambda method, word: "first"):
            second.start()
            second_is_in.wait(10)
            seen.append(owner.method("a"))
        seen.append(owner.method("b"))
        first_is_out.set()

    def enter_second():
        with substitutions.routed(owner, "method", lambda method, word: "second"):
            second_is_in.set()
            first_is_out.wait(10)
            seen.append(owner.method("c"))

    second = threading.Thread(target=enter_second)
    first()
    second.join()
    assert seen == ["first", "method b", "second"]
    assert owner.method("d") == "method d"
