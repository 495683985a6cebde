"""check_equivalence names losses that look across the examples, and what trains them."""

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import GradientAccumulateModel, check_equivalence
from tests.oracle import regression_data

X = regression_data(32)[0]
CLASSES = np.arange(32).reshape(-1, 1) % 3
MASKS = (np.random.default_rng(0).random((32, 3)) > 0.6).astype("float32")
REMEDY = "GradientAccumulateModel(micro_batch_size=..., coupled_loss=True)"


def model_of(loss, **arguments):
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(3, "sigmoid")]
    if isinstance(loss, keras.losses.Circle):
        layers.append(keras.layers.UnitNormalization())
    model = keras.Sequential([keras.Input((5,)), *layers])
    if arguments:
        model = GradientAccumulateModel(model=model, **arguments)
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


class Contrastive(keras.losses.Loss):
    """A row for each example, which depends on all others."""

    def call(self, y, y_pred):
        logits = keras.ops.matmul(y_pred, keras.ops.transpose(y_pred))
        return keras.ops.logsumexp(logits, axis=1) - keras.ops.sum(y * y_pred, axis=1)


def shifted(y, y_pred):
    """Each prediction against the target of the example before it in the batch."""
    return keras.ops.square(keras.ops.roll(y, 1, axis=0) - y_pred)


COUPLED = {
    "Dice": keras.losses.Dice,
    "Tversky": keras.losses.Tversky,
    "dice over batch and classes": lambda: keras.losses.Dice(axis=(0, 1)),
    "Circle": lambda: keras.losses.Circle(gamma=2.0),
    "contrastive": Contrastive,
    "cosine along the batch": lambda: keras.losses.CosineSimilarity(axis=0),
}
NOT_COUPLED = {
    "Dice of each example": lambda: keras.losses.Dice(axis=(1,)),
    "Tversky of each example": lambda: keras.losses.Tversky(axis=-1),
    "mean squared error": keras.losses.MeanSquaredError,
}


def check(loss, model=None, **arguments):
    y = CLASSES if isinstance(loss, keras.losses.Circle) else MASKS
    arguments = arguments or {"micro_batch_size": 8}
    model = model_of(loss) if model is None else model
    return check_equivalence(model, X, y, verbose=0, **arguments)


@pytest.mark.parametrize("name", list(COUPLED))
def test_a_coupled_loss_is_named_with_its_remedy(name):
    loss = COUPLED[name]()
    report = check(loss)
    assert not report.equivalent
    (cause,) = report.causes
    assert cause.kind == "coupled_loss" and cause.where == (loss.name,)
    assert REMEDY in cause.advice


@pytest.mark.parametrize("name", list(NOT_COUPLED))
def test_a_loss_of_each_example_is_equivalent(name):
    report = check(NOT_COUPLED[name]())
    assert report.equivalent and not report.causes


def test_a_loss_by_the_place_in_the_batch_is_named_with_both_ways_out():
    order, coupled = check(shifted).causes
    assert order.kind == "order" and "micro-batches of whole pairs" in order.advice
    assert "float64" in order.advice
    assert coupled.kind == "coupled_loss" and REMEDY in coupled.advice


def test_only_the_loss_that_couples_is_named():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    ends = [keras.layers.Dense(3, "sigmoid", name=name)(inputs) for name in ("a", "b")]
    model = keras.Model(inputs, dict(zip("ab", ends, strict=True)))
    losses = {"a": keras.losses.Dice(name="over_all"), "b": "mse"}
    model.compile(keras.optimizers.SGD(0.1), losses)
    y = {"a": MASKS, "b": MASKS}
    (cause,) = check_equivalence(model, X, y, micro_batch_size=8, verbose=0).causes
    assert cause.kind == "coupled_loss" and cause.where == ("over_all",)
