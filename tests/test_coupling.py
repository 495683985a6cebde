"""Losses that couple the examples of a batch are known, and a warning says what to pass."""

import warnings

import keras
import pytest
import tensorflow as tf

from gradient_accumulator_tf.cycle.coupling import (
    couples,
    couplings_of,
    reduces_by_itself,
    warn_of,
    whole_loss,
)

OUTPUT = keras.KerasTensor((None, 4, 3))


def a_mean(y, y_pred):
    return keras.ops.mean(keras.ops.square(y - y_pred))


def of_each(y, y_pred):
    return keras.ops.mean(keras.ops.square(y - y_pred), axis=(1, 2))


def of_each_class(y, y_pred):
    return keras.ops.mean(keras.ops.square(y - y_pred), axis=(0, 1))


def with_other_targets(y, y_pred):
    return tf.reduce_mean(tf.gather(y_pred, tf.cast(y, "int32"), batch_dims=1) @ y)


class OwnMean(keras.losses.Loss):
    def call(self, y, y_pred):
        return a_mean(y, y_pred)


@pytest.mark.fast
@pytest.mark.parametrize(
    "loss, rank",
    [
        (keras.losses.Dice(), None),
        (keras.losses.Tversky(alpha=0.3), None),
        (keras.losses.Circle(), None),
        (keras.losses.dice, None),
        (keras.losses.tversky, None),
        (keras.losses.circle, None),
        (keras.losses.Dice(axis=(0, 1, 2)), None),
        (keras.losses.Tversky(axis=[0]), None),
        (keras.losses.Dice(axis=-3), 3),
    ],
)
def test_losses_of_keras_that_couple_are_known(loss, rank):
    assert couples(loss, rank)


@pytest.mark.fast
@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.Dice(axis=(1, 2)),
        keras.losses.Tversky(axis=-1),
        keras.losses.Dice(axis=-3),  # of an unknown rank
        keras.losses.CosineSimilarity(),
        keras.losses.MeanSquaredError(),
        keras.losses.CTC(),
        keras.losses.mean_squared_error,
        OwnMean(),
        a_mean,
    ],
)
def test_other_losses_are_not(loss):
    assert couples(loss) is None


@pytest.mark.fast
def test_a_loss_that_reduces_by_itself_is_found_by_a_trace():
    ran = []

    def noted(y, y_pred):
        ran.append(y.shape)
        return a_mean(y, y_pred)

    assert reduces_by_itself(noted, OUTPUT) and [tuple(s) for s in ran] == [(None, 4, 3)]
    assert reduces_by_itself(OwnMean(), OUTPUT)
    assert reduces_by_itself(of_each_class, OUTPUT)
    assert not reduces_by_itself(of_each, OUTPUT)
    assert not reduces_by_itself(with_other_targets, OUTPUT)


@pytest.mark.fast
def test_the_losses_of_compile_are_paired_with_their_outputs():
    def names(losses, outputs=None):
        return [(c.name, c.certain) for c in couplings_of(losses, outputs)]

    assert names("dice") == [("dice", True)]
    assert names("Dice") == [("dice", True)]
    assert names(["mse", keras.losses.Tversky(name="t"), None]) == [("t", True)]
    assert names({"a": "circle", "b": "mse"}) == [("circle", True)]
    assert names(a_mean) == []  # no shapes to trace it with
    assert names(a_mean, [OUTPUT, OUTPUT]) == [("a_mean", False)]
    assert names({"a": of_each, "b": a_mean}, {"b": OUTPUT, "a": OUTPUT}) == [("a_mean", False)]
    assert names([of_each, a_mean], [OUTPUT, OUTPUT]) == [("a_mean", False)]
    assert names(keras.losses.Dice(axis=-3), OUTPUT) == [("dice", True)]
    assert names("crossentropy", OUTPUT) == names("no such loss", OUTPUT) == names(None) == []


@pytest.mark.fast
def test_the_warning_names_the_loss_and_the_argument():
    certain = couplings_of(keras.losses.Dice(name="overlap"))
    with pytest.warns(
        UserWarning,
        match=r"^The loss 'overlap' divides one sum .*Received: a model with micro_batch_size=8\. "
        r"Use GradientAccumulateModel\(\.\.\., micro_batch_size=8, coupled_loss=True\), which",
    ):
        warn_of(certain, "micro_batch_size=8")
    with pytest.warns(
        UserWarning,
        match=r"with accum_steps=4\. Use GradientAccumulateModel\(\.\.\., micro_batch_size=\.\.\., "
        r"coupled_loss=True\) in place of accum_steps, which",
    ):
        warn_of(certain, "accum_steps=4")
    with pytest.warns(
        UserWarning,
        match=r"^The loss 'mine' reduces to one number .*if it is a mean over the examples.*"
        r"let it return a value for each example\. Otherwise use .*coupled_loss=True\)",
    ):
        warn_of([whole_loss("mine")], "micro_batch_size=8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of([], "micro_batch_size=8")
