"""batch_norm="exact": weights, moving statistics and logs of the large batch, with batch norm."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from gradient_accumulator_tf import AccumBatchNorm, GradientAccumulateModel
from gradient_accumulator_tf.stages.batch_norm import BATCH_NORM
from gradient_accumulator_tf.stages.cuts import cut
from gradient_accumulator_tf.stages.graph import flat_graph
from tests.oracle import EXECUTIONS, KERAS, difference, each_in_turn, mirrored, state_of

# Five updates of 16, 16, 5 examples and so on: the last micro-batch of 3 is smaller, in two sizes.
EXAMPLES, LARGE, MICRO = 37, 16, 3


def _images(examples=EXAMPLES, size=8, channels=3, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(2.0, 1.0, (examples, size, size, channels))
    return x, rng.integers(0, classes, examples)


def _bn(**kwargs):
    # A momentum that lets the moving statistics move.
    return layers.BatchNormalization(**{"momentum": 0.9, **kwargs})


def conv_net(norm=_bn, size=8):
    inputs = x = keras.Input((size, size, 3))
    for strides in (1, 2, 1):
        x = layers.Conv2D(5, 3, strides, padding="same")(x)
        x = layers.ReLU()(norm()(x))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def residual_net():
    """A block with a projection shortcut, and one without."""
    inputs = x = keras.Input((8, 8, 3))
    for filters, strides in ((4, 2), (4, 1)):
        shortcut = x
        if x.shape[-1] != filters:
            shortcut = _bn()(layers.Conv2D(filters, 1, strides, use_bias=False)(x))
        y = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        y = layers.ReLU()(_bn()(y))
        y = _bn()(layers.Conv2D(filters, 3, padding="same", use_bias=False)(y))
        x = layers.ReLU()(layers.Add()([y, shortcut]))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def u_net():
    inputs = x = keras.Input((8, 8, 3))
    skips = []
    for filters in (3, 4):
        x = layers.ReLU()(_bn()(layers.Conv2D(filters, 3, padding="same")(x)))
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    for filters in (4, 3):
        x = layers.Concatenate()([layers.UpSampling2D()(x), skips.pop()])
        x = layers.ReLU()(_bn()(layers.Conv2D(filters, 3, padding="same")(x)))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def dense_block():
    """Batch norm of what is concatenated anew at each step."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same")(inputs)
    for _ in range(3):
        y = layers.Conv2D(2, 3, padding="same")(layers.ReLU()(_bn()(x)))
        x = layers.Concatenate()([x, y])
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(_bn()(x))))


def shared_and_parallel():
    """One batch norm layer at two places, and two at one place."""
    inputs = keras.Input((8, 8, 3))
    shared = _bn()
    x = shared(layers.Conv2D(3, 3, padding="same")(shared(inputs)))
    x = layers.Add()([layers.ReLU()(_bn()(x)), layers.Activation("tanh")(_bn(scale=False)(x))])
    return keras.Model(inputs, layers.Dense(4)(layers.Flatten()(x)))


def nested():
    """A Sequential in a functional model in a Sequential one; one of them called twice."""
    block = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            layers.Conv2D(4, 3, padding="same"),
            _bn(),
            layers.ReLU(),
        ]
    )
    inputs = keras.Input((8, 8, 3))
    x = block(layers.Conv2D(4, 1)(inputs))
    backbone = keras.Model(inputs, layers.Add()([x, block(x)]))
    return keras.Sequential(
        [keras.Input((8, 8, 3)), backbone, layers.GlobalAveragePooling2D(), layers.Dense(4)]
    )


