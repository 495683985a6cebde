"""The exact mean in a custom train_step, whose loss is a mean over some of the examples.

    python examples/custom_train_step.py

Most of the handwritten digits here have no label, and the loss is the mean over those that have
one. Their number differs from micro-batch to micro-batch, so the mean of the means is not the mean
over all. `GradientAccumulateOptimizer` takes the mean over all if each call of `apply` passes the
number that the loss was divided by, as `weight`.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from _common import (
    add_count,
    add_examples,
    aligned,
    check_batch_size,
    check_multiple,
    compare,
    largest_difference,
    load_digits,
    shown_difference,
)
from gradient_accumulator_tf import GradientAccumulateOptimizer

WAYS = ("large batch", "accumulated, weight=labelled", "accumulated, mean of means")
NO_LABEL = -1


class LabelledModel(keras.Model):
    """A net that learns from those examples that have a label."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.loss_mean = keras.metrics.Mean(name="loss")
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")

    def call(self, x, training=False):
        return self.net(x, training=training)

    @property
    def metrics(self):
        return [self.loss_mean, self.accuracy]

    def loss_of(self, y, logits):
        """The mean loss over the labelled examples, which of them these are, and their number."""
        has_label = tf.cast(y != NO_LABEL, logits.dtype)
        losses = keras.losses.sparse_categorical_crossentropy(
            tf.maximum(y, 0), logits, from_logits=True
        )
        labelled = tf.reduce_sum(has_label)
        # Without any label the loss is 0 / 1, and its weight is 0.
        return tf.reduce_sum(losses * has_label) / tf.maximum(labelled, 1.0), has_label, labelled

    def update(self, gradients, labelled):
        self.optimizer.apply(gradients, self.trainable_variables)

    def logs(self, y, logits, loss, has_label, labelled):
        self.loss_mean.update_state(loss, sample_weight=labelled)
        self.accuracy.update_state(tf.maximum(y, 0), logits, sample_weight=has_label)
        return {metric.name: metric.result() for metric in self.metrics}

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            logits = self(x, training=True)
            loss, has_label, labelled = self.loss_of(y, logits)
        self.update(tape.gradient(loss, self.trainable_variables), labelled)
        return self.logs(y, logits, loss, has_label, labelled)

    def test_step(self, data):
        x, y = data
        logits = self(x, training=False)
        return self.logs(y, logits, *self.loss_of(y, logits))


class WeightedModel(LabelledModel):
    """The same for a `GradientAccumulateOptimizer`, which needs only this one line."""

    def update(self, gradients, labelled):
        self.optimizer.apply(gradients, self.trainable_variables, weight=labelled)


def build_net():
    """A small net, with the same first weights in every call."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(32, activation="tanh"),
            layers.Dense(10),
        ]
    )


def compile_for(way, batch_size, micro_batch_size):
    """The compiled model and the batch size for `fit`: all that the ways differ in."""
    optimizer = keras.optimizers.Adam(3e-3)
    make_model = WeightedModel if way == "accumulated, weight=labelled" else LabelledModel
    if way != "large batch":
        optimizer = GradientAccumulateOptimizer(optimizer, batch_size // micro_batch_size)
        batch_size = micro_batch_size
    model = make_model(build_net())
    model.compile(optimizer)
    return model, batch_size


def load_data(args):
    """(x, y) to train on, whole effective batches with few labels, and (x, y) to validate on."""
    (x, y), validation = load_digits(args.examples)
    used = len(x) // args.batch_size * args.batch_size
    x, y = x[:used], y[:used].copy()
    y[np.random.default_rng(1).random(used) >= args.labelled / 100] = NO_LABEL
    return (x, y), validation


def labels_in(y, batch_size):
    """The number of labels in each batch."""
    return (y.reshape(-1, batch_size) != NO_LABEL).sum(1)


def train(way, args):
    """Trains one way and returns its results."""
    (x, y), validation = load_data(args)
    model, batch_size = compile_for(way, args.batch_size, args.micro_batch_size)
    first_weights = model.get_weights()
    history = model.fit(
        x,
        y,
        batch_size=batch_size,
        epochs=args.epochs,
        shuffle=False,
        validation_data=validation,
        validation_batch_size=args.micro_batch_size,
        verbose=2,
    ).history
    weights = model.get_weights()
    return {
        "way": way,
        "updates": int(model.optimizer.iterations.numpy()),
        "loss": history["loss"],
        "validation_accuracy": history["val_accuracy"],
        "weight_movement": largest_difference(weights, first_weights),
        "weights": weights,
    }


def table(results):
    """The results as lines of text, one for each way under two of headings."""
    rows = [
        ("", "", "training", "validation", "weight"),
        ("way", "updates", "loss", "accuracy", "difference"),
    ]
    for result in results:
        rows.append(
            (
                result["way"],
                str(result["updates"]),
                f"{result['loss'][-1]:.4f}",
                f"{result['validation_accuracy'][-1]:.4f}",
                shown_difference(result["weight_difference"]),
            )
        )
    return aligned(rows)


def percentage(text):
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of percent, from 1 to 100. Received: {text}"
        )
    return int(text)


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Train on partly labelled digits with a custom train_step, three ways."
    )
    add_count(parser, "--epochs", 12, "passes over the training images")
    add_count(parser, "--batch-size", 128, "images per update")
    add_count(parser, "--micro-batch-size", 8, "images per forward and backward pass")
    add_examples(parser)
    parser.add_argument(
        "--labelled",
        metavar="PERCENT",
        type=percentage,
        default=20,
        help="how many of the training images have a label (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    check_multiple(parser, args)
    check_batch_size(parser, args)
    return args


def main(argv=None):
    """Trains all ways, prints the table, and returns a list with a dict for each way."""
    args = parse(argv)
    results = []
    for way in WAYS:
        print(f"\n{way}", flush=True)
        results.append(train(way, args))
    compare(results, WAYS[:1])
    print(f"\n{table(results)}\n")
    (_, y), _ = load_data(args)
    counts = labels_in(y, args.micro_batch_size)
    print(
        f"Effective batches of {args.batch_size} images, micro-batches of {args.micro_batch_size}, "
        f"of which {counts.min()} to {counts.max()} have a label."
    )
    print("Weight difference: the largest from the large batch, as a fraction of the movement.")
    return results


if __name__ == "__main__":
    main()
