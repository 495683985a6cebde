"""check_equivalence names losses that look across the examples, and what trains them."""

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import GradientAccumulateModel, check_equivalence
from tests.oracle import each_in_turn, regression_data

X = regression_data(32)[0]
CLASSES = np.arange(32).reshape(-1, 1) % 3
MASKS = (np.random.default_rng(0).random((32, 3)) > 0.6).astype("float32")
REMEDY = "GradientAccumulateModel(micro_batch_size=..., coupled_loss=True)"


def model_of(loss, *layers, **arguments):
    keras.utils.set_random_seed(1)
    layers = [*layers, keras.layers.Dense(3, "sigmoid")]
    if isinstance(loss, keras.losses.Circle):
        layers.append(keras.layers.UnitNormalization())
    model = keras.Sequential([keras.Input((5,)), *layers])
    if arguments:
        model = GradientAccumulateModel(model=model, **arguments)
    model.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=True)
    return model


class Contrastive(keras.losses.Loss):
    """A row for each example, which depends on all others."""

    def call(self, y, y_pred):
        logits = keras.ops.matmul(y_pred, keras.ops.transpose(y_pred))
        return keras.ops.logsumexp(logits, axis=1) - keras.ops.sum(y * y_pred, axis=1)


def shifted(y, y_pred):
    """Each prediction against the target of the example before it in the batch."""
    return keras.ops.square(keras.ops.roll(y, 1, axis=0) - y_pred)


class OwnLoss(GradientAccumulateModel):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.std(y_pred - y)


class OwnLossAndCall(OwnLoss):
    def __init__(self, **arguments):
        super().__init__(micro_batch_size=8, **arguments)
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)


COUPLED = {
    "Dice": keras.losses.Dice,
    "Tversky": keras.losses.Tversky,
    "dice over batch and classes": lambda: keras.losses.Dice(axis=(0, 1)),
    "Circle": lambda: keras.losses.Circle(gamma=2.0),
}
NOT_COUPLED = {
    "Dice of each example": lambda: keras.losses.Dice(axis=(1,)),
    "Tversky of each example": lambda: keras.losses.Tversky(axis=-1),
    "mean squared error": keras.losses.MeanSquaredError,
}
WAYS = {"micro_batch_size": {"micro_batch_size": 8}, "accum_steps": {"accum_steps": 4}}


def check(loss, model=None, **arguments):
    y = CLASSES if isinstance(loss, keras.losses.Circle) else MASKS
    model = model_of(loss) if model is None else model
    return check_equivalence(model, X, y, verbose=0, **arguments)


@pytest.mark.parametrize(
    "name, way", each_in_turn(list(COUPLED), list(WAYS), core=["Dice"], fast=["Dice"])
)
def test_a_coupled_loss_is_named_with_its_remedy(name, way):
    loss = COUPLED[name]()
    report = check(loss, **WAYS[way])
    assert not report.equivalent
    (cause,) = report.causes
    assert cause.kind == "coupled_loss" and cause.where == (loss.name,)
    assert f"{REMEDY}, which" in cause.advice and "(tried)" in cause.advice


@pytest.mark.parametrize("name", list(COUPLED))
def test_the_remedy_is_one(name):
    loss = COUPLED[name]()
    report = check(loss, model_of(loss, micro_batch_size=8, coupled_loss=True))
    assert report.equivalent and not report.causes


@pytest.mark.parametrize("name", list(NOT_COUPLED))
def test_a_loss_of_each_example_is_equivalent(name):
    report = check(NOT_COUPLED[name](), micro_batch_size=8)
    assert report.equivalent and not report.causes


@pytest.mark.parametrize("loss", [Contrastive(), shifted], ids=["contrastive", "by place"])
def test_a_loss_of_ones_own_is_found_by_a_trial_of_the_remedy(loss):
    (cause,) = check(loss, micro_batch_size=8).causes
    assert cause.kind == "coupled_loss" and cause.where == ()
    assert cause.advice.startswith("the loss looks across the examples")
    assert REMEDY in cause.advice and "(tried)" in cause.advice


def test_the_loss_of_a_model_that_accumulates_by_itself():
    (cause,) = check(Contrastive(), model_of(Contrastive(), micro_batch_size=8)).causes
    assert cause.kind == "coupled_loss" and REMEDY in cause.advice


def test_a_compute_loss_around_a_model():
    model = OwnLoss(model=model_of("mse"), micro_batch_size=8)
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    (cause,) = check(None, model).causes
    assert cause.kind == "coupled_loss" and REMEDY in cause.advice and "(tried)" in cause.advice


def test_a_compute_loss_of_a_model_whose_arguments_are_its_own():
    def make(**arguments):
        model = OwnLossAndCall(**arguments)
        model(X[:1])
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
        return model

    (cause,) = check(None, make).causes
    assert cause.kind == "loss" and "`compute_loss`" in cause.advice and REMEDY in cause.advice
    assert check(None, lambda: make(coupled_loss=True)).equivalent


def test_a_coupled_loss_is_named_beside_another_cause():
    model = model_of(keras.losses.Dice(), keras.layers.Dropout(0.5))
    random, coupled = check(keras.losses.Dice(), model, micro_batch_size=8).causes
    assert random.kind == "random" and coupled.kind == "coupled_loss"
    assert coupled.where == ("dice",) and "(tried)" not in coupled.advice


def test_only_the_loss_that_couples_is_named():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    ends = [keras.layers.Dense(3, "sigmoid", name=name)(inputs) for name in ("a", "b")]
    model = keras.Model(inputs, dict(zip("ab", ends, strict=True)))
    losses = {"a": keras.losses.Dice(name="over_all"), "b": "mse"}
    model.compile(keras.optimizers.SGD(0.1), losses, run_eagerly=True)
    y = {"a": MASKS, "b": MASKS}
    (cause,) = check_equivalence(model, X, y, micro_batch_size=8, verbose=0).causes
    assert cause.kind == "coupled_loss" and cause.where == ("over_all",)
