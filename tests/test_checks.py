"""Each whole number that is too small is refused with what to pass instead of that argument."""

import numpy as np
import pytest

from gradient_accumulator_tf import (
    AccumBatchNorm,
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


def rate(**sizes):
    sizes = {"batch_size": 8, "base_batch_size": 8, **sizes}
    scale_learning_rate(0.1, **sizes)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: GradientAccumulateOptimizer("sgd", 0), ALONE),
        (lambda: GradientAccumulateOptimizer("sgd", {0: 0}), ALONE),
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
