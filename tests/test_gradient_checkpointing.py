"""Gradient checkpointing under both wrappers: the large batch without it."""

import functools
import itertools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import checkpointing
from gradient_accumulator_tf import (
    AccumBatchNorm,
    GradientCheckpoint,
    _keras,
)
from tests.oracle import (
    EFFECTIVE,
    EXECUTIONS,
    KERAS,
    MICRO,
    MODES,
    WAYS,
    difference,
    in_way,
    mirrored,
    regression_data,
)

STEPS = EFFECTIVE // MICRO
OTHERS = [name for name in EXECUTIONS if name != "graph"]


def blocks_model(recomputed, **kwargs):
    """Three blocks of two layers each; the same weights in every call."""
    keras.utils.set_random_seed(1)
    layers = [keras.Input((5,))]
    for _ in range(3):
        block = keras.Sequential(
            [keras.layers.Dense(8, "tanh", **kwargs), keras.layers.Dense(5, "tanh")]
        )
        layers.append(GradientCheckpoint(block) if recomputed else block)
    return keras.Sequential([*layers, keras.layers.Dense(1)])


def train(model, way, **compile_with):
    """Trains for two epochs; returns the weights, and the trained model."""
    model, optimizer, batch_size = in_way(way, model, keras.optimizers.Adam(0.01))
    model.compile(optimizer, "mse", **compile_with)
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        model.optimizer.initial_scale = 256.0
    x, y, _ = regression_data(4 * EFFECTIVE)
    model.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
    return model.get_weights(), model


def test_equals_the_large_batch_without_it(execution):
    expected, _ = train(blocks_model(recomputed=False), "plain")
    assert difference(expected, blocks_model(recomputed=False).get_weights()) > 1e-2
    for way in WAYS:
        weights, _ = train(blocks_model(recomputed=True), way, **execution)
        assert difference(weights, expected) < 2e-6, way


def test_equals_the_large_batch_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        expected, _ = train(blocks_model(recomputed=False), "plain")
        for way in WAYS:
            weights, model = train(blocks_model(recomputed=True), way)
            assert difference(weights, expected) < 2e-2, way
            assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        begun = blocks_model(recomputed=False).get_weights()
        assert difference(expected, begun) > 4e-2
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.fast
def test_regularisers_in_a_block_count_once():
    kwargs = {"kernel_regularizer": keras.regularizers.L2(0.1)}
    expected, _ = train(blocks_model(recomputed=False, **kwargs), "plain")
    for way in MODES:
        weights, _ = train(blocks_model(recomputed=True, **kwargs), way)
        assert difference(weights, expected) < 2e-6, way


@pytest.mark.fast
def test_a_model_of_recomputed_blocks_is_saved_whole(tmp_path):
    _, model = train(blocks_model(recomputed=True), "accum_steps")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x, _, _ = regression_data(7)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert sum(isinstance(layer, GradientCheckpoint) for layer in loaded.layers) == 3


