"""Writes small files of trainings that stopped in mid-cycle, and the weights that they lead to.

The files in this folder were written with version 0.1.0 (commit d74ec4e), Keras 3.8 and TensorFlow
2.16. `tests/test_saved_before.py` loads them with the present code. Files are never written anew:
a later version that changes what it saves adds files of its own, in a folder of its own.

    python tests/data/make_saved_files.py FOLDER
"""

import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

from gradient_accumulator_tf import (
    AccumBatchNorm,
    AdaptiveGradientClipping,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    GradientCheckpoint,
    PiecewiseConstantSteps,
    scale_learning_rate,
    swap_batch_norm,
)

FEATURES, MICRO, STEPS = 3, 2, 3
# Micro-batches before a file is written, and at the end of the training.
SAVED_AFTER, END = 5, 12


def batch(index):
    """Micro-batch number `index`: x, y."""
    rng = np.random.default_rng(index)
    x = rng.normal(size=(MICRO, FEATURES)).astype("float32")
    return x, np.sin(x).sum(axis=1, keepdims=True).astype("float32") + 1


def dense(units, seed, **kwargs):
    """A layer with weights that are the same in all versions of Keras."""
    return keras.layers.Dense(units, name=f"dense_{seed}", **kwargs)


def with_fixed_weights(model):
    """`model` with weights that do not depend on Keras's random numbers."""
    rng = np.random.default_rng(7)
    for variable in model.trainable_variables:
        if variable.path.endswith(("kernel", "bias")):
            variable.assign(rng.uniform(-0.8, 0.8, size=variable.shape))
    return model


def plain(input_dtype="float32", **kwargs):
    """A small functional model."""
    inputs = keras.Input((FEATURES,), dtype=input_dtype)
    hidden = dense(4, 1, activation="tanh", **kwargs)(inputs)
    return with_fixed_weights(keras.Model(inputs, dense(1, 2, **kwargs)(hidden)))


def model_with_layers_of_this_package():
    """accum_steps; AccumBatchNorm, GradientCheckpoint, clipping and a scaled schedule."""
    inputs = keras.Input((FEATURES,))
    hidden = GradientCheckpoint(dense(4, 1, activation="tanh"), name="checkpointed")(inputs)
    hidden = AccumBatchNorm(accum_steps=STEPS, momentum=0.5, name="norm")(hidden)
    net = with_fixed_weights(keras.Model(inputs, dense(1, 2)(hidden)))
    model = GradientAccumulateModel(model=net, accum_steps=STEPS)
    rate = scale_learning_rate(
        keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=2, decay_rate=0.5),
        batch_size=MICRO,
        base_batch_size=4,
        accum_steps=STEPS,
    )
    optimizer = keras.optimizers.SGD(rate, momentum=0.9)
    optimizer = AdaptiveGradientClipping(optimizer, clip_factor=0.2, exclude=("dense_2",))
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def model_with_a_schedule():
    """accum_steps over updates, in the model and in the learning rate."""
    steps = {0: 1, 1: 2, 2: 3, 3: 4}
    model = GradientAccumulateModel(model=plain(), accum_steps=PiecewiseConstantSteps(steps))
    rate = scale_learning_rate(
        0.02, batch_size=MICRO, base_batch_size=MICRO, accum_steps=PiecewiseConstantSteps(steps)
    )
    model.compile(keras.optimizers.Adam(rate), "mse")
    return model


def model_within_a_step():
    """micro_batch_size, with swapped and exact batch normalisation."""
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.BatchNormalization(momentum=0.5, name="norm")(dense(4, 1)(inputs))
    net = swap_batch_norm(keras.Model(inputs, dense(1, 2)(hidden)), to="accum")
    model = GradientAccumulateModel(
        model=with_fixed_weights(net), micro_batch_size=1, non_finite="drop_micro_batch"
    )
    model.compile(keras.optimizers.Adam(0.02), "mse")
    return model


