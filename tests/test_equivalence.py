"""check_equivalence says of each model whether it accumulates to the large batch, and why not."""

import logging

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
from tests.oracle import KERAS, difference, mirrored, regression_data

X, Y, WEIGHTS = regression_data(32)


def model_of(*layers, optimizer=None, loss="mse", compile_with=None):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(8, "tanh"), *layers, keras.layers.Dense(1)]
    )
    optimizer = optimizer or keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, loss, **(compile_with or {}))
    return model


def eager(*layers, **arguments):
    """The same without a trace: what is found does not depend on the execution."""
    return model_of(*layers, **arguments, compile_with={"run_eagerly": True})


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


class OwnCompile(WithConfig):
    def compile(self, rate):
        super().compile(keras.optimizers.SGD(rate), "mse")


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


def own_compile():
    model = OwnCompile(4)
    model(X[:1])
    model.compile(0.1)
    return model


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


class Task(keras.Model):
    """Holds its layers before its graph does, in another order, as KerasHub's tasks do."""

    def __init__(self):
        self.head = keras.layers.Dense(5, trainable=False)
        self.preprocessor = keras.layers.Rescaling(2.0)
        inputs = keras.Input((5,))
        body = keras.layers.Dense(5, "tanh")
        super().__init__(inputs, self.head(body(self.preprocessor(inputs))))


def task():
    model = Task()
    model.compile("sgd", "mse")
    return model


class ToldItsMask(OwnCall):
    def micro_batch_weight(self, x, y, sample_weight):
        return keras.ops.sum(keras.ops.cast(y > 0, "float32"))


def told_its_mask():
    model = ToldItsMask(micro_batch_size=8)
    model(X[:1])
    model.compile("sgd", masked)
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
    "own compile": lambda: (lambda: own_compile(), {"micro_batch_size": 8}),
    "own train_step": lambda: (lambda: built(OwnStep(4)), {"accum_steps": 4}),
    "GradientAccumulateModel": lambda: (wrapped(micro_batch_size=8), {}),
    "GradientAccumulateModel, accum_steps": lambda: (wrapped(accum_steps=4), {}),
    "exact batch norm": lambda: (
        wrapped(keras.layers.BatchNormalization(), micro_batch_size=8, batch_norm="exact"),
        {},
    ),
    "layers in attributes": lambda: (task(), {}),
    "mask told by micro_batch_weight": lambda: (lambda: told_its_mask(), OWN_WAY),
    "mask as weights": lambda: (
        model_of(loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")),
        {"sample_weight": (Y[:, 0] > 0).astype("float32")},
    ),
    "subclass of GradientAccumulateModel": lambda: (lambda: built(OwnCall(8)), OWN_WAY),
}


def wrapped(*layers, **arguments):
    model = GradientAccumulateModel(model=model_of(*layers), **arguments)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


@pytest.mark.parametrize("name", list(EQUAL))
def test_what_is_equal_is_found_equal_without_a_cause(name):
    if KERAS < (3, 10) and name == "layers in attributes":
        pytest.skip("Keras 3.8 cannot copy such a class, which the error says")
    model, arguments = EQUAL[name]()
    report = check(model, **arguments)
    model = model if isinstance(model, keras.Model) else model()
    assert report.equivalent and not report.causes, report
    assert len(report.variables) == len(model.weights)
    for v, weight in zip(report.variables, model.weights, strict=True):
        assert v.within and v.relative < 1e-4
        assert v.movement > 1e-4 or not weight.trainable


@pytest.mark.fast
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


class Centred(keras.layers.Layer):
    def call(self, x):
        return x - keras.ops.mean(x, axis=0)


