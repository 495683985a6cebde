"""coupled_loss: the large batch's weights and logs, where a loss compares examples of a batch."""

import contextlib
import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from gradient_accumulator_tf import GradientAccumulateModel, GradientCheckpoint
from tests import coupled_losses
from tests.coupled_losses import (
    CASES,
    CLASSES,
    DIMENSIONS,
    FEATURES,
    UNITS,
    Case,
    TwoTowers,
    clip,
    encoder,
    nt_xent,
    residual_variance,
    supervised_contrastive,
    two_views,
)
from tests.oracle import EXECUTIONS, KERAS, difference, each_in_turn, mirrored, state_of

# Ten updates, in micro-batches of 5, 5 and 2.
EXAMPLES, LARGE, MICRO = 120, 12, 5

# How a case is trained: an execution on no strategy, or a number of replicas.
CONDITIONS = {
    **{name: (execution, 0) for name, execution in EXECUTIONS.items()},
    "one_replica": ({}, 1),
    "two_replicas": ({}, 2),
}


CORE = ["nt_xent"]  # comes in all of them


def _sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


class _Trained(NamedTuple):
    """What a training ended with.

    Attributes:
        history: Of `fit`.
        weights: List of the values of all weights.
        trained: List of those of the trainable ones.
        moved: How far one of these has moved.
    """

    history: dict
    weights: list
    trained: list
    moved: float


def _train(
    case,
    wrap=None,
    replicas=0,
    arrays=None,
    sample_weight=None,
    optimizer=_sgd,
    examples=EXAMPLES,
    batch_size=LARGE,
    **kwargs,
):
    """Trains a case for an epoch.

    Args:
        case: `Case`.
        wrap: Function that makes an accumulating model of the plain one; None trains that.
        replicas: Of a `MirroredStrategy`; 0 for no strategy.
        arrays: The inputs and targets, in place of the case's own.
        sample_weight: As for `fit`.
        optimizer: Function that makes it.
        examples: Of the case's own arrays.
        batch_size: As for `fit`.
        **kwargs: Further arguments of `compile`.

    Returns:
        `_Trained`, with the plain model's weights.
    """
    x, y = case.arrays(examples, keras.config.floatx()) if arrays is None else arrays
    with mirrored(replicas).scope() if replicas else contextlib.nullcontext():
        keras.utils.set_random_seed(1)
        plain = case.make_model()
        start = state_of(plain.trainable_weights)
        model = plain if wrap is None else wrap(plain)
        model.compile(optimizer(), case.loss_of(plain), **kwargs)
        history = model.fit(
            x,
            y,
            sample_weight=sample_weight,
            batch_size=batch_size,
            shuffle=False,
            verbose=0,
        ).history
    trained = state_of(plain.trainable_weights)
    moved = difference(start, trained) if start else 1.0
    return _Trained(history, state_of(plain.weights), trained, moved)


def _coupled(model, micro_batch_size=MICRO, coupled_loss=True, **kwargs):
    return GradientAccumulateModel(
        model=model, micro_batch_size=micro_batch_size, coupled_loss=coupled_loss, **kwargs
    )


def _ordinary(model, **kwargs):
    return _coupled(model, coupled_loss=False, **kwargs)