def exact_batch_norm_within_a_step():
    """micro_batch_size with batch_norm="exact"."""
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.BatchNormalization(momentum=0.5, name="norm")(dense(4, 1)(inputs))
    net = with_fixed_weights(keras.Model(inputs, dense(1, 2)(hidden)))
    model = GradientAccumulateModel(model=net, micro_batch_size=1, batch_norm="exact")
    model.compile(keras.optimizers.SGD(0.02, momentum=0.9), "mse")
    return model


def optimizer_with_a_mean():
    """A plain model with the optimizer wrapper."""
    model = plain()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.Adam(0.02), STEPS)
    model.compile(optimizer, keras.losses.MeanSquaredError())  # an `.h5` file loads no name
    return model


def optimizer_with_a_sum_and_a_schedule():
    """The optimizer wrapper with reduction="sum" and steps that change."""
    model = plain()
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    steps = {0: 2, 1: 4, 2: 3}
    model.compile(GradientAccumulateOptimizer(optimizer, steps, reduction="sum"), "mse")
    return model


def optimizer_with_a_loss_scale():
    """A loss scale around the optimizer wrapper, which drops micro-batches."""
    # Inputs in float16, as Keras 3.8 otherwise counts a cast among the layers of a checkpoint.
    model = plain(input_dtype="float16", dtype="mixed_float16")
    optimizer = GradientAccumulateOptimizer(
        keras.optimizers.SGD(0.05, momentum=0.9), STEPS, non_finite="drop_micro_batch"
    )
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0), "mse")
    return model


def two_denominators():
    """Two outputs of which one has a mean over weights: two groups of sums."""
    inputs = keras.Input((FEATURES,))
    outputs = {"a": dense(1, 1)(inputs), "b": dense(1, 2)(inputs)}
    outputs = {name: keras.layers.Identity(name=name)(out) for name, out in outputs.items()}
    net = with_fixed_weights(keras.Model(inputs, outputs))
    model = GradientAccumulateModel(model=net, accum_steps=STEPS)
    weighted = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    model.compile(keras.optimizers.SGD(0.02, momentum=0.9), {"a": weighted, "b": "mse"})
    return model


def train(model, start, stop):
    """Trains on micro-batches `start` to `stop`; a loss scale's fifth one is not finite."""
    for index in range(start, stop):
        x, y = batch(index)
        if index == 4 and isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
            y = np.full_like(y, np.inf)
        if len(model.outputs) == 2:
            weights = {"a": np.array([0.5, 2.0 + index]), "b": np.ones(2)}
            model.train_on_batch(x, {"a": y, "b": -y}, sample_weight=weights)
        else:
            model.train_on_batch(x, y)


# The models, by the ending of the file.
MODELS = {
    "keras": [
        model_with_layers_of_this_package,
        model_with_a_schedule,
        model_within_a_step,
        exact_batch_norm_within_a_step,
        optimizer_with_a_mean,
        optimizer_with_a_sum_and_a_schedule,
        optimizer_with_a_loss_scale,
    ],
    "h5": [optimizer_with_a_mean],
    "weights.h5": [
        model_with_layers_of_this_package,
        optimizer_with_a_mean,
        optimizer_with_a_loss_scale,
    ],
    "ckpt": [
        model_with_layers_of_this_package,
        optimizer_with_a_mean,
        optimizer_with_a_loss_scale,
        two_denominators,
    ],
}


def save(model, path):
    """Saves `model` in the format of the ending of `path`."""
    if path.suffix == ".ckpt":
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(path))
    elif path.name.endswith(".weights.h5"):
        model.save_weights(path)
    else:
        model.save(path)


def main(folder):
    """Writes all files, and `weights.npz`: the weights when saved and at the end."""
    weights = {}
    for make in dict.fromkeys(make for makes in MODELS.values() for make in makes):
        model = make()
        train(model, 0, SAVED_AFTER)
        for i, value in enumerate(model.get_weights()):
            weights[f"{make.__name__}/saved/{i}"] = value
        for ending, makes in MODELS.items():
            if make in makes:
                save(model, folder / f"{make.__name__}.{ending}")
        train(model, SAVED_AFTER, END)
        for i, value in enumerate(model.get_weights()):
            weights[f"{make.__name__}/end/{i}"] = value
    np.savez_compressed(folder / "weights.npz", **weights)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