def other_axes():
    """Channels first, and a batch norm without trainable weights."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Permute((3, 1, 2))(layers.Conv2D(4, 3)(inputs))
    x = layers.Activation("tanh")(_bn(axis=1)(x))
    x = layers.Dense(6)(layers.Flatten()(x))
    x = _bn(axis=1, center=False, scale=False)(x)
    return keras.Model(inputs, layers.Dense(4)(x))


def partly_frozen():
    model = conv_net()
    frozen = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)][1]
    frozen.trainable = False
    frozen.moving_mean.assign(np.linspace(-1, 1, 5))
    return model


def regularized():
    inputs = x = keras.Input((8, 8, 3))
    for _ in range(2):
        x = layers.Conv2D(4, 3, kernel_regularizer="l2")(x)
        x = layers.ReLU()(_bn(gamma_regularizer=keras.regularizers.L2(0.02))(x))
    return keras.Model(inputs, layers.Dense(4, bias_regularizer="l2")(layers.Flatten()(x)))


def small(norm=_bn):
    """Quick to compile: dense layers, a shortcut, batch norms at both ends of it."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Dense(6)(layers.Flatten()(layers.AveragePooling2D(4)(inputs)))
    y = layers.Dense(6)(layers.ReLU()(norm()(x)))
    return keras.Model(inputs, layers.Dense(4)(norm()(layers.Add()([x, y]))))


# `small` and `conv_net` are in the tests below.
MODELS = [
    residual_net,
    u_net,
    dense_block,
    shared_and_parallel,
    nested,
    other_axes,
    partly_frozen,
    regularized,
]
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "slow_sgd": lambda: keras.optimizers.SGD(0.01),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "clipping_and_average": lambda: keras.optimizers.SGD(
        0.1, momentum=0.9, global_clipnorm=0.5, use_ema=True, ema_momentum=0.9
    ),
}


def _made(make_model, seed=1):
    keras.utils.set_random_seed(seed)
    return make_model()


def _exact(model, micro_batch_size=MICRO, batch_norm="exact"):
    return GradientAccumulateModel(
        model=model, micro_batch_size=micro_batch_size, batch_norm=batch_norm
    )


def _train(model, data=None, optimizer="sgd", updates=None, **kwargs):
    """Trains on large batches; the history and all weights."""
    x, y, *weights = _images() if data is None else data
    fit = {"sample_weight": weights[0]} if weights else {}
    model.compile(
        OPTIMIZERS[optimizer](),
        **{
            "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "metrics": ["accuracy"],
            **kwargs,
        },
    )
    history = model.fit(
        x,
        y,
        batch_size=LARGE,
        epochs=2 if updates is None else 1,
        steps_per_epoch=updates,
        shuffle=False,
        verbose=0,
        **fit,
    ).history
    return history, state_of(model.weights)