class ChangesMuch(keras.layers.Layer):
    """Adds a loss, and counts its calls in a variable."""

    def build(self, input_shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        self.add_loss(keras.ops.mean(x**2))
        return x


def eventful_model(wrap, norm=keras.layers.BatchNormalization):
    """Blocks that draw numbers, normalise, add losses and change variables."""
    keras.utils.set_random_seed(1)
    layers = [keras.Input((5,))]
    for _ in range(2):
        block = [
            keras.layers.Dense(8, "tanh", activity_regularizer="l2"),
            norm(momentum=0.9),
            keras.layers.Dropout(0.5, seed=3),
            ChangesMuch(),
            keras.layers.Dense(5, "tanh", trainable=False),
        ]
        layers.append(wrap(keras.Sequential(block)))
    return keras.Sequential([*layers, keras.layers.Dense(1)])


def alone(block):
    return block


@pytest.mark.parametrize(
    "way, execution",
    [*itertools.product(["plain", *WAYS], ["graph"]), *(("micro_batch_size", e) for e in OTHERS)],
    indirect=["execution"],
)
def test_what_a_block_draws_changes_and_adds_is_as_without_it(way, execution):
    model = eventful_model(alone)
    expected, _ = train(model, way, **execution)  # XLA draws other numbers
    assert model.layers[0].layers[-2].calls.numpy() > 0
    weights, _ = train(eventful_model(GradientCheckpoint), way, **execution)
    assert difference(weights, expected) < 2e-6


def deep(block):
    return GradientCheckpoint(keras.Sequential([GradientCheckpoint(block)]))


@pytest.mark.parametrize(
    "way, execution, wrap",
    [
        *((way, "graph", GradientCheckpoint) for way in WAYS),
        ("optimizer", "eager", GradientCheckpoint),
        ("optimizer", "jit", GradientCheckpoint),
        ("micro_batch_size", "jit", GradientCheckpoint),
        ("optimizer", "graph", deep),
    ],
    indirect=["execution"],
)
def test_accum_batch_norm_in_a_block(way, execution, wrap):
    trained = []
    for wrapped in (alone, wrap):
        model = eventful_model(wrapped, functools.partial(AccumBatchNorm, accum_steps=STEPS + 2))
        weights, model = train(model, way, **execution)
        norms = [x for x in _keras.all_layers(model) if isinstance(x, AccumBatchNorm)]
        assert len(norms) == 2
        # What the open cycle holds, in mid-cycle with the optimizer, is counted once as well.
        sums = [v.numpy() for norm in norms for v in norm._pool.state.values()]
        trained.append([*weights, *sums])
    assert difference(*trained) < 2e-6
    assert (trained[0][-5] > 0) == (way == "optimizer")


class Odd(keras.layers.Layer):
    """Updates a metric, and draws from the seed that all share."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = keras.metrics.Mean(name="seen")

    def call(self, x):
        self.seen.update_state(keras.ops.mean(x))
        return x * keras.random.uniform(keras.ops.shape(x))


@pytest.mark.parametrize("execution", ["graph", "eager"], indirect=True)
def test_variables_that_are_not_the_block_s_weights(execution):
    trained = []
    for wrap in (alone, GradientCheckpoint):
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        odd = [Odd(), Odd()]
        layers = [wrap(keras.Sequential([keras.layers.Dense(5, "tanh"), o])) for o in odd]
        model = keras.Sequential([keras.Input((5,)), *layers, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse", **execution)
        x, y, _ = regression_data(8)
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        assert all(float(o.seen.count) == 2 for o in odd)
        trained.append([*model.get_weights(), *(o.seen.result() for o in odd)])
    assert difference(*trained) < 2e-6


def test_a_block_that_assigns_what_is_trained_is_refused():
    dense = keras.layers.SpectralNormalization(keras.layers.Dense(3))
    block = GradientCheckpoint(dense)
    block(tf.ones((2, 4)))  # outside of training it assigns nothing
    with pytest.raises(ValueError, match=r"must not assign .*Received: 'spectral_.*/kernel'"):
        block(tf.ones((2, 4)), training=True)


def attention():
    return keras.layers.MultiHeadAttention(2, 4)


def recurrent():
    return keras.layers.LSTM(4, return_state=True)


def padding(*lengths):
    return tf.sequence_mask(lengths, 4)


CALLS = {
    "positional": (attention, lambda layer, a, b: layer(a, b)),
    "keywords": (attention, lambda layer, a, b: layer(query=a, value=b, key=b * 2)),
    "python_value": (attention, lambda layer, a, b: layer(a, value=b, use_causal_mask=True)),
    "mask_and_value": (
        attention,
        lambda layer, a, b: layer(
            a, b, query_mask=padding(4, 2), value_mask=padding(3, 4), use_causal_mask=True
        ),
    ),
    "states": (recurrent, lambda layer, a, b: layer(a, initial_state=[b[:, 0], b[:, 1]])),
    "states_and_mask": (
        recurrent,
        lambda layer, a, b: layer(a, initial_state=[b[:, 0], b[:, 1]], mask=padding(4, 2)),
    ),
}


@pytest.mark.parametrize("how", ["eager", "graph", "jit"])
@pytest.mark.parametrize("name", CALLS)
def test_all_arguments_of_a_call(name, how):
    make, call = CALLS[name]
    a, b = (tf.constant(np.random.default_rng(i).normal(size=(2, 4, 4)), "float32") for i in (0, 1))
    results = []
    for wrap in (alone, GradientCheckpoint):
        keras.utils.set_random_seed(1)
        layer = wrap(make())

        def gradients(layer=layer):
            with tf.GradientTape() as tape:
                tape.watch([a, b])
                y = tf.nest.flatten(call(layer, a, b))
                loss = sum(tf.reduce_sum(v**3) for v in y)
            return [*y, *tape.gradient(loss, [a, b, *layer.trainable_variables])]

        if how != "eager":
            call(layer, a, b)
            gradients = tf.function(gradients, jit_compile=how == "jit", autograph=False)
        results.append(gradients())
    assert difference(*results) < 1e-5
    assert difference(results[0][-1:], [0 * results[0][-1]]) > 1e-3


def two_towers(wrap):
    """A graph of calls with several arguments, masks and states."""
    keras.utils.set_random_seed(1)
    words, image = keras.Input((4,), dtype="int32"), keras.Input((3, 4))
    x = keras.layers.Embedding(9, 4, mask_zero=True)(words)
    x = wrap(attention())(x, x, use_causal_mask=True)
    y = wrap(attention())(image, value=x)
    state = keras.layers.Dense(4)(y[:, 0])
    z = wrap(keras.layers.LSTM(4))(x, initial_state=[state, state])
    return keras.Model([words, image], keras.layers.Dense(1)(z))


def test_a_graph_of_such_calls_is_trained_saved_and_cloned(tmp_path):
    rng = np.random.default_rng(0)
    x = [rng.integers(0, 9, size=(8, 4)), rng.normal(size=(8, 3, 4)).astype("float32")]
    trained = []
    for wrap in (alone, GradientCheckpoint):
        model = two_towers(wrap)
        model.compile(keras.optimizers.Adam(0.01), "mse")
        model.fit(x, np.ones((8, 1)), batch_size=4, epochs=2, shuffle=False, verbose=0)
        trained.append(model.get_weights())
    assert difference(*trained) < 2e-6
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for other in (loaded, clone):
        assert sum(isinstance(layer, GradientCheckpoint) for layer in other.layers) == 3
        np.testing.assert_array_equal(other.predict(x, verbose=0), expected)


class WithoutBuild(keras.layers.Layer):
    """Its layers are built by its call, and it takes what is given as it is."""

    def __init__(self, **kwargs):
        super().__init__(dtype="float32", **kwargs)
        self.dense = keras.layers.Dense(3, dtype="float32")

    def call(self, x, scale=1.0):
        return self.dense(x) * scale


def test_the_layer_converts_its_arguments_itself():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        x = tf.constant([[1.001, 2.0]])  # which bfloat16 has not
        block = GradientCheckpoint(WithoutBuild())
        y = block(x, scale=2.0)
        assert y.dtype == "float32"
        np.testing.assert_array_equal(y, block.layer(x, scale=2.0))
        assert block(keras.Input((2,)), scale=2.0).dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")


def test_replicas(way):
    if way == "micro_batch_size" and KERAS < (3, 10):
        pytest.skip("Keras before 3.10 has metrics of each replica's own")
    trained = []
    for wrap in (alone, GradientCheckpoint):
        with mirrored().scope():
            trained.append(train(eventful_model(wrap), way)[0])
    assert difference(*trained) < 2e-6


def test_what_is_dropped_is_dropped_again():
    x = tf.ones((64, 4))
    block = GradientCheckpoint(keras.layers.Dropout(0.5, seed=1))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = block(x, training=True)
    assert 0 < np.mean(y.numpy() > 0) < 1
    assert np.all((tape.gradient(y, x).numpy() > 0) == (y.numpy() > 0))


class Attends(keras.layers.Layer):
    """Looks across positions, but not at masked ones; `outputs` may be masked as well."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.attention = keras.layers.MultiHeadAttention(2, 4)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x, mask=None):
        return x + self.attention(x, x, query_mask=mask, value_mask=mask)


@pytest.mark.parametrize("keeps", [True, False], ids=["masked", "unmasked"])
def test_masks_reach_the_block_and_leave_it(keeps, graph_or_jit):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, size=(32, 6)), rng.normal(size=(32, 1))
    weights = []
    for wrap in (alone, GradientCheckpoint):
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Embedding(9, 5, mask_zero=keeps), wrap(Attends()), wrap(Attends())]
        # What has no time axis any more must not hand on the mask that it got.
        layers += [wrap(keras.layers.GlobalAveragePooling1D()), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((6,), dtype="int32"), *layers])
        model.compile(keras.optimizers.SGD(0.1), "mse", **graph_or_jit)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    assert difference(*weights) < 2e-6