def _train_ordinary(case, wrap=_ordinary, **kwargs):
    """Trains as without the argument, which warns of losses that are known to be coupled."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*coupled_loss", UserWarning)
        return _train(case, wrap, **kwargs)


def _assert_same(trained, expected, tolerance=1e-12):
    # Neither a training that does nothing nor one that diverges could tell a difference.
    largest = max(np.max(np.abs(w)) for w in expected.weights)
    assert expected.moved > 1e-3 and largest < 100, f"Moved by {expected.moved}, to {largest}"
    assert difference(trained.weights, expected.weights) < tolerance
    assert list(trained.history) == list(expected.history)
    for name, values in expected.history.items():
        # Keras keeps metrics in float32, whatever the policy.
        np.testing.assert_allclose(trained.history[name], values, 1e-6, 1e-6, err_msg=name)


def _assert_other(trained, expected):
    assert difference(trained.trained, expected.trained) > 1e-3 * expected.moved


@pytest.mark.parametrize(
    "name, condition",
    each_in_turn(CASES, CONDITIONS, core=CORE, fast=CORE),
)
def test_training_is_that_of_the_large_batch(float64, name, condition):
    case, (execution, replicas) = CASES[name], CONDITIONS[condition]
    # What it is compared with is in a graph: XLA would take longer to compile it than all else.
    expected = _train(case, replicas=replicas)
    _assert_same(_train(case, _coupled, replicas, **execution), expected)
    if condition == "graph" or name not in CORE:
        _assert_other(_train_ordinary(case, replicas=replicas), expected)


@pytest.mark.parametrize("condition", ["graph", "jit", "two_replicas"])
def test_a_smaller_last_batch(float64, condition):
    execution, replicas = CONDITIONS[condition]
    case = CASES["supervised_contrastive"]
    train = {"replicas": replicas, "examples": 44}
    _assert_same(_train(case, _coupled, **train, **execution), _train(case, **train))


@pytest.mark.filterwarnings("ignore:Nothing accumulates:UserWarning")  # in one piece
@pytest.mark.parametrize(
    "micro_batch_size, how", each_in_turn(["1", "4", "11", "12", "100"], EXECUTIONS)
)
def test_every_micro_batch_size(float64, how, micro_batch_size):
    case, execution = CASES["nt_xent"], EXECUTIONS[how]
    _assert_same(
        _train(case, lambda model: _coupled(model, int(micro_batch_size)), **execution),
        _train(case),
    )


# What else is in a training: a model, a loss, arrays, and arguments of `compile` and `fit`.


class _Variant(NamedTuple):
    case: Case
    arrays: Any = None
    wrap: Any = _coupled
    ordinary: Any = _ordinary
    train: dict = {}  # noqa: RUF012


def _wrapped(loss, **kwargs):
    """The loss as an object, whose reduction can be chosen."""

    class Wrapped(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return loss(y_true, y_pred)

    return Wrapped(**kwargs)


def _arrays(*names):
    arrays = coupled_losses.data(EXAMPLES)
    return [arrays[name] for name in names]


def _weighed(reduction):
    loss = _wrapped(residual_variance, reduction=reduction)
    case = Case(encoder, lambda model: loss, ("rows",), "values")
    (weights,) = _arrays("weights")
    optimizer = lambda: keras.optimizers.SGD(0.005 if reduction == "sum" else 0.05)  # noqa: E731
    return _Variant(case, train={"sample_weight": weights, "optimizer": optimizer})


def _masked():
    """Sequences of four tokens, some of them padding that the loss must not count."""
    tokens = np.random.default_rng(0).integers(0, 6, (EXAMPLES, 4))
    targets = np.random.default_rng(1).normal(size=(EXAMPLES, 4, DIMENSIONS))

    def make_model():
        return keras.Sequential(
            [
                keras.Input((4,), dtype="int32"),
                layers.Embedding(6, UNITS, mask_zero=True),
                layers.Dense(DIMENSIONS),
            ]
        )

    loss = _wrapped(residual_variance)
    optimizer = lambda: keras.optimizers.SGD(0.5, momentum=0.9)  # noqa: E731
    case = Case(make_model, lambda model: loss)
    return _Variant(case, (tokens, targets), train={"optimizer": optimizer})


def _several_outputs():
    """One output with a coupled loss, two with ordinary ones, and two without any."""

    def make_model():
        inputs = keras.Input((FEATURES,))
        x = layers.Dense(UNITS, "tanh")(inputs)
        embedding = layers.Dense(DIMENSIONS, name="embedding")(x)
        return keras.Model(
            inputs,
            {
                "embedding": embedding,
                "value": layers.Dense(DIMENSIONS, name="value")(x),
                # Keras finds the logits behind a softmax.
                "label": layers.Dense(CLASSES, "softmax", name="label")(x),
                "largest": keras.ops.argmax(embedding, axis=-1),
                "same": inputs,
            },
        )

    rows, labels, values = _arrays("rows", "labels", "values")
    losses = {
        "embedding": supervised_contrastive,
        "value": "mse",
        "label": "sparse_categorical_crossentropy",
    }
    targets = {
        "embedding": labels,
        "value": values,
        "label": labels,
        "largest": labels,
        "same": rows,
    }
    train = {
        "loss_weights": {"embedding": 0.5, "value": 2.0, "label": 1.0},
        "metrics": {"value": ["mae"], "label": ["accuracy"]},
    }
    return _Variant(Case(make_model, lambda model: losses), (rows, targets), train=train)


class _Adding(layers.Layer):
    """Adds a loss for each example, and one that is a mean."""

    def call(self, inputs):
        self.add_loss(0.01 * keras.ops.sum(inputs**2, axis=-1))
        self.add_loss(0.02 * keras.ops.mean(inputs**2))
        return inputs


def _added_losses():
    def make_model():
        inner = encoder(kernel_regularizer="l2", activity_regularizer=keras.regularizers.L2(1e-3))
        return keras.Sequential([keras.Input((FEATURES,)), inner, _Adding()])

    return _Variant(Case(make_model, lambda model: supervised_contrastive, ("rows",)))


def _optimized(**kwargs):
    optimizer = lambda: keras.optimizers.SGD(0.05, momentum=0.9, **kwargs)  # noqa: E731
    return _Variant(CASES["nt_xent"], train={"optimizer": optimizer})


class Nested(keras.Model):
    """Takes and returns nested structures, and computes with Python between layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two = encoder(), encoder()

    def call(self, inputs, training=False, scale=2.0):
        first, (second,) = inputs["pair"]
        total = self.one(first)
        for _ in range(2 if training else 0):
            total = total + scale * self.two(second)
        return {"deep": {"one": total, "deeper": {"two": self.two(first)}}}


