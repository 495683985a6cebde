"""The protocol of a barrier, proved with barriers that the package does not have."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf.cycle.batches import Batch
from gradient_accumulator_tf.replicated.replicas import number_of_replicas, sum_over_replicas
from gradient_accumulator_tf.stages.barrier import Barrier, BarrierKind, Finished
from gradient_accumulator_tf.stages.run import staged_at_barriers
from tests.oracle import difference, each_in_turn, mirrored

EXAMPLES, MICRO, FEATURES = 11, 3, 5
EPSILON = 1e-2


class BatchL2(keras.layers.Layer):
    """Divides each feature by its L2 norm over the batch, and multiplies it by a variable."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="scale")

    def call(self, inputs):
        return self.scale * inputs / tf.sqrt(tf.reduce_sum(inputs**2, 0) + EPSILON)


class L2Barrier(Barrier):
    """The norm over all examples, on all replicas."""

    def __init__(self, layer):
        self._layer = layer
        self.ended = 0

    def contribute(self, inputs):
        return tf.reduce_sum(tf.cast(inputs[0], tf.float64) ** 2, 0)

    def finish(self, total, gathered):
        norm = tf.sqrt(sum_over_replicas(total) + EPSILON)
        return Finished({"norm": tf.cast(norm, self._layer.compute_dtype)})

    def apply(self, inputs, statistics):
        return [self._layer.scale * inputs[0] / statistics["norm"]]

    def pull_back(self, finished, cotangents):
        norm = tf.cast(finished.statistics["norm"], tf.float64)
        return tf.cast(sum_over_replicas(cotangents)["norm"] / norm, self._layer.compute_dtype)

    def send_back(self, inputs, message):
        return [inputs[0] * message]

    def end(self, finished, finite_only):
        self.ended += 1


def _attended(inputs, others):
    """The mean over the others, weighted by how much an example is like them."""
    return tf.nn.softmax(inputs @ tf.transpose(others)) @ others


class BatchAttention(keras.layers.Layer):
    """Attention of each example to all examples of the batch."""

    def call(self, inputs):
        return _attended(inputs, inputs)


class AttentionBarrier(Barrier):
    """The examples themselves are what all of them need; on all replicas."""

    gathers = True

    def __init__(self, layer):
        self._layer = layer

    def contribute(self, inputs):
        return ()

    def finish(self, total, gathered):
        (rows,) = gathered
        return Finished(_over_replicas(rows))

    def apply(self, inputs, statistics):
        return [_attended(inputs[0], statistics)]

    def pull_back(self, finished, cotangents):
        return tf.cast(_own_rows(sum_over_replicas(cotangents)), finished.statistics.dtype)

    def send_back(self, inputs, message):
        return [message]


def _over_replicas(rows):
    if number_of_replicas() == 1:
        return rows
    return tf.distribute.get_replica_context().all_gather(rows, axis=0)


def _own_rows(rows):
    """The rows of this replica, which the test gives 5 examples or 7."""
    if number_of_replicas() == 1:
        return rows
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    return rows[5 * replica : 5 + 7 * replica]


BARRIERS = {BatchL2: L2Barrier, BatchAttention: AttentionBarrier}


def _barrier_of(layer):
    made = BARRIERS.get(type(layer))
    return None if made is None else made(layer)


KIND = BarrierKind(
    find=_barrier_of,
    argument="test=True",
    layers="layer across the batch",
    instead="Pass test=False.",
    otherwise="test=False",
)


def _model(make_layer):
    """Two layers across the batch, one behind a shortcut."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((FEATURES,))
    x = keras.layers.Dense(4, "tanh")(inputs)
    y = keras.layers.Dense(4, "tanh")(make_layer()(x))
    y = keras.layers.Add()([x, make_layer()(y)])
    return keras.Model(inputs, keras.layers.Dense(1)(y))


def _data(examples=EXAMPLES):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(examples, FEATURES)), rng.normal(size=(examples, 1))
    return tf.constant(x), tf.constant(y)


def _of_the_large_batch(model, x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum((model(x, training=True) - y) ** 2)
    return loss, tape.gradient(loss, model.trainable_variables)


def _staged(model, micro_batch_size=MICRO):
    """Function of x and y that returns the loss and the gradients in micro-batches."""
    engine = staged_at_barriers(model, KIND)

    def denominators(predict, micro_batch):
        return tf.cast(tf.shape(predict(None))[0], tf.float64)

    def differentiate(predict, micro_batch, totals):
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_sum((predict(tape) - micro_batch[1]) ** 2)
        return tape, [loss], [tf.ones_like(loss)], loss, [], totals

    def run(x, y):
        gradients, loss, _, totals = engine.gradients(
            Batch.of((x, y, None)),
            micro_batch_size,
            model.trainable_variables,
            denominators,
            differentiate,
        )
        return loss, gradients, totals

    return run


def _executed(function, execution):
    if execution == "eager":
        return function
    return tf.function(function, jit_compile=execution == "jit", autograph=False)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "micro_batch_size, execution", each_in_turn([1, 3, 100], ["eager", "graph", "jit"], core=[3])
)
@pytest.mark.parametrize("layer", BARRIERS, ids=lambda layer: layer.__name__)
def test_gradients_are_those_of_the_large_batch(layer, execution, micro_batch_size):
    model = _model(layer)
    loss, gradients = _of_the_large_batch(model, *_data())
    staged = _executed(_staged(model, micro_batch_size), execution)
    staged_loss, staged_gradients, totals = staged(*_data())
    assert difference([staged_loss], [loss]) < 1e-12
    assert difference(staged_gradients, gradients) < 1e-12
    assert float(totals) == EXAMPLES
    assert min(np.abs(g).max() for g in gradients) > 1e-2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("layer", BARRIERS, ids=lambda layer: layer.__name__)
def test_replicas_meet_at_a_barrier_that_spans_them(layer):
    x, y = _data(12)
    loss, gradients = _of_the_large_batch(_model(layer), x, y)
    strategy = mirrored()
    with strategy.scope():
        staged = _staged(_model(layer), 4)

    @tf.function(autograph=False)
    def on_replicas():
        def on_replica():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            part = slice(5 * replica, 5 + 7 * replica)  # of 5 and 7 examples
            return staged(x[part], y[part])[:2]

        return strategy.run(on_replica)

    found = tf.nest.map_structure(lambda v: sum(v.values), on_replicas())
    assert difference([found[0]], [loss]) < 1e-12
    assert difference(found[1], gradients) < 1e-12


def test_the_effective_batch_ends_once():
    model = _model(BatchL2)
    made = []
    BARRIERS[BatchL2] = lambda layer: made.append(L2Barrier(layer)) or made[-1]
    try:
        staged = _staged(model)
    finally:
        BARRIERS[BatchL2] = L2Barrier
    x, y = _data()
    staged(tf.cast(x, tf.float32), tf.cast(y, tf.float32))
    assert sorted(barrier.ended for barrier in made)[-2:] == [1, 1]


class Hiding(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = BatchL2()

    def build(self, input_shape):
        self.inner.build(input_shape)

    def call(self, inputs):
        return self.inner(inputs)


def test_errors_name_the_kind():
    model = keras.Sequential([keras.Input((FEATURES,)), Hiding()])
    with pytest.raises(
        ValueError, match=r"test=True needs .*is hidden in a Hiding.*Pass test=False"
    ):
        _staged(model)
