"""The cases and rivals that the benchmarks measure.

A case is a model with its optimizer and inputs. A rival is a way to train it: plain fit, what
people write by hand, Keras's own accumulation, and this package.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import keras
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer

CLASSES = 10

PLAIN = "plain fit"
LARGE = "plain fit, large batch"
BUILT_IN = "Keras gradient_accumulation_steps"
LOOP = "GradientTape loop (a list of variables)"
TENSOR_LOOP = "GradientTape loop (a list of tensors)"
OPTIMIZER = "GradientAccumulateOptimizer"
ACROSS_STEPS = "GradientAccumulateModel(accum_steps)"
WITHIN_STEP = "GradientAccumulateModel(micro_batch_size)"

OURS = (OPTIMIZER, ACROSS_STEPS, WITHIN_STEP)


# The cases: a model, an optimizer, and inputs.


class Case(NamedTuple):
    """One column of the table.

    Attributes:
        model: Function that returns the model, with the same weights in every call.
        optimizer: Function of keyword arguments that returns the optimizer.
        inputs: Function of a random generator and a number of examples.
        steps: Micro-batches in an epoch, so many that the start and end of `fit` do not matter.
        reference: The rival whose weights all rivals that accumulate must reach.
    """

    model: Callable
    optimizer: Callable
    inputs: Callable
    steps: int
    reference: str = LARGE


def dense_model(features, *units):
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(n, "relu") for n in units]
    return keras.Sequential([keras.Input((features,)), *hidden, keras.layers.Dense(CLASSES)])


def embedding_model(rows, columns, length):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((length,), dtype="int32"),
            keras.layers.Embedding(rows, columns),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(CLASSES),
        ]
    )


def convolutional_model(size, *filters):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((size, size, 3))
    for n in filters:
        x = keras.layers.Conv2D(n, 3, padding="same", activation="relu")(x)
        x = keras.layers.AveragePooling2D(2)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(x))


def transformer_model(length, width, blocks):
    """A transformer on vectors. On tokens its embedding would take most of the time."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((length, width))
    for _ in range(blocks):
        normal = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(num_heads=4, key_dim=width // 4)
        x = layers.Add()([x, attention(normal, normal)])
        hidden = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(width)(hidden)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def normal_inputs(shape, rng, examples):
    return rng.normal(size=(examples, *shape)).astype("float32")


def token_inputs(tokens, length, rng, examples):
    return rng.integers(tokens, size=(examples, length), dtype="int32")


def dense_case(optimizer, steps, features, *units):
    return Case(
        functools.partial(dense_model, features, *units),
        optimizer,
        functools.partial(normal_inputs, (features,)),
        steps,
    )


def convolutional_case(optimizer, steps, size=32, filters=(32, 64, 128)):
    return Case(
        functools.partial(convolutional_model, size, *filters),
        optimizer,
        functools.partial(normal_inputs, (size, size, 3)),
        steps,
    )


def transformer_case(optimizer, steps, length=64, width=128, blocks=4):
    return Case(
        functools.partial(transformer_model, length, width, blocks),
        optimizer,
        functools.partial(normal_inputs, (length, width)),
        steps,
    )


def embedding_case(optimizer, steps, rows=200_000, columns=128, length=32, **kwargs):
    return Case(
        functools.partial(embedding_model, rows, columns, length),
        optimizer,
        functools.partial(token_inputs, rows, length),
        steps,
        **kwargs,
    )


SGD = functools.partial(keras.optimizers.SGD, 0.01)
# Adam divides a gradient by its own size. With the default epsilon a gradient near zero would be
# divided by its rounding error.
ADAM = functools.partial(keras.optimizers.Adam, 1e-4, epsilon=1e-4)

CASES = {
    "dense-1M-SGD": dense_case(SGD, 128, 512, 768, 768),
    "dense-1M-Adam": dense_case(ADAM, 96, 512, 768, 768),
    "dense-20M-SGD": dense_case(SGD, 16, 1024, 4096, 3840),
    "dense-20M-Adam": dense_case(ADAM, 16, 1024, 4096, 3840),
    "convolutional-SGD": convolutional_case(SGD, 32),
    "convolutional-Adam": convolutional_case(ADAM, 32),
    "transformer-SGD": transformer_case(SGD, 16),
    "transformer-Adam": transformer_case(ADAM, 16),
    "embedding-SGD": embedding_case(SGD, 64),
    # Keras's Adam gives another result for a sparse gradient than for the same dense one. All
    # that accumulate use the dense one.
    "embedding-Adam": embedding_case(ADAM, 16, reference=LOOP),
}


# The rivals: each has a model, and a function that trains it for an epoch.


class Rival(NamedTuple):
    """One row of the table."""

    model: keras.Model
    train_epoch: Callable


def fit(model, optimizer, batches, jit):
    """The rival that trains with `fit`."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, jit_compile=jit)
    return Rival(model, lambda: model.fit(batches, shuffle=False, verbose=0))


def gradient_tape_loop(model, optimizer, batches, accum_steps, jit):
    """What people write by hand, with sums in variables as in Keras's own accumulation."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    variables = model.trainable_variables
    optimizer.build(variables)
    sums = [tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False) for v in variables]

    @tf.function(jit_compile=jit)
    def micro_step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
            share = loss / accum_steps
        gradients = tape.gradient(share, variables)
        for total, gradient in zip(sums, gradients, strict=True):
            total.assign_add(gradient)
        return loss

    @tf.function(jit_compile=jit)
    def update():
        optimizer.apply([total.read_value() for total in sums], variables)
        for total in sums:
            total.assign(tf.zeros_like(total))

    def train_epoch():
        losses = []
        for step, (x, y) in enumerate(batches, start=1):
            losses.append(micro_step(x, y))
            if step % accum_steps == 0:
                update()
        # The epoch's loss, as fit reports it.
        return float(tf.reduce_mean(losses))

    return Rival(model, train_epoch)