def _nested():
    rows, other, labels, values = _arrays("rows", "other", "labels", "values")
    losses = {"deep": {"one": supervised_contrastive, "deeper": {"two": "mse"}}}
    targets = {"deep": {"one": labels, "deeper": {"two": values}}}
    return _Variant(Case(Nested, lambda model: losses), ({"pair": (rows, [other])}, targets))


class OfTwoOutputs(GradientAccumulateModel):
    """The loss compares two outputs, so it is a `compute_loss` of its own."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return nt_xent(None, keras.ops.stack(y_pred, axis=1))


class PlainOfTwoOutputs(keras.Model):
    compute_loss = OfTwoOutputs.compute_loss


def _two_outputs():
    shared, views = encoder(), [keras.Input((FEATURES,)) for _ in range(2)]
    return views, [shared(view) for view in views]


class Scaling(TwoTowers):
    """Its temperature is a variable of the loss, and of the forward pass as well."""

    def call(self, inputs):
        return super().call(inputs) + keras.ops.cast(self.log_scale, "float64") ** 2


class _NoisyLoss(layers.Layer):
    """A loss that draws random numbers and counts how often it was asked."""

    def build(self, *shapes):
        self.generator = keras.random.SeedGenerator(3)
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, y_true, y_pred):
        self.count.assign_add(1.0)
        noise = keras.random.normal(tf.shape(y_pred), dtype=y_pred.dtype, seed=self.generator)
        return self.count * nt_xent(y_true, y_pred + 0.1 * noise)


def _frozen():
    """Nothing is trained but the loss's temperature, and one layer."""

    def make_model():
        model = TwoTowers()
        model.towers[0].trainable = False
        model.towers[1].layers[0].trainable = False
        return model

    return _Variant(CASES["clip"]._replace(make_model=make_model))


def _normalized(**kwargs):
    def make_encoder():
        return keras.Sequential(
            [
                keras.Input((FEATURES,)),
                layers.Dense(UNITS),
                layers.BatchNormalization(momentum=0.9),
                layers.Activation("tanh"),
                layers.Dense(DIMENSIONS),
                layers.BatchNormalization(momentum=0.9),
            ]
        )

    return CASES["nt_xent"]._replace(make_model=lambda: two_views(make_encoder))


