"""How often a batch on its way through `train_step` enters each folder, and climbs back up.

Counted are calls from one folder into another, in an eager step. Left out are the folders that
answer questions (`_keras`, `_checks`, `replicated`), and calls that lead into no further folder.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import tensorflow as tf

import gradient_accumulator_tf
from tests.oracle import dense_model, in_way, momentum_and_mse, regression_data
from tests.test_layout import FLOORS

ROOT = os.path.dirname(gradient_accumulator_tf.__file__) + os.sep
ANSWERS = ("_arguments", "_checks", "_keras", "replicated")


@dataclass
class Call:
    """A call of a function in a folder of the package, and the calls that it makes."""

    folder: str | None
    inner: list[Any] = field(default_factory=list)

    def stays(self):
        """Whether it leads into no further folder."""
        return all(c.folder == self.folder and c.stays() for c in self.inner)


def calls_of(run):
    """The calls that `run()` makes, as the inner calls of one."""
    root = Call(None)
    stack = [(None, root)]

    def profile(frame, event, _):
        name = frame.f_code.co_filename
        if event == "return" and stack[-1][0] is frame:
            stack.pop()
        elif event == "call" and name.startswith(ROOT):
            folder = name.removeprefix(ROOT).split(os.sep)[0].removesuffix(".py")
            # What a folder of answers calls is called by whoever asks.
            call = stack[-1][1] if folder in ANSWERS else Call(folder)
            if call is not stack[-1][1]:
                stack[-1][1].inner.append(call)
            stack.append((frame, call))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return root


def entries(call):
    """Pairs of the folders that call and are called."""
    for inner in call.inner:
        if inner.folder != call.folder:
            if inner.stays():
                continue
            yield call.folder, inner.folder
        yield from entries(inner)


@pytest.mark.fast
def test_a_batch_enters_each_folder_at_most_twice(mode):
    model = in_way(mode, dense_model())[0]
    model.compile(**momentum_and_mse(), run_eagerly=True)
    x, y, _ = regression_data(12)
    data = tf.constant(x), tf.constant(y)
    for _ in range(5):
        model.train_on_batch(*data)
    found = list(entries(calls_of(lambda: model.train_step(data))))  # the last one of a cycle
    times = Counter(folder for _, folder in found)
    climbs = [pair for pair in found if pair[0] and FLOORS.index(pair[1]) > FLOORS.index(pair[0])]
    # A batch of the second mode holds three micro-batches, each of which climbs from the loop.
    again = 2 if mode == "micro_batch_size" else 0
    assert times["models"] <= 2 + again
    assert all(number <= 2 for folder, number in times.items() if folder != "models")
    assert len(climbs) <= 4
    assert set(times) >= {"models", "cycle"}
