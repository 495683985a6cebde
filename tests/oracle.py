"""The oracle of every test: the same training on the true large batch."""

import keras
import numpy as np

# How Keras runs a training step; each test of a wrapper runs in all of them.
EXECUTIONS = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "jit": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 3},
}


def regression_data(examples, features=5, seed=0, dtype="float32"):
    """Inputs (examples, features), targets (examples, 1) and positive weights (examples,)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, features)).astype(dtype)
    y = (np.sin(x).sum(axis=1, keepdims=True) + rng.normal(size=(examples, 1))).astype(dtype)
    return x, y, rng.uniform(0.2, 2.0, size=examples).astype(dtype)


def dense_model(features=5, units=8, seed=1, **kwargs):
    """Two dense layers; the same weights in every call."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((features,)),
            keras.layers.Dense(units, "tanh", **kwargs),
            keras.layers.Dense(1),
        ]
    )


def difference(values, expected):
    """Largest absolute difference between two lists of arrays of the same shapes."""
    values, expected = list(values), list(expected)
    if [np.shape(v) for v in values] != [np.shape(e) for e in expected]:
        raise ValueError(
            f"Shapes differ: {[np.shape(v) for v in values]}, {[np.shape(e) for e in expected]}"
        )
    return max(
        float(np.max(np.abs(np.asarray(v, "float64") - np.asarray(e, "float64")), initial=0.0))
        for v, e in zip(values, expected, strict=True)
    )


def state_of(variables):
    """The variables' values, as arrays."""
    return [keras.ops.convert_to_numpy(v) for v in variables]
