"""GradientAccumulateOptimizer by itself: numbers checked by hand, loops, sparse and missing."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateOptimizer
from tests.oracle import dense_model, difference, regression_data, state_of


def _variables(*values):
    return [keras.Variable(np.array(v, "float32"), name=f"v{i}") for i, v in enumerate(values)]


def _sums(optimizer):
    """What this cycle's gradients add up to, as lists."""
    state = optimizer._accumulator.state
    sums = [v.numpy() for name, v in state.items() if "gradient_sum" in name]
    received = state["group_0.received"].numpy()
    return [(s * r).tolist() for s, r in zip(sums, received, strict=True)]


def test_three_cycles_of_sgd_checked_by_hand():
    a, b = _variables([1.0, 2.0], 4.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.5), accum_steps=2)
    # (gradients, then what must hold: weights, sums, micro-step, updates)
    steps = [
        (([1.0, 0.0], 2.0), ([1.0, 2.0], 4.0), [[1.0, 0.0], 2.0], 1, 0),
        (([3.0, 4.0], -2.0), ([0.0, 1.0], 4.0), [[0.0, 0.0], 0.0], 0, 1),
        (([2.0, 2.0], 1.0), ([0.0, 1.0], 4.0), [[2.0, 2.0], 1.0], 1, 1),
        (([0.0, -2.0], 3.0), ([-0.5, 1.0], 3.0), [[0.0, 0.0], 0.0], 0, 2),
        (([8.0, 0.0], 0.0), ([-0.5, 1.0], 3.0), [[8.0, 0.0], 0.0], 1, 2),
        (([0.0, 8.0], 4.0), ([-2.5, -1.0], 2.0), [[0.0, 0.0], 0.0], 0, 3),
    ]
    for gradients, weights, sums, micro_step, updates in steps:
        optimizer.apply([tf.constant(g) for g in gradients], [a, b])
        assert [a.numpy().tolist(), b.numpy().tolist()] == list(weights)
        assert _sums(optimizer) == sums
        assert int(optimizer.micro_step.numpy()) == micro_step
        assert int(optimizer.iterations.numpy()) == updates


def test_momentum_is_not_moved_by_the_micro_steps_between():
    (v,) = _variables(0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0, momentum=0.5), 2)
    seen = []
    for gradient in [1.0, 1.0, 0.0, 0.0, 2.0, 0.0]:
        optimizer.apply([tf.constant(gradient)], [v])
        seen.append(float(v.numpy()))
    # Velocities -1, -0.5, -1.25: zero gradients are an update only at the cycle's end.
    assert seen == [0.0, -1.0, -1.0, -1.5, -1.5, -2.75]


def test_weights_give_the_weighted_mean():
    (v,) = _variables(0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 3)
    for gradient, weight in [(1.0, 1), (2.0, tf.constant(3)), (7.0, np.float32(0.0))]:
        optimizer.apply([tf.constant(gradient)], [v], weight=weight)
    assert float(v.numpy()) == -1.75  # (1 x 1 + 3 x 2 + 0 x 7) / 4