def _assert_same(trained, expected, tolerance=1e-9):
    (history, weights), (large_history, large_weights) = trained, expected
    assert difference(weights, large_weights) < tolerance
    assert list(history) == list(large_history)
    for name, values in large_history.items():
        # Keras keeps metrics in float32, whatever the policy.
        np.testing.assert_allclose(history[name], values, rtol=3e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    "make_model, optimizer",
    [(make_model, "adam") for make_model in MODELS] + [(small, "clipping_and_average")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_training_is_that_of_the_large_batch(float64, make_model, optimizer):
    start = state_of(_made(make_model).weights)
    expected = _train(_made(make_model), optimizer=optimizer)
    _assert_same(_train(_exact(_made(make_model)), optimizer=optimizer), expected)
    assert difference(start, expected[1]) > 1e-2


def test_statistics_of_the_micro_batch_are_not(float64):
    _, large = _small_trained()
    _, micro = _train(_exact(_made(small), batch_norm="micro_batch"))
    assert difference(micro, large) > 1e-3


@functools.cache
def _small_trained():
    return _train(_made(small))


@pytest.mark.filterwarnings("ignore:Nothing accumulates:UserWarning")  # in one piece
@pytest.mark.parametrize(
    "micro_batch_size, execution",
    each_in_turn([1, 8, 3, 100], EXECUTIONS, core=[3], fast=[3]),
    indirect=["execution"],
)
def test_every_execution_and_micro_batch_size(float64, execution, micro_batch_size):
    model = _exact(_made(small), micro_batch_size)
    _assert_same(_train(model, **execution), _small_trained())


@pytest.mark.parametrize(
    "examples, execution",
    each_in_turn([12, 13], ["graph", "jit"], core=[13]),
    indirect=["execution"],
)
def test_static_batch(float64, execution, examples):
    x, y = _images(examples)
    weights = []
    for model in (_made(small), _exact(_made(small), 4)):
        model.compile(
            keras.optimizers.SGD(0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **execution,
        )
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(examples, drop_remainder=True)
        model.fit(dataset.repeat(3), verbose=0)
        weights.append(state_of(model.weights))
    assert difference(*weights) < 1e-9


def test_activations_far_from_zero_and_far_from_the_moving_mean():
    # In float32 sums of squares lose everything here: mean 1000, standard deviation 0.1.
    x = np.random.default_rng(0).normal(1000.0, 0.1, (64, 6)).astype("float32")
    y = np.random.default_rng(1).normal(size=(64, 1)).astype("float32")
    moving = []
    for wrap in (lambda model: model, _exact):
        keras.utils.set_random_seed(1)
        norm = _bn(momentum=0.0)
        model = wrap(keras.Sequential([keras.Input((6,)), norm, layers.Dense(1)]))
        model.compile("sgd", "mse")
        model.fit(x, y, batch_size=64, verbose=0)
        moving.append(state_of([norm.moving_variance]))
    np.testing.assert_allclose(moving[1], [x.astype("float64").var(axis=0)], rtol=1e-3)
    np.testing.assert_allclose(moving[1], moving[0], rtol=1e-2)


def test_float32_is_as_near_as_another_order_of_the_examples():
    x, y = _images(64)
    order = np.concatenate([i + np.random.default_rng(i).permutation(16) for i in (0, 16, 32, 48)])
    data, permuted = (x.astype("float32"), y), (x[order].astype("float32"), y[order])
    _, expected = _train(_made(residual_net), data)
    _, control = _train(_made(residual_net), permuted)
    _, exact = _train(_exact(_made(residual_net)), data)
    assert 0 < difference(control, expected) < 1e-4
    assert difference(exact, expected) < 3 * difference(control, expected)


@pytest.mark.fast
def test_sample_weights_and_losses_with_other_denominators(float64):
    x, y = _images()
    weights = np.random.default_rng(5).uniform(0.1, 3.0, len(x))
    for reduction in ("sum_over_batch_size", "mean_with_sample_weight", "sum"):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        trained = [
            _train(model, (x, y, weights), "slow_sgd", loss=loss, metrics=[])
            for model in (_made(small), _exact(_made(small)))
        ]
        _assert_same(*trained[::-1])


def two_inputs_and_outputs():
    """An output after each of two batch norms, the first with a softmax of its own."""
    images, numbers = keras.Input((8, 8, 3), name="images"), keras.Input((5,), name="numbers")
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(_bn()(layers.Conv2D(4, 3)(images))))
    early = layers.Dense(4, "softmax", name="early")(x)
    x = layers.Concatenate()([x, layers.Activation("tanh")(_bn()(layers.Dense(4)(numbers)))])
    late = layers.Dense(1, name="late")(layers.ReLU()(_bn()(layers.Dense(6)(x))))
    return keras.Model(
        {"numbers": numbers, "images": images}, {"early": early, "late": {"value": late}}
    )


def test_several_inputs_and_outputs(float64):
    x, y = _images()
    numbers = np.random.default_rng(3).normal(size=(len(x), 5))
    inputs = {"images": x, "numbers": numbers}
    targets = {"early": y, "late": {"value": numbers.sum(axis=1, keepdims=True)}}
    trained = []
    for wrap in (lambda model: model, _exact):
        model = wrap(_made(two_inputs_and_outputs))
        model.compile(
            keras.optimizers.Adam(0.01),
            loss={"early": "sparse_categorical_crossentropy", "late": {"value": "mse"}},
        )
        history = model.fit(
            inputs, targets, batch_size=LARGE, epochs=2, shuffle=False, verbose=0
        ).history
        trained.append((history, state_of(model.weights)))
    _assert_same(*trained[::-1])


@keras.saving.register_keras_serializable(package="tests")
class Noise(layers.Layer):
    """Multiplies by random numbers; draws anew for every `size` examples."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.generator = keras.random.SeedGenerator(7)

    def call(self, inputs):
        examples, parts = tf.shape(inputs)[0], []
        for start in range(0, LARGE, self.size):
            shape = tf.concat(
                [[tf.clip_by_value(examples - start, 0, self.size)], tf.shape(inputs)[1:]], 0
            )
            parts.append(tf.random.stateless_uniform(shape, self._draw(start < examples), 0.5, 1.5))
        return inputs * tf.cast(tf.concat(parts, 0), inputs.dtype)

    def _draw(self, used):
        state = self.generator.state
        seed = tf.identity(state.value)
        state.assign(seed + tf.cast([0, 1], seed.dtype) * tf.cast(used, seed.dtype))
        return tf.cast(seed, tf.int32)


def noisy(size=MICRO):
    inputs = keras.Input((8, 8, 3))
    x = Noise(size)(layers.Dense(6)(layers.Flatten()(inputs)))
    x = Noise(size)(layers.ReLU()(_bn()(x)))
    x = _bn()(layers.Dense(4)(x))
    return keras.Model(inputs, layers.Dense(4)(Noise(size)(x)))


# XLA takes a second for each draw in the large batch.
@pytest.mark.parametrize("size, execution", [(MICRO, "graph"), (8, "jit")], indirect=["execution"])
def test_random_layers_draw_the_same_again(float64, size, execution):
    expected = _train(_made(lambda: noisy(size)), **execution)  # XLA draws otherwise
    _assert_same(_train(_exact(_made(lambda: noisy(size)), size), **execution), expected)


def test_with_other_draws_training_is_another(float64):
    # The layer draws for three examples at a time, and is given five.
    _, expected = _train(_made(noisy))
    _, other = _train(_exact(_made(noisy), 5))
    assert difference(other, expected) > 1e-3


def test_dropout_goes_on_where_it_ended():
    def dropping():
        inputs = keras.Input((8, 8, 3))
        x = layers.Dropout(0.3, seed=1)(layers.Flatten()(inputs))
        x = layers.Dropout(0.3, seed=2)(layers.ReLU()(_bn()(layers.Dense(4)(x))))
        return keras.Model(inputs, layers.Dense(4)(x))

    model = _exact(_made(dropping))
    _train(model)
    states = [
        layer.seed_generator.state.numpy()[1]
        for layer in model.layers
        if isinstance(layer, layers.Dropout)
    ]
    # Once for each of 6 + 6 + 2 micro-batches, in two epochs; nothing for computing it again.
    assert states == [28, 28]


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        models = [
            _made(small),
            _exact(_made(small)),
            _exact(_made(small), batch_norm="micro_batch"),
        ]
    finally:
        keras.config.set_dtype_policy("float32")
    large, exact, micro = (_train(model)[1] for model in models)
    # A micro-batch's gradient is rounded to sixteen bits before it is summed.
    assert difference(exact, large) < 0.02
    assert difference(micro, large) > 0.1


def test_accum_batch_norm_layers_are_exact_too(float64):
    expected = _train(_made(conv_net))
    accumulating = _made(lambda: conv_net(lambda: AccumBatchNorm(accum_steps=4, momentum=0.9)))
    _assert_same(_train(_exact(accumulating)), expected)


def test_without_batch_norm_it_is_the_ordinary_loop(float64):
    def plain():
        return keras.Sequential(
            [keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(4, "tanh"), layers.Dense(4)]
        )

    _assert_same(_train(_exact(_made(plain))), _train(_made(plain)))


def test_a_model_built_by_its_first_batch(float64):
    def deferred():
        return keras.Sequential([layers.Dense(5), _bn(), layers.ReLU(), layers.Dense(1)])

    x = np.random.default_rng(0).normal(size=(20, 3))
    weights = []
    for wrap in (lambda model: model, _exact):
        model = wrap(_made(deferred))
        model.compile("sgd", "mse")
        keras.utils.set_random_seed(3)
        model.fit(x, x[:, :1], batch_size=10, shuffle=False, verbose=0)
        weights.append(state_of(model.weights))
    assert difference(*weights) < 1e-9


def test_the_plan_follows_trainable_at_compile(float64):
    histories = []
    for wrap in (lambda model: model, _exact):
        model = wrap(_made(small))
        _train(model)
        for layer in model.layers:
            if isinstance(layer, layers.BatchNormalization):
                layer.trainable = False
        histories.append(_train(model))
    _assert_same(*histories[::-1])


def test_saved_and_loaded_it_goes_on(float64, tmp_path):
    model = _exact(_made(small))
    _train(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.batch_norm == "exact"
    x, y = _images()
    for each in (model, loaded):
        each.fit(x, y, batch_size=LARGE, shuffle=False, verbose=0)
    assert difference(state_of(loaded.weights), state_of(model.weights)) == 0


@pytest.mark.skipif(KERAS < (3, 10), reason="no metrics in a loop on replicas before Keras 3.10")
@pytest.mark.parametrize("synchronized", [False, True], ids=["per_replica", "synchronized"])
def test_replicas(float64, synchronized):
    x, y = _images(32)
    weights, moved = [], []
    for wrap in (lambda model: model, _exact):
        with mirrored().scope():
            model = wrap(_made(lambda: small(lambda: _bn(synchronized=synchronized))))
            start = state_of(model.weights)
            _train(model, (x, y), metrics=[])
        weights.append(state_of(model.weights))
        moved.append(difference(start, weights[-1]))
    assert difference(*weights) < 1e-9 and moved[0] > 1e-2
    _, one_device = _train(_made(small), (x, y))
    # Only what is synchronised is the batch norm of one device.
    assert (difference(weights[1], one_device) < 1e-9) == synchronized


class _Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.norm = layers.Dense(3), _bn()
        self.build((None, 5))

    def build(self, input_shape):
        self.first.build(input_shape)
        self.norm.build((None, 3))
        self.built = True

    def call(self, inputs):
        return self.norm(self.first(inputs))


class _Hiding(layers.Layer):
    def __init__(self):
        super().__init__()
        self.norm = _bn(name="hidden")

    def build(self, input_shape):
        self.norm.build(input_shape)

    def call(self, inputs):
        return self.norm(inputs)


class _MyBatchNorm(layers.BatchNormalization):
    pass


def _sequence(*inner):
    return keras.Sequential([keras.Input((6, 5)), *inner])


class _Joining(layers.Layer):
    def call(self, inputs, training=None):
        return keras.ops.concatenate(inputs, -1)


def _without_graph():
    """A built Sequential model that Keras makes no graph of, since its inputs are nested."""
    model = keras.Sequential([_Joining(), _bn()], name="joined")
    model([tf.ones((4, 2)), tf.ones((4, 3))])
    return model


def _around_one_without_graph():
    inputs = [keras.Input((2,)), keras.Input((3,))]
    return keras.Model(inputs, layers.Dense(1)(_without_graph()(inputs)))


REFUSED = {
    "subclassed": (_Subclassed, "_Subclassed, which is not a graph"),
    "custom_layer": (lambda: _sequence(_Hiding()), "hidden.*is hidden in a _Hiding"),
    "time_distributed": (
        lambda: _sequence(layers.TimeDistributed(_bn())),
        "is hidden in a TimeDistributed",
    ),
    "sequential": (_without_graph, "joined/.*is in a Sequential with nested inputs or"),
    "inner_sequential": (_around_one_without_graph, "joined/.*hidden in a Sequential with nested"),
    "renorm": (
        lambda: _sequence(_bn(renorm=True)),
        "is a BatchNormalization, which may be more",
    ),
    "own_batch_norm": (lambda: _sequence(_MyBatchNorm()), "is a _MyBatchNorm"),
    "mask": (lambda: _sequence(layers.Masking(), _bn()), "mask.*takes a mask"),
    "activity_regularizer": (
        lambda: _sequence(layers.Dense(3, activity_regularizer="l2"), _bn()),
        "activity regulariser",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_at_compile(case):
    if case == "renorm" and KERAS < (3, 13):
        pytest.skip("Keras has no renorm yet")
    make_model, message = REFUSED[case]
    model = _exact(make_model())
    with pytest.raises(ValueError, match=message) as error:
        model.compile("sgd", "mse")
    assert "swap_batch_norm" in str(error.value) and '"micro_batch"' in str(error.value)


def test_frozen_batch_norms_are_refused_nowhere(float64):
    make_model, _ = REFUSED["custom_layer"]
    model = make_model()
    model.trainable = False
    model.compile("sgd", "mse")
    wrapped = _exact(model)
    wrapped.compile("sgd", "mse")
    x = np.ones((4, 6, 5))
    with pytest.warns(UserWarning, match="any trainable weights"):
        wrapped.fit(x, x, verbose=0)


class _Counting(layers.Layer):
    def build(self, input_shape):
        self.calls = self.add_weight(shape=(), trainable=False, name="calls")

    def call(self, inputs):
        self.calls.assign_add(1.0)
        return inputs


class _GlobalSeed(layers.Layer):
    def call(self, inputs):
        return inputs + keras.random.normal(tf.shape(inputs))


class _TensorFlowsRandom(layers.Layer):
    def call(self, inputs):
        return inputs + tf.random.normal(tf.shape(inputs))


class _Losing(layers.Layer):
    def call(self, inputs):
        self.add_loss(tf.reduce_mean(inputs))
        return inputs


@pytest.mark.parametrize(
    "layer, message, first",
    [
        (_Counting, "changes .*/calls", True),
        (_Counting, "changes .*/calls", False),
        (_GlobalSeed, "changes .*seed_generator_state", True),
        (_TensorFlowsRandom, "TensorFlow's RandomStandardNormal", False),
        (_Losing, "`add_loss`", True),
    ],
)
def test_what_cannot_be_computed_twice_is_refused_in_the_first_step(layer, message, first):
    inner = [layer(), _bn()] if first else [_bn(), layer()]
    model = _exact(_sequence(*inner))
    model.compile("sgd", "mse")
    x = np.ones((4, 6, 5), "float32")
    with pytest.raises(ValueError, match=message):
        model.fit(x, x, verbose=0)


def test_arguments():
    model = conv_net()
    with pytest.raises(ValueError, match="`batch_norm` must be"):
        GradientAccumulateModel(model=model, micro_batch_size=4, batch_norm="big")
    with pytest.raises(ValueError, match="Pass micro_batch_size instead"):
        GradientAccumulateModel(model=model, accum_steps=4, batch_norm="exact")


def test_a_cycle_that_is_not_finite_is_dropped_whole(float64):
    x, y = _images(32)
    model = GradientAccumulateModel(
        model=_made(small), micro_batch_size=5, batch_norm="exact", non_finite="drop_cycle"
    )
    _, before = _train(model, (x, y))
    x[3] = np.nan
    model.fit(x[:16], y[:16], batch_size=16, verbose=0)
    assert difference(state_of(model.weights), before) == 0
    assert int(model.dropped_cycles) == 1
    with pytest.raises(ValueError, match='Pass non_finite="drop_cycle" instead'):
        GradientAccumulateModel(
            model=small(), micro_batch_size=5, batch_norm="exact", non_finite="drop_micro_batch"
        )


def test_cheap_operations_are_computed_again_rather_than_kept():
    def kept(make_model):
        return sum(len(stage.keeps) for stage in cut(flat_graph(make_model(), BATCH_NORM)))

    # A batch norm's input each, and nothing else: activations and sums are computed again.
    assert kept(conv_net) == 3
    assert kept(residual_net) == 5
    # What is concatenated is kept in pieces.
    assert kept(dense_block) == 4


def test_what_is_computed_again_does_not_grow_with_depth():
    def chain(blocks):
        inputs = x = keras.Input((8, 8, 3))
        for _ in range(blocks):
            y = _bn()(layers.Conv2D(3, 3, padding="same")(x))
            x = layers.ReLU()(layers.Add()([x, y]))
        return cut(flat_graph(keras.Model(inputs, layers.Flatten()(x)), BATCH_NORM))

    longest = [max(len(stage.nodes) for stage in chain(blocks)) for blocks in (6, 12)]
    assert longest[0] == longest[1] <= 8


def test_a_pretrained_architecture(float64):
    """MobileNetV2's first blocks, with every kind of shortcut, at a learning rate it can bear."""

    def make_model():
        net = keras.applications.MobileNetV2(
            input_shape=(32, 32, 3), alpha=0.35, weights=None, include_top=False
        )
        x = net.get_layer("block_4_add").output
        return keras.Model(net.input, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))

    x, y = _images(8, size=32)
    weights = []
    for wrap in (lambda model: model, _exact):
        model = wrap(_made(make_model))
        model.compile(
            keras.optimizers.SGD(1e-4),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(x, y, batch_size=8, epochs=2, verbose=0)
        weights.append(state_of(model.weights))
    assert difference(*weights) < 1e-9
