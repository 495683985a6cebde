"""Losses that compare the examples of a batch, in plain TensorFlow, with a net and data for each.

Each loss is as its paper or its usual implementation has it, in the shortest form that runs
eagerly, in a graph and under XLA. Its value depends on which examples are in a batch together, so
no sum over micro-batches is that of the large batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

FEATURES, UNITS, DIMENSIONS, CLASSES = 5, 8, 4, 3


# Losses of two views or two towers: `y_pred` has the shape (examples, 2, dimensions).


def nt_xent(y_true, y_pred, temperature=0.5):
    """SimCLR's loss: each view is to find the other view of its example among all views."""
    del y_true
    views = _unit(tf.concat([y_pred[:, 0], y_pred[:, 1]], 0))
    number = tf.shape(views)[0]
    itself = tf.eye(number, dtype=views.dtype)
    logits = views @ tf.transpose(views) / temperature - 1e9 * itself
    partner = tf.roll(tf.range(number), number // 2, 0)
    return tf.reduce_mean(_cross_entropy(partner, logits))


def barlow_twins(y_true, y_pred, redundancy=0.05):
    """The correlations of the views' features over the batch are to be the identity."""
    del y_true
    one, two = (_standardised(y_pred[:, i]) for i in range(2))
    correlation = tf.transpose(one) @ two / _number(y_pred)
    identity = tf.eye(y_pred.shape[-1], dtype=y_pred.dtype)
    weights = identity + redundancy * (1 - identity)
    return tf.reduce_sum(weights * (correlation - identity) ** 2)


def vicreg(y_true, y_pred):
    """Variance, invariance and covariance over the batch."""
    del y_true
    total = tf.reduce_mean((y_pred[:, 0] - y_pred[:, 1]) ** 2)
    for view in (y_pred[:, 0], y_pred[:, 1]):
        centred = view - tf.reduce_mean(view, 0)
        covariance = tf.transpose(centred) @ centred / (_number(view) - 1)
        variance = tf.linalg.diag_part(covariance)
        total += tf.reduce_mean(tf.nn.relu(1 - tf.sqrt(variance + 1e-4)))
        total += tf.reduce_mean(covariance**2) - tf.reduce_mean(variance**2) / view.shape[-1]
    return total


def retrieval(y_true, y_pred):
    """In-batch softmax of queries over items; `y_true` is the log of how often an item comes.

    Items that come often are negatives too often, which subtracting that corrects.
    """
    logits = y_pred[:, 0] @ tf.transpose(y_pred[:, 1])
    return _cross_entropy(tf.range(tf.shape(y_pred)[0]), logits - tf.reshape(y_true, (1, -1)))


class Clip(keras.losses.Loss):
    """Both towers' softmax over the batch, with a learned temperature that is the model's.

    Args:
        log_scale: The variable.
    """

    def __init__(self, log_scale):
        super().__init__(name="clip")
        self.log_scale = log_scale

    def call(self, y_true, y_pred):
        del y_true
        return clip(y_pred, self.log_scale)


class ClipLayer(keras.layers.Layer):
    """The same as a layer with a variable of its own."""

    def build(self, *shapes):
        self.log_scale = self.add_weight(shape=(), initializer="ones", name="log_scale")

    def call(self, y_true, y_pred):
        del y_true
        return clip(y_pred, self.log_scale)


def clip(y_pred, log_scale):
    logits = tf.exp(tf.cast(log_scale, y_pred.dtype)) * (
        _unit(y_pred[:, 0]) @ tf.transpose(_unit(y_pred[:, 1]))
    )
    own = tf.range(tf.shape(logits)[0])
    return (_cross_entropy(own, logits) + _cross_entropy(own, tf.transpose(logits))) / 2


# Losses of an embedding (examples, dimensions) and labels (examples,).


def supervised_contrastive(y_true, y_pred, temperature=0.5):
    """Each example is to find those of its class among all others; one value per example."""
    embedding = _unit(y_pred)
    itself = tf.eye(tf.shape(embedding)[0], dtype=embedding.dtype)
    logits = embedding @ tf.transpose(embedding) / temperature - 1e9 * itself
    positive = _same_label(y_true, embedding.dtype) - itself
    of_positive = tf.reduce_sum(positive * tf.nn.log_softmax(logits), 1)
    return -of_positive / tf.maximum(tf.reduce_sum(positive, 1), 1)


def triplet_semi_hard(y_true, y_pred, margin=1.0):
    """For each pair of a class the nearest negative that is farther, or else the farthest one."""
    squares = tf.reduce_sum(y_pred**2, 1)
    distance = squares[:, None] - 2 * y_pred @ tf.transpose(y_pred) + squares
    same = _same_label(y_true, y_pred.dtype)
    positive = same - tf.eye(tf.shape(same)[0], dtype=same.dtype)
    # Of shape (anchor, positive, negative).
    negative = tf.broadcast_to((1 - same)[:, None] > 0, tf.repeat(tf.shape(same)[:1], 3))
    to_negative = tf.broadcast_to(distance[:, None], tf.shape(negative))
    farther = negative & (to_negative > distance[:, :, None])
    nearest = tf.reduce_min(tf.where(farther, to_negative, np.inf), 2)
    farthest = tf.reduce_max(tf.where(negative, to_negative, 0), 2)
    chosen = tf.where(tf.reduce_any(farther, 2), nearest, farthest)
    return tf.reduce_sum(positive * tf.nn.relu(margin + distance - chosen)) / tf.maximum(
        tf.reduce_sum(positive), 1
    )


# Losses of predictions and targets of the same shape.


def auc_surrogate(y_true, y_pred):
    """The squared hinge over all pairs of a positive and a negative example."""
    positive, score = tf.reshape(y_true, (-1,)), tf.reshape(y_pred, (-1,))
    pairs = positive[:, None] * (1 - positive)
    hinges = tf.nn.relu(1 - (score[:, None] - score)) ** 2
    return tf.math.divide_no_nan(tf.reduce_sum(pairs * hinges), tf.reduce_sum(pairs))


def concordance(y_true, y_pred):
    """One minus the concordance correlation coefficient (CCC)."""
    means = tf.reduce_mean(y_true, 0), tf.reduce_mean(y_pred, 0)
    covariance = tf.reduce_mean((y_true - means[0]) * (y_pred - means[1]), 0)
    variances = tf.math.reduce_variance(y_true, 0) + tf.math.reduce_variance(y_pred, 0)
    return tf.reduce_mean(1 - 2 * covariance / (variances + (means[0] - means[1]) ** 2))


def masked_mean(y_true, y_pred):
    """The mean square over the targets that are there; -9 marks one that is missing."""
    mask = tf.cast(y_true > -9, y_pred.dtype)
    return tf.reduce_sum(mask * (y_pred - y_true) ** 2) / tf.maximum(tf.reduce_sum(mask), 1)


def residual_variance(y_true, y_pred):
    """Squares of what is left of an error after the batch's mean error, for each element."""
    error = y_pred - y_true
    return tf.reduce_mean((error - tf.reduce_mean(error, 0)) ** 2, -1)


def _unit(vectors):
    return vectors / tf.sqrt(tf.reduce_sum(vectors**2, -1, keepdims=True) + 1e-6)


def _standardised(values):
    centred = values - tf.reduce_mean(values, 0)
    return centred / tf.sqrt(tf.reduce_mean(centred**2, 0) + 1e-4)


def _number(values):
    return tf.cast(tf.shape(values)[0], values.dtype)


def _same_label(labels, dtype):
    labels = tf.reshape(labels, (-1,))
    return tf.cast(labels[:, None] == labels, dtype)


def _cross_entropy(labels, logits):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


# Nets.


def encoder(units=DIMENSIONS, activation=None, **kwargs):
    """A small net of dense layers; **kwargs are those of the first."""
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(UNITS, "tanh", **kwargs),
            keras.layers.Dense(units, activation),
        ]
    )