def tensor_loop(model, optimizer, batches, accum_steps, jit):
    """What people write by hand, with sums in tensors that each micro-step takes and returns."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function(jit_compile=jit)
    def micro_step(sums, x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
            share = loss / accum_steps
        gradients = tape.gradient(share, variables)
        return loss, [a + tf.convert_to_tensor(b) for a, b in zip(sums, gradients, strict=True)]

    @tf.function(jit_compile=jit)
    def update(sums):
        optimizer.apply(sums, variables)

    def train_epoch():
        losses = []
        sums = zeros = [tf.zeros(v.shape, v.dtype) for v in variables]
        for step, (x, y) in enumerate(batches, start=1):
            loss, sums = micro_step(sums, x, y)
            losses.append(loss)
            if step % accum_steps == 0:
                update(sums)
                sums = zeros
        return float(tf.reduce_mean(losses))

    return Rival(model, train_epoch)


def rival_makers(case, micro_batches, large_batches, micro_batch_size, accum_steps, jit):
    """Dict of name to a function that returns the `Rival`, in the order of the table's rows."""

    def across_steps(model, optimizer):
        return fit(model, optimizer, micro_batches, jit)

    def within_step(model, optimizer):
        return fit(model, optimizer, large_batches, jit)

    model, optimizer = case.model, case.optimizer
    return {
        PLAIN: lambda: across_steps(model(), optimizer()),
        LARGE: lambda: within_step(model(), optimizer()),
        BUILT_IN: lambda: across_steps(model(), optimizer(gradient_accumulation_steps=accum_steps)),
        LOOP: lambda: gradient_tape_loop(model(), optimizer(), micro_batches, accum_steps, jit),
        TENSOR_LOOP: lambda: tensor_loop(model(), optimizer(), micro_batches, accum_steps, jit),
        OPTIMIZER: lambda: across_steps(
            model(), GradientAccumulateOptimizer(optimizer(), accum_steps)
        ),
        ACROSS_STEPS: lambda: across_steps(
            GradientAccumulateModel(model=model(), accum_steps=accum_steps), optimizer()
        ),
        WITHIN_STEP: lambda: within_step(
            GradientAccumulateModel(model=model(), micro_batch_size=micro_batch_size), optimizer()
        ),
    }
