"""A small GAN with two wrapped optimizers: the large batch's weights, if both update at once.

    python examples/gan.py

A generator learns to draw handwritten digits, and a discriminator to tell them from real ones, in
a custom `train_step` with a `GradientAccumulateOptimizer` for each. If the train_step computes both
gradients and then applies both, all micro-batches of a cycle see the same two nets, as the large
batch does. Many train_steps update the discriminator first, and compute the generator's gradient
with the new one. The accumulated result is then not the large batch's, because only the last
micro-batch of a cycle sees the new discriminator.
"""

import argparse
import os
from typing import NamedTuple

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

NOISE = 16  # numbers that the generator draws an image from


class Way(NamedTuple):
    """Whether both nets are updated at once, and whether to accumulate."""

    at_once: bool
    accumulates: bool


# A large batch, then the way that is compared with it.
WAYS = {
    "both at once, large batch": Way(True, False),
    "both at once, accumulated": Way(True, True),
    "one after the other, large batch": Way(False, False),
    "one after the other, accumulated": Way(False, True),
}


class GAN(keras.Model):
    """Two nets, each with an optimizer of its own.

    Batches are pairs of images and noise. The noise comes with the data and is not drawn in the
    step, so that every way gets the same.
    """

    def __init__(self, generator, discriminator, at_once):
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.at_once = at_once
        self.generator_loss = keras.metrics.Mean(name="generator_loss")
        self.discriminator_loss = keras.metrics.Mean(name="discriminator_loss")

    def compile(self, generator_optimizer, discriminator_optimizer):
        super().compile()
        self.generator_optimizer = generator_optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)

    @property
    def metrics(self):
        return [self.generator_loss, self.discriminator_loss]

    def discriminator_gradients(self, images, noise):
        made = self.generator(noise, training=True)
        with tf.GradientTape() as tape:
            of_real = self.discriminator(images, training=True)
            of_made = self.discriminator(made, training=True)
            loss = self.loss_fn(tf.ones_like(of_real), of_real)
            loss += self.loss_fn(tf.zeros_like(of_made), of_made)
        self.discriminator_loss.update_state(loss, sample_weight=tf.shape(noise)[0])
        return tape.gradient(loss, self.discriminator.trainable_variables)

    def generator_gradients(self, noise):
        with tf.GradientTape() as tape:
            of_made = self.discriminator(self.generator(noise, training=True), training=True)
            loss = self.loss_fn(tf.ones_like(of_made), of_made)
        self.generator_loss.update_state(loss, sample_weight=tf.shape(noise)[0])
        return tape.gradient(loss, self.generator.trainable_variables)

    def update_discriminator(self, gradients):
        self.discriminator_optimizer.apply(gradients, self.discriminator.trainable_variables)

    def update_generator(self, gradients):
        self.generator_optimizer.apply(gradients, self.generator.trainable_variables)

    def train_step(self, data):
        images, noise = data
        gradients = self.discriminator_gradients(images, noise)
        if self.at_once:
            # With the discriminator that all micro-batches of the cycle see.
            generator_gradients = self.generator_gradients(noise)
            self.update_discriminator(gradients)
        else:
            self.update_discriminator(gradients)
            generator_gradients = self.generator_gradients(noise)
        self.update_generator(generator_gradients)
        return {metric.name: metric.result() for metric in self.metrics}


def build_nets():
    """Generator and discriminator, with the same first weights in every call.

    Smooth layers: in the kink of a relu, rounding decides which way a gradient goes.
    """
    keras.utils.set_random_seed(1)
    layers = keras.layers
    generator = keras.Sequential(
        [
            keras.Input((NOISE,)),
            layers.Dense(4 * 4 * 32, activation="tanh"),
            layers.Reshape((4, 4, 32)),
            layers.Conv2DTranspose(16, 4, strides=2, padding="same", activation="tanh"),
            layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
        ]
    )
    discriminator = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="tanh"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="tanh"),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    return generator, discriminator


def compile_for(way, batch_size, micro_batch_size):
    """The compiled GAN and the batch size for `fit`: all that the ways differ in."""
    model = GAN(*build_nets(), way.at_once)
    # Adam divides a gradient by its own size. With the default epsilon a gradient near zero would
    # be divided by its rounding error.
    optimizers = [keras.optimizers.Adam(1e-3, beta_1=0.5, epsilon=1e-4) for _ in range(2)]
    if way.accumulates:
        accum_steps = batch_size // micro_batch_size
        optimizers = [GradientAccumulateOptimizer(o, accum_steps) for o in optimizers]
        batch_size = micro_batch_size
    model.compile(*optimizers)
    return model, batch_size


def load_data(args):
    """Images and noise to train on, in whole effective batches.

    `fit` ends a partial cycle only of the optimizer that the model is compiled with. For a rest one
    would have to call `flush` of both optimizers here.
    """
    (images, _), _ = load_digits(args.examples)
    images = images[: len(images) // args.batch_size * args.batch_size]
    noise = np.random.default_rng(1).normal(size=(len(images), NOISE)).astype("float32")
    return images, noise


def train(name, args):
    """Trains one way and returns its results."""
    model, batch_size = compile_for(WAYS[name], args.batch_size, args.micro_batch_size)
    data = tf.data.Dataset.from_tensor_slices(load_data(args)).batch(batch_size)
    first_weights = weights_of(model)
    history = model.fit(data, epochs=args.epochs, shuffle=False, verbose=2).history
    weights = weights_of(model)
    return {
        "way": name,
        "updates": [
            int(optimizer.iterations.numpy())
            for optimizer in (model.generator_optimizer, model.discriminator_optimizer)
        ],
        "generator_loss": history["generator_loss"],
        "discriminator_loss": history["discriminator_loss"],
        "weight_movement": largest_difference(weights, first_weights),
        "weights": weights,
    }


def weights_of(model):
    return model.generator.get_weights() + model.discriminator.get_weights()


def table(results):
    """The results as lines of text, one for each way under two of headings."""
    rows = [
        ("", "updates", "generator", "discriminator", "weight"),
        ("way", "of each", "loss", "loss", "difference"),
    ]
    for result in results:
        rows.append(
            (
                result["way"],
                " and ".join(map(str, sorted(set(result["updates"])))),
                f"{result['generator_loss'][-1]:.4f}",
                f"{result['discriminator_loss'][-1]:.4f}",
                shown_difference(result["weight_difference"]),
            )
        )
    return aligned(rows)


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Train a GAN with two optimizers in four ways and compare the results."
    )
    add_count(parser, "--epochs", 10, "passes over the training images")
    add_count(parser, "--batch-size", 128, "images per update")
    add_count(parser, "--micro-batch-size", 16, "images per forward and backward pass")
    add_examples(parser)
    args = parser.parse_args(argv)
    check_multiple(parser, args)
    check_batch_size(parser, args)
    return args


def main(argv=None):
    """Trains all ways, prints the table, and returns a list with a dict for each way."""
    args = parse(argv)
    results = []
    for name in WAYS:
        print(f"\n{name}", flush=True)
        results.append(train(name, args))
    compare(results, [name for name, way in WAYS.items() if not way.accumulates])
    print(f"\n{table(results)}\n")
    print(
        f"Effective batches of {args.batch_size} images, micro-batches of "
        f"{args.micro_batch_size}.\nWeight difference: the largest from the large batch above, as "
        "a fraction of the movement."
    )
    return results


if __name__ == "__main__":
    main()