def two_views(make_encoder=encoder):
    """Two inputs through one encoder, stacked to (examples, 2, dimensions)."""
    return _stacked([make_encoder()] * 2)


def two_towers():
    """Two inputs, each through an encoder of its own."""
    return _stacked([encoder(), encoder()])


def _stacked(encoders):
    inputs = [keras.Input((FEATURES,)) for _ in encoders]
    outputs = [encode(view) for encode, view in zip(encoders, inputs, strict=True)]
    return keras.Model(inputs, keras.ops.stack(outputs, axis=1))


class TwoTowers(keras.Model):
    """Two encoders, and a learned temperature: a variable, or a loss that is a layer.

    Args:
        loss_layer: The layer.
    """

    def __init__(self, loss_layer=None):
        super().__init__()
        self.towers = [encoder(), encoder()]
        self.loss_layer = loss_layer
        if loss_layer is None:
            self.log_scale = self.add_weight(shape=(), initializer="ones", name="log_scale")
        else:
            loss_layer.build()

    def call(self, inputs):
        outputs = [tower(view) for tower, view in zip(self.towers, inputs, strict=True)]
        return keras.ops.stack(outputs, axis=1)


def unit_encoder():
    return keras.Sequential([encoder(), keras.layers.UnitNormalization()])


# Data.


