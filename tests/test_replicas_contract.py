"""On two replicas every optimizer is that of the large batch on one device, in every loop."""

import functools

import keras
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateOptimizer
from tests.oracle import (
    WAYS,
    dense_model,
    difference,
    each_in_turn,
    in_way,
    mirrored,
    regression_data,
    state_of,
)
from tests.test_optimizer_contract import ALL, EPOCHS, LARGE, MICRO, UPDATES, large_batch

EXAMPLES = LARGE * UPDATES // EPOCHS


def _data():
    return regression_data(EXAMPLES, dtype="float64")[:2]


def _fit(model, batch_size):
    model.fit(*_data(), batch_size=batch_size, epochs=EPOCHS, shuffle=False, verbose=0)


def _fit_in(way, make, strategy):
    with strategy.scope():
        sizes = {"steps": LARGE // MICRO, "micro": MICRO, "replicas": 2}
        model, optimizer, batch_size = in_way(way, dense_model(), make(), **sizes)
        model.compile(optimizer, "mse")
    _fit(model, batch_size)
    return model


class OwnTrainStep(keras.Model):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def call(self, x):
        return self.net(x)

    def train_step(self, data):
        x, y = data
        variables = self.trainable_variables
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
            loss = self.optimizer.scale_loss(loss)
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def _own_train_step(make, strategy):
    with strategy.scope():
        model = OwnTrainStep(dense_model())
        model.compile(GradientAccumulateOptimizer(make(), LARGE // MICRO), "mse")
    _fit(model, MICRO)
    return model


def _custom_loop(make, strategy, eager=False):
    with strategy.scope():
        model = dense_model()
        model.optimizer = GradientAccumulateOptimizer(make(), LARGE // MICRO)
        model.optimizer.build(model.trainable_variables)
    variables = model.trainable_variables

    def micro_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            loss = model.optimizer.scale_loss(loss) / strategy.num_replicas_in_sync
        model.optimizer.apply(tape.gradient(loss, variables), variables)

    def run(*batch):
        strategy.run(micro_step, args=batch)

    run = run if eager else tf.function(run)
    batches = tf.data.Dataset.from_tensor_slices(_data()).batch(MICRO).repeat(EPOCHS)
    for batch in strategy.experimental_distribute_dataset(batches):
        run(*batch)
    model.optimizer.finalize_variable_values(variables)
    return model


# Replicas are nothing to an optimizer that moves each element by itself: one stands for them all.
ALONE = "sgd sgd_nesterov amsgrad adamax nadam adagrad adadelta rmsprop adamw".split()
NAMES = [name for name in ALL if name not in ALONE]
LOOPS = {
    **{way: functools.partial(_fit_in, way) for way in WAYS},
    "own_train_step": _own_train_step,
    "custom_loop": _custom_loop,
    "eager_custom_loop": functools.partial(_custom_loop, eager=True),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name, loop", each_in_turn(NAMES, LOOPS, ["adam", "ema_overwrite"], ["adam"])
)
def test_equals_the_large_batch_of_one_device(name, loop):
    weights, state = large_batch(name)
    model = LOOPS[loop](ALL[name], mirrored())
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert int(optimizer.iterations.numpy()) == UPDATES
    assert difference(model.get_weights(), weights) < 1e-12
    assert difference(state_of(optimizer.variables), state) < 1e-12