def _built_late():
    """Its weights are made in its first batch."""
    return keras.Sequential([layers.Dense(UNITS, "tanh"), layers.Dense(DIMENSIONS)])


VARIANTS = {
    "sample_weights": lambda: _weighed("sum_over_batch_size"),
    "weights_and_sum": lambda: _weighed("sum"),
    "mean_with_sample_weight": lambda: _weighed("mean_with_sample_weight"),
    "mask": _masked,
    "several_outputs": _several_outputs,
    "regularisers_and_added_losses": _added_losses,
    "clipnorm": lambda: _optimized(clipnorm=0.02),
    "ema": lambda: _optimized(global_clipnorm=0.1, use_ema=True, ema_momentum=0.9),
    "nested_structures": _nested,
    "variable_of_loss_and_model": lambda: _Variant(CASES["clip"]._replace(make_model=Scaling)),
    "random_loss_with_state": lambda: _Variant(
        CASES["clip_layer"]._replace(make_model=lambda: TwoTowers(_NoisyLoss()))
    ),
    "frozen_layers": _frozen,
    "built_late": lambda: _Variant(
        CASES["supervised_contrastive"]._replace(make_model=_built_late)
    ),
    "batch_norm_exact": lambda: _Variant(
        _normalized(),
        wrap=lambda model: _coupled(model, batch_norm="exact"),
        ordinary=lambda model: _ordinary(model, batch_norm="exact"),
    ),
    "batch_norm_exact_alone_is_not_enough": lambda: _Variant(
        _normalized(),
        wrap=lambda model: _coupled(model, batch_norm="exact"),
        ordinary=_coupled,
    ),
}


# XLA has `test_training_is_that_of_the_large_batch`, and takes half a minute for some of these.
WITHOUT_XLA = [name for name in EXECUTIONS if name != "jit"]


@pytest.mark.parametrize(
    "name, how",
    [*each_in_turn(VARIANTS, WITHOUT_XLA), ("several_outputs", "jit"), ("clipnorm", "jit")],
)
def test_whatever_else_is_in_a_training(float64, name, how):
    variant, execution = VARIANTS[name](), EXECUTIONS[how]
    train = {"arrays": variant.arrays, **variant.train}
    expected = _train(variant.case, **train)
    _assert_same(_train(variant.case, variant.wrap, **train, **execution), expected)
    _assert_other(_train_ordinary(variant.case, variant.ordinary, **train), expected)


@pytest.mark.parametrize("how", ["graph", "eager"])
def test_a_compute_loss_of_two_outputs(float64, how):
    weights = []
    for make_model in (
        lambda *ends: PlainOfTwoOutputs(*ends),
        lambda *ends: OfTwoOutputs(*ends, micro_batch_size=MICRO, coupled_loss=True),
        lambda *ends: OfTwoOutputs(*ends, micro_batch_size=MICRO),
    ):
        keras.utils.set_random_seed(1)
        model = make_model(*_two_outputs())
        model.compile(_sgd(), **EXECUTIONS[how])
        model.fit(_arrays("rows", "other"), batch_size=LARGE, shuffle=False, verbose=0)
        weights.append(state_of(model.weights))
    assert difference(weights[1], weights[0]) < 1e-12
    assert difference(weights[2], weights[0]) > 1e-3


# What a second forward pass must not do twice, or otherwise. The oracle is a large batch that runs
# its forward pass in micro-batches: its layers draw what those of an accumulating model draw.


class InPieces(keras.Model):
    """Calls a model on `size` examples at a time, within one batch and one loss."""

    def __init__(self, model, size=MICRO):
        super().__init__()
        self.model, self.size = model, size

    def call(self, inputs, training=False):
        # Batches here are complete, so that they have a static size to a Python loop.
        starts = range(0, LARGE, self.size)
        pieces = [self.model(inputs[i : i + self.size], training=training) for i in starts]
        return keras.ops.concatenate(pieces, axis=0)


