"""A step that finds no more data counts nothing, whatever its gradients depend on.

Keras runs a step's graph in such a call after each epoch of a length that it does not know. In the
graph everything runs that does not depend on the data, such as the gradient of a regulariser.
"""

import contextlib
import itertools

import keras
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import difference, mirrored, regression_data, state_of, updates_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning"),
    pytest.mark.filterwarnings("ignore:Nothing accumulates:UserWarning"),
]

ACCUM_STEPS, BATCH, BATCHES = 3, 4, 4  # each epoch ends in mid-cycle
WAYS = {
    "optimizer": "optimizer",
    "accum_steps": {"accum_steps": ACCUM_STEPS},
    "micro_batch_size": {"micro_batch_size": 2},
    "one piece": {"micro_batch_size": BATCH},
    "accum_steps=1": {"accum_steps": 1},
}
UPDATES = {"optimizer": [[1, 1], [2, 2]], "accum_steps": [[2, 0], [4, 0]]}


class Penalised(keras.layers.Layer):
    """Has a weight with a regulariser, and no use for it."""

    def build(self, shape):
        penalty = keras.regularizers.L2(0.1)
        self.weight = self.add_weight(shape=(3,), initializer="ones", regularizer=penalty)

    def call(self, x):
        return x


def _model():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(1), Penalised()])


def _data(known, static):
    examples = tf.data.Dataset.from_tensor_slices(regression_data(BATCH * BATCHES)[:2])
    if not known:
        examples = examples.filter(lambda *_: True)
    return examples.batch(BATCH, drop_remainder=static)


class _Counts(keras.callbacks.Callback):
    """Updates and micro-steps at the end of each epoch, before a flush of the fit."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        optimizer = self.model.optimizer
        self.seen.append([updates_of(optimizer), int(getattr(optimizer, "micro_step", 0))])


def _fit(way, known, static=False, **kwargs):
    model, optimizer = _model(), keras.optimizers.SGD(0.1, momentum=0.9)
    if way == "optimizer":
        optimizer = GradientAccumulateOptimizer(optimizer, ACCUM_STEPS)
    else:
        model = GradientAccumulateModel(model=model, **way)
    counts = _Counts()
    model.compile(optimizer, "mse", **kwargs)
    model.fit(_data(known, static), epochs=2, verbose=0, callbacks=[counts])
    return counts.seen, state_of(model.weights)


@pytest.mark.parametrize(
    "way, static, steps_per_execution",
    [*itertools.product(WAYS, [False, True], [1]), ("optimizer", False, 3)],
)
def test_fit_makes_no_phantom_micro_step(way, static, steps_per_execution):
    kwargs = {"jit_compile": False, "steps_per_execution": steps_per_execution}
    seen, weights = _fit(WAYS[way], False, static, **kwargs)
    expected, large = _fit(WAYS[way], True, static, **kwargs)
    assert seen == expected == UPDATES.get(way, [[BATCHES, 0], [2 * BATCHES, 0]])
    assert difference(weights, large) == 0.0


@pytest.mark.parametrize("way", ["optimizer", "accum_steps"])
def test_nor_on_replicas(way):
    results = []
    for known in (True, False):
        with mirrored().scope():
            results.append(_fit(WAYS[way], known, jit_compile=False))
    (expected, large), (seen, weights) = results
    assert seen == expected and seen[-1][0] > 0
    assert difference(weights, large) == 0.0


@pytest.mark.parametrize("how", ["by next", "as an argument"])
def test_nor_does_a_function_of_ones_own(how):
    model = _model()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), ACCUM_STEPS)
    optimizer.build(model.trainable_variables)

    def step(batch, scale):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y)) + tf.add_n(model.losses)
            loss = loss * scale
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply([g / scale for g in gradients])

    inner = tf.function(step) if how == "as an argument" else step
    # `scale` is there without data.
    outer = tf.function(lambda iterator, scale: inner(next(iterator), scale))
    for _ in range(2):
        iterator = iter(_data(True, False))
        with contextlib.suppress(tf.errors.OutOfRangeError):
            while True:
                outer(iterator, tf.constant(2.0))
    assert [updates_of(optimizer), int(optimizer.micro_step)] == [2, 2]
