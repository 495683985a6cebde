"""check_equivalence says of each model whether it accumulates to the large batch, and why not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import (
    AccumBatchNorm,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    check_equivalence,
)
from tests.oracle import difference, mirrored, regression_data

X, Y, WEIGHTS = regression_data(32)


def model_of(*layers, optimizer=None, loss="mse", compile_with=None):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(8, "tanh"), *layers, keras.layers.Dense(1)]
    )
    optimizer = optimizer or keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, loss, **(compile_with or {}))
    return model


OWN_WAY = {"micro_batch_size": None}


def check(model, **arguments):
    if not (isinstance(model, GradientAccumulateModel) or "accum_steps" in arguments):
        arguments = {"micro_batch_size": 8, **arguments}
    return check_equivalence(model, X, Y, verbose=0, **arguments)


def kinds(report):
    return [cause.kind for cause in report.causes]


class Scaled(keras.layers.Layer):
    """A layer that is not registered, with an argument."""

    def __init__(self, by, **kwargs):
        super().__init__(**kwargs)
        self.by = by

    def call(self, x):
        return self.by * x

    def get_config(self):
        return {**super().get_config(), "by": self.by}


class Subclassed(keras.Model):
    def __init__(self, units):
        super().__init__()
        self.dense, self.out = keras.layers.Dense(units, "tanh"), keras.layers.Dense(1)

    def call(self, x):
        return self.out(self.dense(x))


class WithConfig(Subclassed):
    def get_config(self):
        return {"units": self.dense.units}


class OwnStep(Subclassed):
    """A model with the usual `train_step` of its own."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        variables = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {"loss": loss}


class OwnCall(GradientAccumulateModel):
    def __init__(self, micro_batch_size):
        super().__init__(micro_batch_size=micro_batch_size)
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)


def built(model, optimizer="sgd"):
    model(X[:1])
    model.compile(optimizer, "mse")
    return model


def nested():
    inner = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4)], name="inner")
    inputs = keras.Input((5,))
    x = keras.layers.Lambda(lambda x: x + 1.0)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(inner(inner(inputs) @ np.ones((4, 5)) + x)))
    model.compile("rmsprop", lambda y, p: keras.ops.mean((y - p) ** 2, axis=-1))
    return model


EQUAL = {
    "micro_batch_size": lambda: (model_of(), {"micro_batch_size": 8}),
    "ragged micro-batches": lambda: (model_of(), {"micro_batch_size": 7}),
    "accum_steps": lambda: (model_of(), {"accum_steps": 4}),
    "several effective batches": lambda: (model_of(), {"accum_steps": 2, "batch_size": 8}),
    "sample weights": lambda: (model_of(), {"accum_steps": 4, "sample_weight": WEIGHTS}),
    "XLA": lambda: (model_of(compile_with={"jit_compile": True}), {"accum_steps": 4}),
    "a sum": lambda: (
        model_of(loss=keras.losses.MeanSquaredError(reduction="sum")),
        {"micro_batch_size": 8},
    ),
    "frozen batch norm": lambda: (model_of(keras.layers.BatchNormalization(trainable=False)), {}),
    "custom layer": lambda: (model_of(Scaled(0.5)), {}),
    "nested, Lambda, loss a lambda": lambda: (nested(), {}),
    "subclassed": lambda: (lambda: built(Subclassed(4)), {"micro_batch_size": 8}),
    "with a config": lambda: (built(WithConfig(4)), {"micro_batch_size": 8}),
    "own train_step": lambda: (lambda: built(OwnStep(4)), {"accum_steps": 4}),
    "GradientAccumulateModel": lambda: (wrapped(micro_batch_size=8), {}),
    "GradientAccumulateModel, accum_steps": lambda: (wrapped(accum_steps=4), {}),
    "exact batch norm": lambda: (
        wrapped(keras.layers.BatchNormalization(), micro_batch_size=8, batch_norm="exact"),
        {},
    ),
    "subclass of GradientAccumulateModel": lambda: (lambda: built(OwnCall(8)), OWN_WAY),
}


def wrapped(*layers, **arguments):
    model = GradientAccumulateModel(model=model_of(*layers), **arguments)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


@pytest.mark.parametrize("name", list(EQUAL))
def test_what_is_equal_is_found_equal_without_a_cause(name):
    model, arguments = EQUAL[name]()
    report = check(model, **arguments)
    model = model if isinstance(model, keras.Model) else model()
    assert report.equivalent and not report.causes, report
    assert len(report.variables) == len(model.weights)
    for v, weight in zip(report.variables, model.weights, strict=True):
        assert v.within and v.relative < 1e-4
        assert v.movement > 1e-4 or not weight.trainable