class _Anneal(layers.Layer):
    """Multiplies by what depends on how often it was called in training."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, inputs, training=False):
        if training:
            self.calls.assign_add(1.0)
        return inputs / (1 + 0.1 * self.calls)


class _Counting(layers.Layer):
    """Counts its calls in training, after it computed what it returns."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, inputs, training=False):
        if training:
            self.calls.assign_add(1.0)
        return inputs


def _dense_around(*middle):
    """Function that makes an encoder with these layers in it."""

    def make_model():
        return keras.Sequential(
            [
                keras.Input((FEATURES,)),
                layers.Dense(UNITS, "tanh"),
                *(make_layer() for make_layer in middle),
                layers.Dense(DIMENSIONS),
            ]
        )

    return make_model


def _shared_dropout():
    """One dropout at two places, so that each micro-batch draws from it twice."""
    dropout = layers.Dropout(0.4, seed=3)
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(UNITS, "tanh")(dropout(inputs))
    return keras.Model(inputs, layers.Dense(DIMENSIONS)(dropout(x)))


def _recurrent():
    """Its cell draws masks for the inputs and for the state."""
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Reshape((FEATURES, 1)),
            layers.GRU(UNITS, dropout=0.3, recurrent_dropout=0.3, seed=3),
            layers.Dense(DIMENSIONS),
        ]
    )


def _checkpointed():
    """Computed a third time, for its gradients."""
    return GradientCheckpoint(
        keras.Sequential([keras.Input((UNITS,)), layers.Dense(UNITS), layers.Dropout(0.4, seed=3)])
    )


REPLAYED = {
    "dropout": _dense_around(lambda: layers.Dropout(0.4, seed=3)),
    "two_generators": _dense_around(
        lambda: layers.GaussianNoise(0.3, seed=1), lambda: layers.Dropout(0.4, seed=2)
    ),
    "shared_dropout": _shared_dropout,
    "default_seed": _dense_around(lambda: layers.Dropout(0.4)),
    "counter": _dense_around(_Counting),
    "output_of_a_counter": _dense_around(_Anneal),
    "moving_statistics": _dense_around(lambda: layers.BatchNormalization(momentum=0.9)),
    "recurrent_dropout": _recurrent,
    "gradient_checkpoint": _dense_around(_checkpointed),
}


def _whole_batches(make_model):
    case = CASES["supervised_contrastive"]
    return case._replace(make_model=make_model), case.arrays(LARGE * 9)


@pytest.mark.parametrize(
    "name, how",
    [*each_in_turn(REPLAYED, WITHOUT_XLA, ["dropout"], ["dropout"]), ("dropout", "jit")],
)
def test_the_second_pass_repeats_the_first(float64, name, how):
    case, arrays = _whole_batches(REPLAYED[name])
    models = []

    def in_pieces(size):
        return lambda model: models.append(model) or InPieces(model, size)

    def coupled(model):
        models.append(model)
        return _coupled(model)

    expected = _train(case, in_pieces(MICRO), arrays=arrays, **EXECUTIONS[how])
    _assert_same(_train(case, coupled, arrays=arrays, **EXECUTIONS[how]), expected)
    # Moving statistics, counters and seed generators; these are not among the weights.
    ends = [state_of(model.non_trainable_variables) for model in models]
    assert difference(*ends) < 1e-12
    # With another cut, layers draw or count otherwise, and the training is another.
    if name != "counter":
        _assert_other(_train(case, in_pieces(4), arrays=arrays), expected)


