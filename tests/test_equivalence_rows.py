"""check_equivalence and embeddings: Keras's treatment of repeated rows is named, and set apart."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import (
    AdaptiveGradientClipping,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    check_equivalence,
)
from tests.oracle import difference

X = np.random.default_rng(0).integers(0, 6, size=(16, 3))
Y = np.random.default_rng(1).normal(size=(16, 1))


def model_of(optimizer, *layers):
    keras.utils.set_random_seed(1)
    embedding = keras.layers.Embedding(8, 4, name="embedding")
    layers = [embedding, *layers, keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers], name="net")
    model.compile(optimizer, "mse")
    return model


def check(model, **arguments):
    return check_equivalence(model, X, Y, verbose=0, updates=2, **arguments)


def optimizers(**names):
    """Names with functions of no arguments, without those that this Keras does not have."""
    return {n: f for n, f in names.items() if hasattr(keras.optimizers, n.split()[0])}


def of(name, rate=0.1, **arguments):
    return lambda: getattr(keras.optimizers, name)(rate, **arguments)
