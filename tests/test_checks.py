"""Each number or choice that is none is refused with what to pass instead of that argument."""

import math

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import (
    AccumBatchNorm,
    AdaptiveGradientClipping,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    PiecewiseConstantSteps,
    ThroughputLogger,
    check_equivalence,
    scale_learning_rate,
    swap_batch_norm,
)
from gradient_accumulator_tf._checks import check_positive_int, similar_name
from tests.oracle import dense_model

ALONE = "Pass accum_steps=1 to train without accumulation."
EACH_CALL = "Pass accum_steps=1 to update the moving statistics in each training call."
FIT = "Pass the batch_size that fit is given."
FOUND_WITH = "Pass the batch size that the learning rate is for, such as base_batch_size=32."
MEMORY = "Pass as many examples as fit into memory at once, such as micro_batch_size=8."


def checked(**arguments):
    model = dense_model()
    model.compile("sgd", "mse")
    check_equivalence(model, np.ones((8, 5)), np.ones((8, 1)), **arguments)


def normalized():
    return keras.Sequential([keras.Input((4, 4, 2)), keras.layers.BatchNormalization()])


def accumulating(accum_steps, **arguments):
    return GradientAccumulateOptimizer("sgd", accum_steps, **arguments)


def wrapped(**arguments):
    return GradientAccumulateModel(dense_model(), micro_batch_size=2, **arguments)


def rate(**sizes):
    sizes = {"batch_size": 8, "base_batch_size": 8, **sizes}
    scale_learning_rate(0.1, **sizes)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: GradientAccumulateOptimizer("sgd", 0), ALONE),
        (lambda: GradientAccumulateModel(dense_model(), accum_steps=0), ALONE),
        (lambda: rate(accum_steps=0), ALONE),
        (lambda: GradientAccumulateModel(dense_model(), micro_batch_size=0), MEMORY),
        (lambda: AccumBatchNorm(accum_steps=0), EACH_CALL),
        (lambda: swap_batch_norm(dense_model(), accum_steps=0), EACH_CALL),
        (lambda: ThroughputLogger(batch_size=0), FIT),
        (lambda: rate(batch_size=0), FIT),
        (lambda: rate(base_batch_size=0), FOUND_WITH),
        (lambda: checked(micro_batch_size=2, updates=0), "Pass updates=1 for the first one alone."),
        (
            lambda: checked(micro_batch_size=2, batch_size=0),
            "Leave it out for one batch of all examples.",
        ),
        (
            lambda: checked(micro_batch_size=0),
            "Pass fewer examples than an effective batch has, such as micro_batch_size=8.",
        ),
        (
            lambda: checked(accum_steps=0),
            "Pass accum_steps=2 or more, into which the effective batch can be divided.",
        ),
    ],
)
def test_the_remedy_is_that_of_the_argument(make, remedy):
    with pytest.raises(ValueError, match=r"integer >= 1 .*Received: \w+=0\. (.*)$") as raised:
        make()
    assert str(raised.value).endswith(f"=0. {remedy}")


@pytest.mark.parametrize("make", [PiecewiseConstantSteps, accumulating])
@pytest.mark.parametrize(
    ("value", "error", "remedy"),
    [
        (0, ValueError, r"=0\. Pass {5: 1} for a phase without accumulation\."),
        (2.5, TypeError, r"=2\.5 .* Pass a whole number such as accum_steps\[5\]=8\."),
    ],
)
def test_the_remedy_for_a_phase_is_a_phase(make, value, error, remedy):
    with pytest.raises(error, match=r"from update 5 on\)\. Received: accum_steps\[5\]" + remedy):
        make({0: 1, 5: value})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "name", "value", "advised"),
    [
        (lambda value: accumulating(2, reduction=value), "reduction", "Sum", "sum"),
        (lambda value: accumulating(2, non_finite=value), "non_finite", None, "propagate"),
        (lambda value: wrapped(non_finite=value), "non_finite", "drop_batch", "drop_micro_batch"),
        (lambda value: wrapped(batch_norm=value), "batch_norm", "excat", "exact"),
        (lambda value: rate(rule=value), "rule", "square root", "linear"),
        (lambda value: swap_batch_norm(normalized(), to=value), "to", "groups", "group"),
    ],
)
def test_the_remedy_for_a_choice_is_one_of_them(make, name, value, advised):
    with pytest.raises(ValueError, match=f'^`{name}` must be "') as raised:
        make(value)
    received, remedy = str(raised.value).split("Received: ")[1].split(". ")
    assert received == f"{name}={value!r}"
    assert remedy == f'Pass one of these, such as {name}="{advised}".'
    make(advised)


@pytest.mark.fast
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "1", None, True])
@pytest.mark.parametrize(
    ("make", "name", "remedy"),
    [
        (AdaptiveGradientClipping, "clip_factor", "clip_factor=0.01, as in the paper."),
        (AdaptiveGradientClipping, "epsilon", "epsilon=1e-3, as in the paper."),
        (
            lambda _, **tolerance: checked(accum_steps=2, **tolerance),
            "tolerance",
            "tolerance=1e-3.",
        ),
    ],
)
def test_the_remedy_for_a_number_is_one_that_fits(make, name, remedy, value):
    with pytest.raises(
        (TypeError, ValueError), match=r"`\w+` must be a finite number > 0\. "
    ) as got:
        make("sgd", **{name: value})
    assert f"Received: {name}={value!r}" in str(got.value)
    assert str(got.value).endswith(f". Pass for example {remedy}")


def test_a_number_of_steps_that_is_set_has_the_same_remedy():
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    model = GradientAccumulateModel(dense_model(), accum_steps=2)
    for owner in (optimizer, model):
        with pytest.raises(ValueError, match=r"accum_steps=0\. Pass accum_steps=1"):
            owner.accum_steps = 0


def test_integers_have_an_upper_end():
    assert check_positive_int("n", 2**63 - 1, "things") == 2**63 - 1
    with pytest.raises(ValueError, match=f"n={2**63}. Pass at most {2**63 - 1}"):
        check_positive_int("n", 2**63, "things")
    with pytest.raises(ValueError, match=r"n=8\. Pass at most 7"):
        check_positive_int("n", 8, "things", largest=7)


@pytest.mark.parametrize("steps", [{0: 1, 2**63: 2}, {0: 1, 5: 2**63}])
def test_a_schedule_of_phases_holds_what_tensorflow_can_count(steps):
    with pytest.raises(ValueError, match=f"Received: .*{2**63}. Pass at most {2**63 - 1}"):
        PiecewiseConstantSteps(steps)


@pytest.mark.fast
def test_a_slip_is_known_again():
    assert similar_name("acum_steps", ["outputs", "accum_steps"]) == "accum_steps"
    assert similar_name("steps_per_epoch", ["outputs", "name"]) is None