def test_a_mask_matters():
    # The neighbour of the test above: with a mask the weights are others.
    x = np.random.default_rng(0).integers(0, 9, size=(8, 6))
    outputs = []
    for mask_zero in (True, False):
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Embedding(9, 5, mask_zero=mask_zero), GradientCheckpoint(Attends())]
        outputs.append(keras.Sequential(layers).predict(x, verbose=0))
    assert difference(*outputs) > 1e-3


@pytest.mark.fast
def test_several_inputs_and_outputs():
    keras.utils.set_random_seed(1)
    a, b = keras.Input((3,)), keras.Input((3,))
    block = keras.Model([a, b], {"sum": keras.layers.Dense(3)(a + b), "b": b * 2})
    x = [tf.random.normal((4, 3)), tf.random.normal((4, 3))]
    results = []
    for layer in (block, GradientCheckpoint(block)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
            loss = tf.reduce_sum(y["sum"] ** 3) + tf.reduce_sum(y["b"] ** 2)
        results.append(tf.nest.flatten(tape.gradient(loss, [x, block.trainable_variables])))
    assert difference(*results) < 1e-6


def test_the_output_shape_is_known():
    outputs = GradientCheckpoint(keras.layers.Dense(7))(keras.Input((5,)))
    assert outputs.shape == (None, 7)


@pytest.mark.fast
def test_what_is_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"Keras layer or model\. Received: <function alone"):
        GradientCheckpoint(alone)