class _InPieces(layers.Layer):
    """Calls a layer on as many examples at a time as there are in a micro-batch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs, training=False):
        starts = range(0, LARGE, MICRO)
        pieces = [self.layer(inputs[i : i + MICRO], training=training) for i in starts]
        return keras.ops.concatenate(pieces, axis=0)


def test_exact_batch_norm_repeats_dropout_too(float64):
    def case_with(make_dropout):
        def batch_norm():
            return layers.BatchNormalization(momentum=0.9)

        return _whole_batches(_dense_around(batch_norm, make_dropout, batch_norm))

    def exact(model):
        return _coupled(model, batch_norm="exact")

    case, arrays = case_with(lambda: _InPieces(layers.Dropout(0.4, seed=3)))
    expected = _train(case, arrays=arrays)
    case, arrays = case_with(lambda: layers.Dropout(0.4, seed=3))
    _assert_same(_train(case, exact, arrays=arrays), expected)
    _assert_other(_train(case, arrays=arrays), expected)


class _Measuring(layers.Layer):
    """Updates a metric in its call."""

    def __init__(self):
        super().__init__()
        self.rows = keras.metrics.Sum(name="rows")
        self.mean = keras.metrics.Mean(name="mean")

    def call(self, inputs):
        self.rows.update_state(keras.ops.ones_like(inputs[:, 0]))
        self.mean.update_state(inputs)
        return inputs


@pytest.mark.parametrize("how", ["graph", "jit"])
def test_metrics_updated_in_a_call_see_each_example_once(float64, how):
    case = CASES["supervised_contrastive"]._replace(make_model=_dense_around(_Measuring))
    expected = _train(case)
    _assert_same(_train(case, _coupled, **EXECUTIONS[how]), expected)
    assert expected.history["rows"] == [EXAMPLES]


def test_a_variable_of_the_loss_gets_its_gradient_once(float64):
    (first, second), labels = CASES["clip"].arrays(LARGE)
    keras.utils.set_random_seed(1)
    model = TwoTowers()
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(clip(model([first, second]), model.log_scale))
    gradient = float(tape.gradient(loss, model.log_scale.value))
    before = float(model.log_scale)
    coupled = _coupled(model)
    coupled.compile(keras.optimizers.SGD(1.0), CASES["clip"].loss_of(model))
    coupled.train_on_batch((first, second), labels)
    assert abs(gradient) > 1e-3
    assert float(model.log_scale) == pytest.approx(before - gradient, rel=1e-12)


@pytest.mark.parametrize("how", ["graph", "eager"])
def test_metrics_and_losses_in_the_logs(float64, how):
    case = CASES["concordance"]
    weights = _arrays("weights")[0][:44]
    train = {
        "metrics": ["mae", keras.metrics.MeanSquaredError()],
        "weighted_metrics": ["mae"],
        "sample_weight": weights,
        "examples": 44,
    }
    expected = _train(case, **train)
    _assert_same(_train(case, _coupled, **train, **EXECUTIONS[how]), expected)
    assert len(expected.history) == 4
    with pytest.raises(AssertionError):
        _assert_same(_train_ordinary(case, **train), expected)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    case = CASES["nt_xent"]
    try:
        expected, trained, ordinary = (
            train(case) for train in (_train, lambda c: _train(c, _coupled), _train_ordinary)
        )
    finally:
        keras.config.set_dtype_policy("float32")
    # A micro-batch's gradient is rounded to sixteen bits before it is summed.
    limit = 0.03 if policy == "mixed_bfloat16" else 0.01
    assert difference(trained.weights, expected.weights) < limit * expected.moved
    assert difference(ordinary.weights, expected.weights) > 3 * limit * expected.moved


def test_float32_is_as_near_as_its_rounding():
    case = CASES["nt_xent"]
    expected = _train(case)
    _assert_same(_train(case, _coupled), expected, tolerance=1e-6)


# Replicas.


def _everywhere(model):
    return _coupled(model, 3, coupled_loss="all_replicas")


@pytest.mark.skipif(KERAS < (3, 10), reason="no metrics in a loop on replicas before Keras 3.10")
@pytest.mark.parametrize(
    "name, replicas",
    [("nt_xent", 2), ("clip", 3)],
)
def test_all_replicas_are_the_large_batch_on_one_device(float64, name, replicas):
    # Batches of 12, and at last of 8, which three replicas cannot share evenly.
    case, examples = CASES[name], 44
    expected = _train(case, examples=examples)
    _assert_same(_train(case, _everywhere, replicas, examples=examples), expected)
    own = _train(case, lambda model: _coupled(model, 3), replicas, examples=examples)
    _assert_other(own, expected)


@pytest.mark.skipif(KERAS < (3, 10), reason="no metrics in a loop on replicas before Keras 3.10")
@pytest.mark.parametrize(
    "name",
    [
        "sample_weights",
        "mask",
        "several_outputs",
        "regularisers_and_added_losses",
    ],
)
def test_all_replicas_whatever_else_is_in_a_training(float64, name):
    variant = VARIANTS[name]()
    train = {"arrays": variant.arrays, **variant.train}
    expected = _train(variant.case, **train)
    _assert_same(_train(variant.case, _everywhere, 2, **train), expected)


def test_all_replicas_where_there_is_one(float64):
    case = CASES["nt_xent"]
    everywhere = _train(case, lambda model: _coupled(model, coupled_loss="all_replicas"), 1)
    _assert_same(everywhere, _train(case, replicas=1))


# The argument.


def test_it_is_saved_with_the_model(float64, tmp_path):
    case = CASES["supervised_contrastive"]
    keras.utils.set_random_seed(1)
    model = _coupled(case.make_model())
    assert model.coupled_loss is True
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.coupled_loss is True
    x, y = case.arrays(LARGE)
    for each in (model, loaded):
        each.compile(_sgd(), case.loss_of(each))
        each.fit(x, y, batch_size=LARGE, verbose=0)
    assert difference(state_of(loaded.weights), state_of(model.weights)) == 0


def test_it_is_off_by_default():
    assert GradientAccumulateModel(model=encoder(), micro_batch_size=2).coupled_loss is False


@pytest.mark.fast
@pytest.mark.parametrize("coupled_loss", [True, "all_replicas"])
def test_it_needs_whole_batches(coupled_loss):
    with pytest.raises(ValueError, match=r"Received: .*accum_steps=2\. Pass micro_batch_size"):
        GradientAccumulateModel(model=encoder(), accum_steps=2, coupled_loss=coupled_loss)


@pytest.mark.fast
@pytest.mark.parametrize("coupled_loss", ["replicas", None, 1, "yes", [True]])
def test_other_values_are_refused(coupled_loss):
    with pytest.raises((TypeError, ValueError), match=r"coupled_loss.*all_replicas.*Received: "):
        _coupled(encoder(), coupled_loss=coupled_loss)


@pytest.mark.fast
def test_no_micro_batch_can_be_dropped_alone():
    with pytest.raises(ValueError, match=r"Received: .*drop_micro_batch.*drop_cycle"):
        _coupled(encoder(), non_finite="drop_micro_batch")


def test_a_cycle_that_is_not_finite_is_dropped(float64):
    case = CASES["supervised_contrastive"]
    x, y = case.arrays(LARGE)
    keras.utils.set_random_seed(1)
    plain = case.make_model()
    model = _coupled(plain, non_finite="drop_cycle")
    model.compile(_sgd(), case.loss_of(plain), jit_compile=False)
    model.train_on_batch(x, y)
    before = state_of(plain.weights)
    model.train_on_batch(np.where(np.arange(LARGE)[:, None] == 7, np.inf, x), y)
    assert difference(state_of(plain.weights), before) == 0
    assert int(model.dropped_cycles) == 1
    model.train_on_batch(x, y)
    assert difference(state_of(plain.weights), before) > 1e-3


class _TensorFlowNoise(layers.Layer):
    def call(self, inputs):
        return inputs + tf.random.normal(tf.shape(inputs), dtype=inputs.dtype)


class _TensorFlowGenerator(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.random = tf.random.Generator.from_seed(1)

    def call(self, inputs):
        return inputs + self.random.normal(tf.shape(inputs), dtype=inputs.dtype)


class _TensorFlowCounter(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = tf.Variable(0.0)

    def call(self, inputs):
        self.calls.assign_add(1.0)
        return inputs


class _Python(layers.Layer):
    def call(self, inputs):
        outputs = tf.py_function(lambda array: array, [inputs], inputs.dtype)
        return tf.ensure_shape(outputs, inputs.shape)


# Layers that a second pass would not repeat, and what their error says besides the rule.
NOT_REPEATED = {
    "random": (_TensorFlowNoise, "Received: TensorFlow's Random.*noisy.*SeedGenerator"),
    "generator": (_TensorFlowGenerator, "Received: TensorFlow's .*noisy.*SeedGenerator"),
    "variable": (_TensorFlowCounter, "Received: Assign.*noisy.*add_weight"),
    "python": (_Python, "Received: EagerPyFunc.*noisy.*keras.ops"),
}


@pytest.mark.parametrize("how", ["graph", "eager"])
@pytest.mark.parametrize("name", NOT_REPEATED)
def test_what_is_not_repeated_is_refused_by_name(name, how):
    make_layer, message = NOT_REPEATED[name]
    case = CASES["supervised_contrastive"]
    case = case._replace(make_model=_dense_around(lambda: make_layer(name="noisy")))
    with pytest.raises(ValueError, match=f"With coupled_loss=True .*{message}"):
        _train(case, _coupled, examples=LARGE, **EXECUTIONS[how])
    _train_ordinary(case, examples=LARGE, **EXECUTIONS[how])  # which computes each layer once


def test_a_layer_that_assigns_its_weights_is_refused():
    case = CASES["supervised_contrastive"]
    normalized = lambda: layers.SpectralNormalization(layers.Dense(UNITS))  # noqa: E731
    case = case._replace(make_model=_dense_around(normalized))
    with pytest.raises(ValueError, match=r"may assign.*Received: .*kernel.*SpectralNorm.*freeze"):
        _train(case, _coupled, examples=LARGE)


@pytest.mark.parametrize(
    "output, message",
    [
        (tf.reduce_sum, "Received: output 0, a scalar.*broadcast_to"),
        (tf.RaggedTensor.from_tensor, "Received: output 0, a RaggedTensor.*to_tensor"),
    ],
    ids=["scalar", "ragged"],
)
def test_an_output_without_a_row_for_each_example_is_refused(output, message):
    class WithOutput(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = encoder()

        def call(self, inputs):
            return output(self.encoder(inputs))

    case = Case(WithOutput, lambda model: lambda y_true, y_pred: 0.0, ("rows",))
    with pytest.raises(ValueError, match=f"one row for each example.*{message}"):
        _train(case, _coupled, examples=LARGE)


def test_rows_of_unknown_shape_are_counted_too():
    def both_views(tokens):
        return keras.ops.concatenate([tokens, -tokens], axis=0)

    inputs = keras.Input((None, 2))
    outputs = layers.Lambda(both_views, output_shape=(None, 2))(inputs)
    model = _coupled(keras.Model(inputs, layers.Dense(2)(outputs)), micro_batch_size=4)
    model.compile("sgd", lambda y, z: tf.reduce_mean(z**2), jit_compile=False)
    data = tf.data.Dataset.from_generator(
        lambda: iter([(np.ones((10, 3, 2)), np.ones((10, 1)))]),
        output_signature=(
            tf.TensorSpec((None, None, 2), "float32"),
            tf.TensorSpec((None, 1), "float32"),
        ),
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"as many as the examples"):
        model.fit(data, verbose=0)


def test_an_added_loss_that_is_no_value_for_each_example_is_said():
    class Adds(layers.Layer):
        def call(self, inputs):
            self.add_loss(tf.reduce_mean(inputs**2, axis=0))
            return inputs

    model = _coupled(_dense_around(Adds)())
    model.compile("sgd", supervised_contrastive)
    x, y = CASES["supervised_contrastive"].arrays(LARGE)
    with pytest.warns(UserWarning, match="counts as a sum over the examples"):
        model.train_on_batch(x, y)


def test_classes_are_in_every_batch():
    # Otherwise several of the losses would compare nothing.
    labels = coupled_losses.data(EXAMPLES)["labels"]
    for start in range(0, EXAMPLES, LARGE):
        assert len(set(labels[start : start + LARGE])) == CLASSES