class Draws(keras.layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


class Rolled(keras.layers.Layer):
    """Adds to each example the one before it in the batch."""

    def call(self, x):
        return x + keras.ops.roll(x, 1, axis=0)


def batch_norm():
    return keras.layers.BatchNormalization(name="norm")


def in_block():
    return keras.Sequential([keras.layers.Dense(4), batch_norm()], name="block")


def masked(y, y_pred):
    """Divides by its own mask."""
    mask = keras.ops.cast(y > 0, "float32")
    return keras.ops.sum(mask * keras.ops.square(y - y_pred)) / keras.ops.sum(mask)


# What each cause's advice must say: the way out.
WAYS_OUT = {
    "batch_norm": ['batch_norm="exact"', "swap_batch_norm", "freeze"],
    "random": ["set its rate to 0"],
    "state": ["callback", "ended_in_update"],
    "order": ["micro-batches of whole pairs", "float64"],
    "unknown": ["axis 0", "one example at a time", "GradientCheckpoint", "coupled_loss=True"],
    "not_deterministic": ["keras.random.SeedGenerator", "enable_op_determinism"],
    "half_precision": ["Compare in float32"],
    "loss": [
        "coupled_loss=True",
        "(tried)",
        "micro_batch_weight",
        "mean_with_sample_weight",
        "sample_weight",
    ],
}

DIFFERENT = {
    "batch_norm": (lambda: eager(batch_norm()), "batch_norm", ("norm",)),
    "AccumBatchNorm": (lambda: eager(AccumBatchNorm(name="norm")), "batch_norm", ("norm",)),
    "nested batch norm": (lambda: eager(in_block()), "batch_norm", ("block/norm",)),
    "dropout": (lambda: eager(keras.layers.Dropout(0.3, name="drop")), "random", ("drop",)),
    "counter": (lambda: eager(Counts(name="count")), "state", ("sequential/count/variable",)),
    "by order": (lambda: eager(Rolled()), "order", ()),
    "layer across examples": (lambda: eager(Centred()), "unknown", ()),
    "loss divides by its mask": (lambda: eager(loss=masked), "loss", ("masked",)),
    "tf.random": (lambda: eager(Draws()), "not_deterministic", ()),
    "half": (
        lambda: eager(keras.layers.Dense(8, dtype="mixed_bfloat16")),
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
    assert all(words in report.causes[0].advice for words in WAYS_OUT[kind])
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
        rule_and_way_out = r"schedule of accum_steps.*Received: .*\. Pass a model .*accum_steps=4"
        with pytest.raises(ValueError, match=rule_and_way_out):
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


@pytest.mark.fast
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


@pytest.mark.fast
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


@pytest.mark.fast
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
    deep = eager(*[keras.layers.Dense(8) for _ in range(8)], batch_norm())
    printed = str(check(deep)).splitlines()
    assert sum("e-" in line or "e+" in line for line in printed) == 12
    assert "... and 12 more that differ less" in printed


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {},
            "Exactly one of `micro_batch_size` and `accum_steps` must be given. Received: "
            "micro_batch_size=None, accum_steps=None. Pass micro_batch_size=8 .* or accum_steps=4",
        ),
        (
            {"micro_batch_size": 4, "accum_steps": 2},
            "Exactly one.*Received: micro_batch_size=4, accum_steps=2. Pass micro_batch_size=8",
        ),
        ({"micro_batch_size": 0}, "`micro_batch_size` must be an integer >= 1.*=0"),
        (
            {"micro_batch_size": 32},
            "smaller than the effective.*=32 for .*32.*micro_batch_size=16 or",
        ),
        ({"micro_batch_size": 9, "batch_size": 8}, "=9 for an effective batch of 8.*Pass micro"),
        ({"micro_batch_size": 1, "batch_size": 1}, "=1 for an effective batch of 1.*more examples"),
        ({"accum_steps": 1}, "must be at least 2, or nothing is accumulated.*Pass accum_steps=2"),
        ({"accum_steps": 5}, "multiple of `accum_steps`. Received: batch_size=32, accum_steps=5"),
        ({"accum_steps": 2, "batch_size": 33}, "at least one effective batch.*32 examples"),
        ({"accum_steps": 2, "updates": 0}, "`updates` must be an integer >= 1"),
        ({"accum_steps": 2, "tolerance": -1.0}, "finite number > 0.*=-1.0. Pass .* tolerance=1e-3"),
        (
            {"accum_steps": 2, "sample_weight": np.ones(3)},
            "same number of examples, at least 1. Received: x of 32, y of 32, sample_weight of 3 "
            "examples. Pass arrays with one row for each example.*np.repeat",
        ),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_equivalence(model_of(), X, Y, **arguments)


@pytest.mark.parametrize("wrap", [{"micro_batch_size": 32}, {"accum_steps": 1}])
def test_refuses_a_wrapper_that_accumulates_nothing(wrap):
    with pytest.raises(ValueError, match=r"or nothing is accumulated.*Received: .*=(32|1) for"):
        check_equivalence(wrapped(**wrap), X, Y)
    model = model_of(optimizer=GradientAccumulateOptimizer("sgd", 1))
    with pytest.raises(ValueError, match=r"or nothing is accumulated.*Received: accum_steps=1"):
        check_equivalence(model, X, Y)


def of_words():
    inputs = keras.Input((1,), dtype="string")
    words = keras.layers.TextVectorization(output_sequence_length=3, vocabulary=["a", "b"])
    x = keras.layers.Embedding(5, 4)(words(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(x)))
    model.compile("sgd", "mse")
    return model


WORDS = np.array([["a b"], ["b"], ["c a"], ["b a b"]] * 8)
BATCHES = tf.data.Dataset.from_tensor_slices((X, Y, WEIGHTS)).batch(5)
FORMS = {
    "str array": lambda: (WORDS, Y, {}),
    "list of str": lambda: ([str(word) for word in WORDS[:, 0]], Y, {}),
    "object array": lambda: (WORDS.astype(object), Y, {}),
    "string tensor": lambda: (tf.constant(WORDS), Y, {}),
    "dataset": lambda: (BATCHES, None, {}),
    "dataset without an end": lambda: (BATCHES.repeat(), None, {"batch_size": 32}),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_takes_what_fit_takes(form):
    if KERAS < (3, 10) and "dataset" not in form:
        pytest.skip("plain Keras 3.8 does not train such a model either")
    x, y, arguments = FORMS[form]()
    make = model_of if "dataset" in form else of_words
    model = make()
    report = check_equivalence(model, x, y, micro_batch_size=8, verbose=0, **arguments)
    assert report.equivalent and all(v.movement > 1e-4 for v in report.variables)
    # Of the same examples in the effective batch.
    plain = [X, Y, WEIGHTS] if "dataset" in form else [tf.constant(WORDS), Y, None]
    before = model.get_weights()
    for _ in range(3):
        model.fit(*plain[:2], sample_weight=plain[2], batch_size=32, shuffle=False, verbose=0)
    moved = [np.linalg.norm(a - b) for a, b in zip(model.get_weights(), before, strict=True)]
    np.testing.assert_allclose([v.movement for v in report.variables], moved, rtol=1e-3)


def test_a_dataset_is_read_as_far_as_needed_and_cut_anew():
    def elements():
        for _ in range(4):
            yield X[:5], Y[:5]
        raise AssertionError("more than 2 updates of 8 examples was read")

    spec = (tf.TensorSpec((None, 5)), tf.TensorSpec((None, 1)))
    data = tf.data.Dataset.from_generator(elements, output_signature=spec)
    arguments = {"micro_batch_size": 4, "batch_size": 8, "updates": 2, "verbose": 0}
    report = check_equivalence(model_of(), data, **arguments)
    assert report.equivalent and "large batch of 8, 2 updates" in report.setting


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return X, Y


@pytest.mark.parametrize(
    "x, y, error, message",
    [
        (iter(BATCHES), None, TypeError, r"x of type \w*Iterator.*x, y = next\(generator\)"),
        ((pair for pair in [(X, Y)]), None, TypeError, r"x of type generator.*next\(generator\)"),
        (Batches(), None, TypeError, r"x of type Batches.*x, y = dataset\[0\]"),
        ({"a": tf.sparse.from_dense(X)}, Y, TypeError, r"x\['a'\] of type Sparse.*to_dense"),
        (X, 3.0, TypeError, "y of type float"),
        (BATCHES, Y, ValueError, "must not be given with a tf.data.Dataset.*y of type ndarray"),
        (BATCHES.repeat(), None, ValueError, r"without an end.*Pass batch_size, or dataset\.take"),
        (
            BATCHES.take(0),
            None,
            ValueError,
            "at least one effective batch. Received: an empty dataset. Pass one that yields "
            "batches: a generator that was read to its end.*`filter` or `skip`",
        ),
        (X[:0], Y[:0], ValueError, "at least 1. Received: x of 0, y of 0 examples. Pass arrays"),
        ([X, X[:5]], Y, ValueError, "Received: x of 5 and 32, y of 32 examples. Pass arrays"),
        (None, None, ValueError, "Received: no array examples. Pass arrays with one row"),
        (
            tf.data.Dataset.range(6).map(lambda n: (tf.zeros((2, n)), tf.zeros((2, 1)))),
            None,
            ValueError,
            "same shape but for the number of examples.*padded_batch",
        ),
    ],
)
def test_refuses_data(x, y, error, message):
    with pytest.raises(error, match=message):
        check_equivalence(model_of(), x, y, micro_batch_size=4)


def test_says_nothing_of_its_own_tracing(caplog):
    said = []
    logger = tf.get_logger()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        for _ in range(3):
            check(model_of(), updates=1)
    finally:
        logger.removeHandler(handler)
    assert not said


class NoConfig(keras.layers.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)

    def get_config(self):
        raise NotImplementedError("no config")


def test_refuses_models():
    with pytest.raises(TypeError, match=r"Keras 3 model, .*Received: 'adam'.*Pass the model"):
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
    with pytest.raises(ValueError, match=r"overrides.*OwnStep.*train_step\. Pass accum_steps"):
        check(built(OwnStep(4)), micro_batch_size=8)
    gan = built(Subclassed(4))
    gan.second_optimizer = keras.optimizers.SGD()
    with pytest.raises(ValueError, match=r"model\.optimizer. alone.*optimizers second_optimizer"):
        check(gan)
    with pytest.raises(ValueError, match=r"`compile` takes other arguments.*OwnCompile\.compile"):
        check(own_compile())
    with mirrored().scope():
        model = model_of()
    with pytest.raises(ValueError, match=r"outside of a strategy.*2 replicas"):
        check(model)
