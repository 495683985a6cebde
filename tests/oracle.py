"""The oracle of every test: the same training on the true large batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer

KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])

# How Keras runs a training step; each test of a wrapper runs in all of them.
EXECUTIONS = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "jit": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 3},
}


def each_in_turn(names, ways, core=(), fast=()):
    """Parameters (name, way): each name in one of `ways` in turn, and those of `core` in all.

    A fault is in a way or in a name, rarely in a pair of both; the full product would find no more.

    Args:
        names: Names, of which each comes in at least one way.
        ways: Ways, of which each comes with at least `len(names) // len(ways)` names.
        core: The names that come in each way.
        fast: The names of `core` that are part of `make test-fast`.
    """
    ways, pairs = list(ways), []
    for i, name in enumerate(names):
        for way in ways if name in core else [ways[i % len(ways)]]:
            marks = [pytest.mark.fast] if name in fast else []
            label = "-".join(name) if isinstance(name, tuple) else name
            pairs.append(pytest.param(name, way, id=f"{label}-{way}", marks=marks))
    return pairs


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


def mirrored(replicas=2):
    """A MirroredStrategy over the first logical CPU devices.

    Strategies made one after the other in one process share the keys of collectives, so none are
    used.
    """
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
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


# Examples in an effective batch and in a micro-batch.
EFFECTIVE, MICRO = 12, 4
# The ways to accumulate: in the optimizer, and the two modes of the model wrapper. The fixtures
# `way` and `mode` of tests/conftest.py are these. "plain" is the large batch.
WAYS = ("optimizer", "accum_steps", "micro_batch_size")
MODES = WAYS[1:]
ACROSS_STEPS = WAYS[:2]  # `fit` is given micro-batches, and a cycle may be open between two steps


def in_way(
    way,
    model=None,
    optimizer=None,
    *,
    steps=EFFECTIVE // MICRO,
    micro=MICRO,
    replicas=1,
    cls=GradientAccumulateModel,
    **arguments,
):
    """Model, optimizer and batch size for `fit`, to train on effective batches.

    Args:
        way: One of `WAYS`, or "plain" for the large batch.
        model: A plain model.
        optimizer: A plain optimizer; the modes need none.
        steps: Micro-batches in an effective batch.
        micro: Examples in a micro-batch, on all replicas together.
        replicas: How many there are, each of which cuts its own part of an effective batch.
        cls: The model wrapper.
        **arguments: Further arguments of the wrapper.
    """
    if way == "plain":
        return model, optimizer, steps * micro
    if way == "optimizer":
        return model, GradientAccumulateOptimizer(optimizer, steps, **arguments), micro
    size, batch_size = {
        "accum_steps": (steps, micro),
        "micro_batch_size": (micro // replicas, steps * micro),
    }[way]
    return cls(model=model, **{way: size}, **arguments), optimizer, batch_size


def momentum_and_mse():
    """Arguments of `compile`, new in every call, for a training with a memory."""
    return {"optimizer": keras.optimizers.SGD(0.05, momentum=0.9), "loss": "mse"}


def updates_of(optimizer):
    """The innermost optimizer's count: Keras 3.8 leaves a LossScaleOptimizer's own at 0."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return int(optimizer.iterations.numpy())


def assert_trains_as_large_batch(
    make_model,
    *data,
    compile_with=momentum_and_mse,
    ways=MODES,
    tolerance=2e-6,
    same_logs=MODES,
    **fit,
):
    """Trains `make_model()` on effective batches, and in each way the same in micro-batches.

    Args:
        make_model: Function that returns a plain Keras model, with the same weights each time.
        *data: Arguments of `fit`: x, y.
        compile_with: Function that returns the arguments of `compile`.
        ways: Which of `WAYS`.
        tolerance: Largest difference of the weights; of the logs, also relative.
        same_logs: The ways whose histories are to be equal too.
        **fit: Further arguments of `fit`.

    Returns:
        The last accumulating model.
    """
    fit = {"epochs": 2, "shuffle": False, "verbose": 0, **fit}
    plain = make_model()
    # XLA changes nothing of the oracle, and takes as long as all else. Eager steps weigh logs by
    # sizes that a graph does not know.
    plain.compile(**{k: v for k, v in compile_with().items() if k != "jit_compile"})
    before = state_of(plain.weights) if plain.built else None
    expected = plain.fit(*data, batch_size=EFFECTIVE, **fit).history
    trained = state_of(plain.weights)
    # Neither a training that does nothing nor one that diverges could tell a difference.
    moved = 1.0 if before is None else difference(before, trained)
    largest = max(np.max(np.abs(w)) for w in trained)
    assert moved > 1e-3 and largest < 100, f"Weights moved by {moved}, to {largest}"
    for way in ways:
        compiled = dict(compile_with())
        model, optimizer, batch_size = in_way(way, make_model(), compiled.get("optimizer"))
        if optimizer is not None:
            compiled["optimizer"] = optimizer
        model.compile(**compiled)
        history = model.fit(*data, batch_size=batch_size, **fit).history
        off = difference(state_of(model.weights), trained)
        assert off <= tolerance, f"{way}: weights differ by {off}"
        updates = updates_of(model.optimizer), updates_of(plain.optimizer)
        assert updates[0] == updates[1] > 0, f"{way}: updates {updates}"
        if way in same_logs:
            assert list(history) == list(expected), f"{way}: {history} instead of {expected}"
            for name, values in expected.items():
                np.testing.assert_allclose(
                    history[name], values, tolerance, tolerance, err_msg=f"{way}: {name}"
                )
    return model
