"""check_equivalence of models with a `train_step` of their own: what in it does not accumulate."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import (
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    check_equivalence,
)
from tests.oracle import regression_data

X, Y, _ = regression_data(16)


class Base(keras.Model):
    """One layer, and a step that hands `loss` to the tape."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(2, bias_initializer="ones")

    def call(self, x):
        return self.dense(x)

    def loss_of(self, x, y):
        return keras.losses.mean_squared_error(y, self(x, training=True))

    def update(self, x, y):
        variables = self.dense.trainable_variables
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": tf.reduce_mean(loss)}

    def train_step(self, data):
        return self.update(*data)


class OfMean(Base):
    def loss_of(self, x, y):
        return tf.reduce_mean(super().loss_of(x, y))


class Contrastive(Base):
    """As SimCLR scripts do: a vector, of what looks across the examples."""

    def loss_of(self, x, y):
        views = self(x, training=True), self(x + y, training=True)
        labels = tf.range(tf.shape(x)[0])
        logits = tf.matmul(*views, transpose_b=True)
        return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


class WithTarget(OfMean):
    """Its target network is trainable, but follows the other one."""

    def __init__(self):
        super().__init__()
        self.target = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2, name="follows")])

    def loss_of(self, x, y):
        return super().loss_of(x, y + self.target(x))

    def train_step(self, data):
        logs = super().train_step(data)
        for target, online in zip(self.target.weights, self.dense.weights, strict=True):
            target.assign_add(self.rate() * (online - target))
        return logs

    def rate(self):
        return 0.1


class WithTargetPerUpdate(WithTarget):
    def rate(self):
        return 0.1 * tf.cast(self.optimizer.just_updated, "float32")


class Critic(OfMean):
    def train_step(self, data):
        for _ in range(3):
            logs = self.update(*data)
        return logs


class Accumulating(GradientAccumulateModel):
    """The unreduced loss in a subclass of the model wrapper."""

    def __init__(self):
        super().__init__(accum_steps=4)
        self.dense = keras.layers.Dense(2, bias_initializer="ones")

    call, loss_of, update, train_step = Base.call, Base.loss_of, Base.update, Base.train_step


def check(cls, optimizer=None, accum_steps=4, **arguments):
    def make():
        model = cls(**arguments)
        model(X[:1])
        model.compile("sgd" if optimizer is None else optimizer())
        return model

    steps = {"accum_steps": accum_steps} if accum_steps else {}
    return check_equivalence(make, X, Y, verbose=0, **steps)


def own(reduction):
    return lambda: GradientAccumulateOptimizer("sgd", 4, reduction=reduction)


@pytest.mark.fast
def test_an_unreduced_loss_is_named_with_its_remedy():
    report = check(Base)
    assert not report.equivalent
    (cause,) = report.causes
    assert cause.kind == "loss"
    for words in ("of shape (4,)", "`tape.gradient` sums", 'Pass reduction="sum"', "(tried)"):
        assert words in cause.advice
    # And the remedies it names are ones.
    assert check(Base, own("sum"), None).equivalent
    assert check(OfMean, own("mean"), None).equivalent


def test_a_mean_that_is_summed_is_named_too():
    (cause,) = check(OfMean, own("sum"), None).causes
    assert cause.kind == "loss" and 'Pass reduction="mean"' in cause.advice


def test_an_unreduced_loss_in_a_subclass_of_the_model_wrapper():
    (cause,) = check(Accumulating, None, None).causes
    assert cause.kind == "loss" and 'Pass reduction="sum"' in cause.advice
    assert check(Accumulating, own("sum"), None).equivalent


def test_a_vector_of_a_loss_across_examples_is_named_with_what_is_left():
    causes = check(Contrastive).causes
    assert [cause.kind for cause in causes] == ["loss", "loss"]
    assert "of shape (4,)" in causes[0].advice and "not all that differs" in causes[0].advice
    assert "contrastive" in causes[1].advice and "GradientCheckpoint" in causes[1].advice


def test_state_that_a_step_moves_per_micro_batch_is_named():
    causes = check(WithTarget).causes
    assert [cause.kind for cause in causes] == ["state", "loss"]
    assert sorted(p.split("/")[-1] for p in causes[0].where) == ["bias", "kernel"]
    assert all("follows" in path for path in causes[0].where)
    assert "optimizer.just_updated" in causes[0].advice


@pytest.mark.skipif(
    not hasattr(GradientAccumulateOptimizer, "just_updated"), reason="needs just_updated"
)
def test_state_that_moves_once_per_update_is_equivalent():
    report = check(WithTargetPerUpdate, own("mean"), None)
    assert report.equivalent and all(v.movement > 1e-3 for v in report.variables)


def test_several_updates_per_batch_are_named():
    causes = check(Critic).causes
    assert [cause.kind for cause in causes] == ["updates", "loss"]
    assert "3 updates per batch" in causes[0].advice
    assert "a batch for each update" in causes[0].advice


def test_a_step_that_passes_weights_is_checked():
    class Weighted(OfMean):
        def update(self, x, y):
            variables = self.trainable_variables
            with tf.GradientTape() as tape:
                count = tf.reduce_sum(tf.cast(y > 0, "float32"))
                loss = tf.reduce_sum(tf.cast(y > 0, "float32") * (self(x) - y) ** 2) / count
            self.optimizer.apply(tape.gradient(loss, variables), variables, weight=count)
            return {"loss": loss}

    assert check(Weighted, own("mean"), None).equivalent
    assert np.ptp((Y.reshape(4, 4) > 0).sum(axis=1)) > 0  # else the weights would not matter