def test_weights_of_zero_give_a_zero_gradient_and_no_nan():
    (v,) = _variables(2.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    for _ in range(2):
        optimizer.apply([tf.constant(5.0)], [v], weight=0.0)
    assert float(v.numpy()) == 2.0
    assert int(optimizer.iterations.numpy()) == 1


def test_flush_divides_by_what_the_cycle_holds_and_only_once():
    (v,) = _variables(0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 4)
    optimizer.flush()  # before it is built: nothing to apply
    optimizer.apply([tf.constant(1.0)], [v], weight=2.0)
    optimizer.apply([tf.constant(4.0)], [v], weight=1.0)
    optimizer.flush()
    assert float(v.numpy()) == -2.0
    optimizer.flush()
    assert (float(v.numpy()), int(optimizer.iterations.numpy())) == (-2.0, 1)
    assert int(optimizer.micro_step.numpy()) == 0


def test_reset_drops_a_partial_cycle():
    (v,) = _variables(0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    optimizer.reset()
    optimizer.apply([tf.constant(100.0)], [v])
    optimizer.reset()
    for _ in range(2):
        optimizer.apply([tf.constant(1.0)], [v])
    assert (float(v.numpy()), int(optimizer.iterations.numpy())) == (-1.0, 1)


def test_apply_gradients_returns_the_updates_and_takes_a_weight():
    (v,) = _variables(0.0)
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    optimizer.learning_rate = 1.0
    assert int(optimizer.apply_gradients([(tf.constant(1.0), v)], weight=3.0)) == 0
    assert int(optimizer.apply_gradients([(tf.constant(5.0), v)], weight=1.0)) == 1
    assert float(v.numpy()) == -2.0


def test_built_optimizer_needs_no_variables():
    variables = _variables(0.0, 0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    optimizer.build(variables)
    for _ in range(2):
        optimizer.apply([tf.constant(1.0), tf.constant(2.0)])
    assert [float(v.numpy()) for v in variables] == [-1.0, -2.0]
    optimizer.apply([])  # as in Keras, no gradients are no call
    assert int(optimizer.micro_step.numpy()) == 0


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("pattern", ["boundary", "first", "always"])
def test_missing_gradients_lose_nothing(graph, pattern):
    a, b = _variables(0.0, 0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0, momentum=0.9), 2)
    optimizer.build([a, b])
    both = lambda g: optimizer.apply([g, 2 * g], [a, b])  # noqa: E731
    only_a = lambda g: optimizer.apply([g, None], [a, b])  # noqa: E731
    if graph:
        both, only_a = tf.function(both), tf.function(only_a)
    order = {"boundary": [both, only_a], "first": [only_a, both], "always": [only_a, only_a]}
    with pytest.MonkeyPatch.context() as patch:
        # Keras warns of the variable that it leaves out, as it does without accumulation.
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        for step in order[pattern]:
            step(tf.constant(1.0))
    assert float(a.numpy()) == -1.0
    assert float(b.numpy()) == (0.0 if pattern == "always" else -1.0)


def test_a_variable_without_a_gradient_in_the_cycle_is_left_alone():
    a, b = _variables(0.0, 1.0)
    inner = keras.optimizers.SGD(1.0, momentum=0.5, weight_decay=0.1)
    optimizer = GradientAccumulateOptimizer(inner, 1)
    oracle_a, oracle_b = _variables(0.0, 1.0)
    plain = keras.optimizers.SGD(1.0, momentum=0.5, weight_decay=0.1)
    optimizer = GradientAccumulateOptimizer(inner, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        for gradients in ([1.0, 1.0], [1.0, None], [1.0, 1.0]):
            tensors = [None if g is None else tf.constant(g) for g in gradients]
            plain.apply(tensors, [oracle_a, oracle_b])
            for _ in range(2):
                optimizer.apply(tensors, [a, b])
    assert [float(a), float(b)] == [float(oracle_a), float(oracle_b)]


def test_a_trace_that_came_first_does_not_lose_what_a_later_one_accumulates():
    a, b = _variables(0.0, 0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    optimizer.build([a, b])
    only_a = tf.function(lambda: optimizer.apply([tf.constant(1.0), None], [a, b]))
    only_b = tf.function(lambda: optimizer.apply([None, tf.constant(1.0)], [a, b]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        for step in (only_a, only_a, only_b, only_a):
            step()
    assert [float(a.numpy()), float(b.numpy())] == [-1.5, -0.5]


def _embedding_model(seed=1):
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((3,)), keras.layers.Embedding(20, 4), keras.layers.Flatten()]
    return keras.Sequential([*layers, keras.layers.Dense(1)])


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_embeddings_equal_the_dense_large_batch(name, graph_or_jit):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 20, size=(64, 3)), rng.normal(size=(64, 1)).astype("float32")
    large, accumulated = _embedding_model(), _embedding_model()
    optimizer = keras.optimizers.get(name)
    optimizer.learning_rate = 0.05
    for start in range(0, 64, 16):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((large(x[start : start + 16]) - y[start : start + 16]) ** 2)
        gradients = tape.gradient(loss, large.trainable_variables)
        gradients[0] = tf.convert_to_tensor(gradients[0])
        optimizer.apply(gradients, large.trainable_variables)
    wrapped = GradientAccumulateOptimizer(name, 4)
    wrapped.learning_rate = 0.05
    accumulated.compile(wrapped, "mse", **graph_or_jit)
    accumulated.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    assert difference(accumulated.get_weights(), large.get_weights()) < 1e-6


def test_sparse_gradients_are_scattered_not_made_dense():
    table, _ = _variables(np.zeros((1000, 4)), 0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    optimizer.build([table])

    @tf.function
    def step():
        gradient = tf.IndexedSlices(tf.ones((3, 4)), tf.constant([7, 7, 9]), tf.constant([1000, 4]))
        optimizer.apply([gradient], [table], weight=2.0)

    graph = step.get_concrete_function().graph
    operations = [op.type for op in graph.get_operations()]
    assert "ResourceScatterAdd" in operations
    assert "UnsortedSegmentSum" not in operations
    step()
    step()
    value = table.numpy()
    assert (value[7].tolist(), value[9].tolist()) == ([-2.0] * 4, [-1.0] * 4)
    assert np.count_nonzero(value) == 8


def _custom_model(optimizer, execution):
    class WithTrainStep(keras.Model):
        def __init__(self):
            super().__init__()
            self.net = dense_model()

        def call(self, inputs):
            return self.net(inputs)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            examples = tf.shape(x)[0]
            if isinstance(self.optimizer, GradientAccumulateOptimizer):
                self.optimizer.apply(gradients, self.trainable_variables, weight=examples)
            else:
                self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    model = WithTrainStep()
    model.compile(optimizer, "mse", **execution)
    return model


def test_in_a_train_step_of_ones_own_with_a_smaller_last_batch(execution):
    x, y, _ = regression_data(44)
    large = _custom_model(keras.optimizers.Adam(0.02), execution)
    accumulated = _custom_model(
        GradientAccumulateOptimizer(keras.optimizers.Adam(0.02), 4), execution
    )
    # Each fit is one cycle: 11 examples in micro-batches of 3, 3, 3 and 2.
    for epoch in range(3):
        for start in range(0, 44, 11):
            large.fit(x[start : start + 11], y[start : start + 11], batch_size=11, verbose=0)
            accumulated.fit(
                x[start : start + 11],
                y[start : start + 11],
                batch_size=3,
                shuffle=False,
                verbose=0,
                initial_epoch=epoch,
                epochs=epoch + 1,
            )
    assert int(accumulated.optimizer.iterations.numpy()) == 12
    assert difference(accumulated.get_weights(), large.get_weights()) < 1e-6


@pytest.mark.parametrize("execution", ["eager", "graph", "jit"])
def test_in_a_gradient_tape_loop(execution):
    x, y, _ = regression_data(72)
    weights = []
    for optimizer, batch_size in (
        (keras.optimizers.Adam(0.02), 12),
        (GradientAccumulateOptimizer(keras.optimizers.Adam(0.02), 3), 4),
    ):
        model = dense_model()
        optimizer.build(model.trainable_variables)

        def step(x, y, model=model, optimizer=optimizer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        if execution != "eager":
            step = tf.function(step, jit_compile=execution == "jit")
        for start in range(0, 72, batch_size):
            step(x[start : start + batch_size], y[start : start + batch_size])
        if execution != "eager":
            assert step.experimental_get_tracing_count() == 1
        weights.append(model.get_weights())
    assert difference(*weights) < 1e-6


def test_one_trace_for_calls_of_one_signature():
    variables = _variables([0.0, 0.0], 0.0)
    optimizer = GradientAccumulateOptimizer("adam", 3)
    optimizer.build(variables)
    step = tf.function(lambda a, b: optimizer.apply([a, b], variables, weight=a[0]))
    for i in range(8):
        step(tf.fill([2], float(i)), tf.constant(float(i)))
    assert step.experimental_get_tracing_count() == 1
    assert int(optimizer.iterations.numpy()) == 2


def test_flush_inside_a_function():
    (v,) = _variables(0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 4)
    step = tf.function(lambda g: optimizer.apply([g], [v]))
    flush = tf.function(optimizer.flush)
    step(tf.constant(1.0))
    step(tf.constant(3.0))
    flush()
    flush()
    assert (float(v.numpy()), int(optimizer.iterations.numpy())) == (-2.0, 1)


def test_two_wrapped_optimizers_on_two_models(graph_or_jit):
    """A GAN's two players, each with cycles of its own."""

    class Gan(keras.Model):
        def __init__(self):
            super().__init__()
            self.generator = dense_model(3, seed=1)
            self.discriminator = dense_model(1, seed=2)

        def compile(self, steps, **kwargs):
            super().compile(**kwargs)
            inner = keras.optimizers.Adam(0.02), keras.optimizers.SGD(0.1, momentum=0.9)
            if steps > 1:
                inner = [GradientAccumulateOptimizer(o, steps) for o in inner]
            self.g_optimizer, self.d_optimizer = inner

        def train_step(self, data):
            noise, real = data
            with tf.GradientTape() as tape:
                judged = self.discriminator(real), self.discriminator(self.generator(noise))
                d_loss = tf.reduce_mean((judged[0] - 1.0) ** 2 + judged[1] ** 2)
            d_gradients = tape.gradient(d_loss, self.discriminator.trainable_variables)
            with tf.GradientTape() as tape:
                g_loss = tf.reduce_mean((self.discriminator(self.generator(noise)) - 1.0) ** 2)
            g_gradients = tape.gradient(g_loss, self.generator.trainable_variables)
            self.d_optimizer.apply(d_gradients, self.discriminator.trainable_variables)
            self.g_optimizer.apply(g_gradients, self.generator.trainable_variables)
            return {"g_loss": g_loss, "d_loss": d_loss}

    rng = np.random.default_rng(0)
    noise, real = (rng.normal(size=(48, n)).astype("float32") for n in (3, 1))
    weights = []
    for steps in (1, 4):
        gan = Gan()
        gan.compile(steps, **graph_or_jit)
        gan.fit(noise, real, batch_size=16 // steps, shuffle=False, verbose=0)
        weights.append(gan.generator.get_weights() + gan.discriminator.get_weights())
        assert int(gan.g_optimizer.iterations.numpy()) == 3
    assert difference(*weights) < 1e-6


def test_fit_flushes_at_its_end_and_not_between_epochs(graph_or_jit):
    x, y, _ = regression_data(24)
    model = dense_model()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 4)
    model.compile(optimizer, "mse", **graph_or_jit)
    # 3 micro-batches an epoch: 9 in all are two cycles and a partial one.
    model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    assert int(optimizer.iterations.numpy()) == 3
    assert int(optimizer.micro_step.numpy()) == 0
    oracle = dense_model()
    oracle.compile(keras.optimizers.SGD(0.1), "mse")
    order = np.concatenate([np.arange(24)] * 3)
    for start in (0, 32, 64):
        oracle.train_on_batch(x[order[start : start + 32]], y[order[start : start + 32]])
    assert difference(model.get_weights(), oracle.get_weights()) < 1e-6


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_no_phantom_micro_step_where_the_data_ends_unannounced(execution):
    x, y, _ = regression_data(24)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    dataset = dataset.filter(lambda x, y: tf.reduce_all(tf.math.is_finite(x)))
    model = dense_model()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 100)
    model.compile(optimizer, "mse", **execution)

    seen = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(int(optimizer.micro_step.numpy()))
    )
    model.fit(dataset, epochs=3, verbose=0, shuffle=False, callbacks=[note])
    assert seen == [6, 12, 18]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_gradients_are_summed_in_float32(dtype):
    variable = keras.Variable(tf.zeros(2, dtype), dtype=dtype)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 64)
    optimizer.apply([tf.constant([1.0, 2000.0], dtype)], [variable])
    for _ in range(62):
        optimizer.apply([tf.constant([0.003, 2000.0], dtype)], [variable])
    total = optimizer._accumulator.state["group_0.gradient_sum_0"]
    assert total.dtype == tf.float32
    small = float(tf.cast(tf.constant(0.003, dtype), tf.float64))
    np.testing.assert_allclose(total.numpy(), [1 + 62 * small, 126000.0], rtol=1e-6)
    optimizer.apply([tf.constant([0.003, 2000.0], dtype)], [variable])
    expected = tf.cast(tf.constant([-(1 + 63 * small) / 64, -2000.0]), dtype)
    assert state_of([variable])[0].tolist() == expected.numpy().tolist()


def test_mixed_float16_puts_the_loss_scale_outside():
    x, y, _ = regression_data(48)
    weights = []
    for optimizer, batch_size in (
        (keras.optimizers.SGD(0.05), 16),
        (GradientAccumulateOptimizer(keras.optimizers.SGD(0.05), 4), 4),
    ):
        model = dense_model(dtype="mixed_float16")
        # The policy of a Sequential is the global one.
        model.compile(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=256.0), "mse")
        model.fit(x, y, batch_size=batch_size, epochs=3, shuffle=False, verbose=0)
        assert int(model.optimizer.inner_optimizer.iterations.numpy()) == 9
        weights.append(model.get_weights())
    # The forward pass is in float16, whose rounding depends on the batch.
    assert difference(*weights) < 1e-3


def test_forwards_what_the_inner_optimizer_owns():
    inner = keras.optimizers.AdamW(0.1, weight_decay=0.2, global_clipnorm=3.0, use_ema=True)
    optimizer = GradientAccumulateOptimizer(inner, 2)
    assert optimizer.inner_optimizer is inner
    assert (optimizer.weight_decay, optimizer.global_clipnorm, optimizer.use_ema) == (
        0.2,
        3.0,
        True,
    )
    optimizer.learning_rate = 0.25
    optimizer.weight_decay = 0.5
    assert (float(inner.learning_rate), inner.weight_decay) == (0.25, 0.5)
    inner.loss_scale_factor = 8.0
    assert float(optimizer.scale_loss(tf.constant(2.0))) == 16.0
    assert not hasattr(optimizer, "optimizers")


def test_exclude_from_weight_decay_reaches_the_inner_optimizer():
    variables = _variables(1.0, 1.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.AdamW(0.1, weight_decay=0.5), 2)
    optimizer.exclude_from_weight_decay(var_list=[variables[0]])
    for _ in range(2):
        optimizer.apply([tf.constant(0.0)] * 2, variables)
    assert float(variables[0].numpy()) == 1.0
    assert float(variables[1].numpy()) < 1.0


def test_finalize_flushes_and_then_takes_the_moving_average():
    (v,) = _variables(1.0)
    inner = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5)
    optimizer = GradientAccumulateOptimizer(inner, 2)
    for gradient in (1.0, 1.0, 2.0):
        optimizer.apply([tf.constant(gradient)], [v])
    optimizer.finalize_variable_values([v])
    # Updates to 0 and -2; the average starts at the first and moves half-way to the second.
    assert float(v.numpy()) == -1.0


@pytest.mark.fast
def test_completion_shows_what_is_documented_and_nothing_else():
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    optimizer.build([keras.Variable(0.0)])
    of_keras = set(dir(keras.optimizers.SGD()))
    own = {name for name in dir(optimizer) if not name.startswith("_")} - of_keras
    properties = {"micro_step", "steps_in_cycle", "just_updated", "ended_in_update", "optimizers"}
    properties |= {"accum_steps", "reduction", "non_finite"}
    properties |= {"dropped_micro_steps", "dropped_cycles"}
    assert own == properties | {"flush", "reset", "rebuild"}