def test_an_optimizer_that_accumulates_is_checked_as_it_is():
    model = model_of(optimizer=GradientAccumulateOptimizer(keras.optimizers.Adam(0.01), 4))
    report = check_equivalence(model, X, Y, verbose=0)
    assert report.equivalent
    assert report.setting.startswith("GradientAccumulateOptimizer(accum_steps=4)")


class Counts(keras.layers.Layer):
    """Divides by how often it was called."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="ones", trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x / self.calls


class AcrossExamples(keras.losses.Loss):
    def call(self, y, y_pred):
        return keras.ops.square(y_pred - keras.ops.mean(y_pred)) - y * y_pred


class Draws(keras.layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def batch_norm():
    return keras.layers.BatchNormalization(name="norm")


def in_block():
    return keras.Sequential([keras.layers.Dense(4), batch_norm()], name="block")


DIFFERENT = {
    "batch_norm": (lambda: model_of(batch_norm()), "batch_norm", ("norm",)),
    "AccumBatchNorm": (lambda: model_of(AccumBatchNorm(name="norm")), "batch_norm", ("norm",)),
    "nested batch norm": (lambda: model_of(in_block()), "batch_norm", ("block/norm",)),
    "dropout": (lambda: model_of(keras.layers.Dropout(0.3, name="drop")), "random", ("drop",)),
    "counter": (lambda: model_of(Counts(name="count")), "state", ("sequential/count/variable",)),
    "contrastive": (lambda: model_of(loss=AcrossExamples()), "unknown", ()),
    "tf.random": (lambda: model_of(Draws()), "not_deterministic", ()),
    "half": (
        lambda: model_of(keras.layers.Dense(8, dtype="mixed_bfloat16")),
        "half_precision",
        ("bfloat16",),
    ),
}


@pytest.mark.parametrize("name", list(DIFFERENT))
def test_what_differs_is_found_with_its_cause(name, capsys):
    make, kind, where = DIFFERENT[name]
    model = make()
    report = check(model, tolerance=1e-5)
    assert not report.equivalent
    assert kinds(report) == [kind]
    if name != "counter":
        assert report.causes[0].where == where
    assert "Not equivalent" in str(report) and kind in str(report)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["a sum", "sample weights", "mask", "schedule"])
def test_what_an_optimizer_alone_cannot_know(name):
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 4)
    loss, arguments, x = "mse", {}, X
    if name == "a sum":
        loss = keras.losses.MeanSquaredError(reduction="sum")
    if name == "sample weights":
        arguments["sample_weight"] = np.linspace(0.0, 2.0, 32)
        loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    model = model_of(optimizer=optimizer, loss=loss)
    if name == "mask":
        rng = np.random.default_rng(0)
        x = rng.integers(1, 9, size=(32, 6)) * (np.arange(6) < rng.integers(1, 6, size=(32, 1)))
        layers = [keras.layers.Embedding(9, 4, mask_zero=True, name="embed"), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((6,)), *layers])
        model.compile(optimizer, loss)
    if name == "schedule":
        model.compile(GradientAccumulateOptimizer("sgd", {0: 1, 4: 2}), "mse")
        with pytest.raises(ValueError, match="schedule of accum_steps cannot be checked"):
            check_equivalence(model, x, Y)
        return
    y = np.repeat(Y, 6, axis=1)[..., None] if name == "mask" else Y
    report = check_equivalence(model, x, y, verbose=0, **arguments)
    assert not report.equivalent
    assert kinds(report) == (["loss"] if name == "a sum" else ["loss", "loss"])
    assert {"a sum": 'reduction="sum"', "sample weights": "weight=", "mask": "weight="}[name] in (
        report.causes[0].advice
    )
    if name == "mask":
        assert report.causes[0].where == ("embed",)


def test_the_model_is_left_as_it_was():
    model = model_of(keras.layers.Dropout(0.5), batch_norm())
    model.fit(X, Y, verbose=0)
    optimizer, function = model.optimizer, model.train_function
    before = [v.numpy() for v in (*model.variables, *optimizer.variables)]
    assert len(before) == len(model.weights) + 1 + len(optimizer.variables)
    check(model)
    check(model, accum_steps=2)
    assert difference([v.numpy() for v in (*model.variables, *optimizer.variables)], before) == 0
    assert model.optimizer is optimizer and model.train_function is function


@pytest.mark.parametrize("kind", ["plain", "optimizer", "model"])
def test_it_starts_from_the_state_of_model_and_optimizer(kind):
    def adam():
        return keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 3, 0.5))

    if kind == "plain":
        model, arguments = model_of(optimizer=adam()), {"accum_steps": 4}
    elif kind == "optimizer":
        model, arguments = model_of(optimizer=GradientAccumulateOptimizer(adam(), 4)), {}
    else:
        model, arguments = GradientAccumulateModel(model=model_of(), accum_steps=4), {}
        model.compile(adam(), "mse")
    model.fit(X, Y, batch_size=8, epochs=3, verbose=0)
    report = check_equivalence(model, X, Y, updates=2, verbose=0, **arguments)
    assert report.equivalent
    # Two more updates of the model itself do what those of the copies did.
    before = model.get_weights()
    batch_size = 32 if kind == "plain" else 8
    model.fit(X, Y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
    moved = [np.linalg.norm(a - b) for a, b in zip(model.get_weights(), before, strict=True)]
    np.testing.assert_allclose([v.movement for v in report.variables], moved, rtol=1e-3)


def test_under_a_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = model_of()
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        model.optimizer.initial_scale = 256.0
        assert check(model, tolerance=3e-2).equivalent
        assert kinds(check(model, tolerance=1e-7)) == ["half_precision"]
    finally:
        keras.config.set_dtype_policy("float32")


def test_prints_its_table(capsys):
    report = check_equivalence(model_of(), X, Y, micro_batch_size=8, batch_size=16, updates=2)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    lines = printed.splitlines()
    assert lines[0] == (
        "GradientAccumulateModel(micro_batch_size=8) against the large batch of 16, 2 updates"
    )
    assert lines[2].split() == ["variable", "movement", "difference", "relative", "reordered"]
    assert "sequential/dense/kernel" in printed and "Equivalent:" in lines[-1]


def test_a_deep_model_shows_what_is_furthest_off():
    deep = model_of(*[keras.layers.Dense(8) for _ in range(8)], batch_norm())
    printed = str(check(deep)).splitlines()
    assert sum("e-" in line or "e+" in line for line in printed) == 12
    assert "... and 12 more that differ less" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "Exactly one of `micro_batch_size` and `accum_steps`.*Received: micro.*None"),
        ({"micro_batch_size": 4, "accum_steps": 2}, "Exactly one.*=4, accum_steps=2"),
        ({"micro_batch_size": 0}, "`micro_batch_size` must be an integer >= 1.*=0"),
        ({"accum_steps": 5}, "multiple of `accum_steps`. Received: batch_size=32, accum_steps=5"),
        ({"accum_steps": 2, "batch_size": 33}, "at least one effective batch.*32 examples"),
        ({"accum_steps": 2, "updates": 0}, "`updates` must be an integer >= 1"),
        ({"accum_steps": 2, "tolerance": -1.0}, "`tolerance` must be a finite number > 0"),
        ({"accum_steps": 2, "sample_weight": np.ones(3)}, r"same number.*Received: \[3, 32\]"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_equivalence(model_of(), X, Y, **arguments)


class NoConfig(keras.layers.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)

    def get_config(self):
        raise NotImplementedError("no config")


def test_refuses_models():
    with pytest.raises(TypeError, match=r"compiled Keras 3 model, .*\. Received: 'adam'"):
        check_equivalence("adam", X, Y, accum_steps=2)
    with pytest.raises(ValueError, match=r"must be compiled.*which is not"):
        check_equivalence(keras.Sequential([keras.layers.Dense(1)]), X, Y, accum_steps=2)
    unbuilt = keras.Sequential([keras.layers.Dense(1)])
    unbuilt.compile("sgd", "mse")
    with pytest.raises(ValueError, match="must be built"):
        check_equivalence(unbuilt, X, Y, accum_steps=2)
    with pytest.raises(ValueError, match=r"checked as it is\. Received: .*accum_steps=2"):
        check(wrapped(micro_batch_size=8), accum_steps=2)
    with pytest.raises(ValueError, match=r"copied through `get_config`.*no config"):
        check(model_of(NoConfig(tf.abs)))
    with pytest.raises(ValueError, match=r"overrides a training method.*OwnStep.*train_step"):
        check(built(OwnStep(4)), micro_batch_size=8)
    with mirrored().scope():
        model = model_of()
    with pytest.raises(ValueError, match=r"outside of a strategy.*2 replicas"):
        check(model)