def data(examples, dtype="float64", seed=0):
    """Dict of arrays with one row for each example."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=examples)
    rows = rng.normal(size=(examples, FEATURES)) + labels[:, None]
    other = rows + 0.5 * rng.normal(size=rows.shape)
    values = np.tanh(rows[:, :DIMENSIONS]) + 0.1 * rng.normal(size=(examples, DIMENSIONS))
    arrays = {
        "rows": rows,
        "other": other,
        "labels": labels,
        "values": values,
        "binary": values > 0.5,
        "one_binary": values[:, :1] > 0.5,
        "log_frequency": np.log(rng.uniform(0.01, 1, size=examples)),
        "some_values": np.where(rng.uniform(size=values.shape) < labels[:, None] / 3, -9, values),
        "weights": rng.uniform(0.2, 2, size=examples),
    }
    return {name: array.astype(dtype) for name, array in arrays.items()}


class Case(NamedTuple):
    """A loss with what it is trained on.

    Attributes:
        make_model: Function that returns a plain model.
        loss_of: Function of the model that returns the loss.
        inputs: Names of the inputs in `data`.
        target: Name of the target in `data`.
    """

    make_model: Callable
    loss_of: Callable
    inputs: tuple = ("rows", "other")
    target: str = "labels"

    def arrays(self, examples, dtype="float64"):
        """The inputs and targets: an array or a tuple of two, and an array."""
        arrays = data(examples, dtype)
        inputs = tuple(arrays[name] for name in self.inputs)
        return inputs if len(inputs) > 1 else inputs[0], arrays[self.target]


def _embedding(loss):
    return Case(encoder, lambda model: loss, ("rows",))


CASES = {
    "nt_xent": Case(two_views, lambda model: nt_xent),
    "clip": Case(TwoTowers, lambda model: Clip(model.log_scale)),
    "clip_layer": Case(lambda: TwoTowers(ClipLayer()), lambda model: model.loss_layer),
    "supervised_contrastive": _embedding(supervised_contrastive),
    "triplet_semi_hard": _embedding(triplet_semi_hard),
    "barlow_twins": Case(two_views, lambda model: barlow_twins),
    "vicreg": Case(two_views, lambda model: vicreg),
    "dice": Case(
        lambda: encoder(activation="sigmoid"),
        lambda model: keras.losses.Dice(),
        ("rows",),
        "binary",
    ),
    "tversky": Case(
        lambda: encoder(activation="sigmoid"),
        lambda model: keras.losses.Tversky(alpha=0.3, beta=0.7),
        ("rows",),
        "binary",
    ),
    "auc_surrogate": Case(lambda: encoder(1), lambda model: auc_surrogate, ("rows",), "one_binary"),
    "concordance": Case(encoder, lambda model: concordance, ("rows",), "values"),
    "retrieval": Case(two_towers, lambda model: retrieval, target="log_frequency"),
    "masked_mean": Case(encoder, lambda model: masked_mean, ("rows",), "some_values"),
    "circle": Case(unit_encoder, lambda model: keras.losses.Circle(gamma=4), ("rows",)),
}