remat_scope = pytest.mark.skipif(
    not hasattr(keras, "RematScope"), reason="this Keras has no RematScope"
)


def scoped_model(**scope):
    keras.utils.set_random_seed(1)
    with keras.RematScope(**scope):
        inputs = keras.Input((5,))
        x = keras.layers.Dense(8, "tanh", name="first")(inputs)
        x = keras.layers.Dense(8, "tanh", name="second")(x)
        return keras.Model(inputs, keras.layers.Dense(1)(x))


@remat_scope
def test_keras_own_scope_for_activations_works_under_the_wrappers():
    expected, _ = train(scoped_model(mode=None), "plain")
    for way in WAYS:
        weights, _ = train(scoped_model(mode="activations"), way)
        assert difference(weights, expected) < 2e-6, way


def test_the_benchmark_measures_all_combinations(tmp_path, capsys):
    try:
        tf.config.experimental.get_memory_info("CPU:0")
    except ValueError:
        pytest.skip("TensorFlow counts no memory on this CPU (it does with oneDNN)")
    options = "--batch-size 16 --micro-batch-size 4 --blocks 4 --filters 12 --repeats 1".split()
    files = [tmp_path / "results.json", tmp_path / "results.png"]
    results = checkpointing.main([*options, "--json", str(files[0]), "--plot", str(files[1])])
    peaks = {result["combination"]: result["peak"] for result in results}
    assert len(peaks) == 8
    # Each remedy saves, on its own and last of all.
    for remedy in checkpointing.REMEDIES:
        rest = tuple(r for r in checkpointing.REMEDIES if r != remedy)
        assert peaks[remedy,] < 0.8 * peaks[()]
        assert peaks[checkpointing.REMEDIES] < peaks[rest]
    for result in results:
        tolerance = 0.05 if "mixed precision" in result["combination"] else 1e-4
        assert result["difference"] <= tolerance * results[0]["movement"]
    printed = capsys.readouterr().out
    assert checkpointing.table(results) in printed
    assert json.loads(files[0].read_text())["results"][0]["peak"] == peaks[()]
    assert files[1].stat().st_size > 0


def test_the_benchmark_refuses_sizes(capsys):
    with pytest.raises(SystemExit):
        checkpointing.main(["--repeats", "0"])
    assert "at least 1" in capsys.readouterr().err
