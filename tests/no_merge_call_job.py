"""Trains under a strategy that says it needs no merge call; prints differences as JSON."""

import json

import keras
import tensorflow as tf
from tensorflow.python.distribute.mirrored_strategy import MirroredExtended

from gradient_accumulator_tf import GradientAccumulateOptimizer
from tests import conftest  # noqa: F401  (logical devices)
from tests.oracle import WAYS, dense_model, difference, in_way, regression_data


def _optimizer():
    return keras.optimizers.Adam(
        0.02, clipnorm=0.05, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3
    )


def _train(model, optimizer, batch_size):
    x, y, _ = regression_data(96)
    model.compile(optimizer, "mse")
    model.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()


def _train_in_a_function_on_each_replica(strategy):
    """What XLA on GPUs asks for, and where a merge call cannot be: one function per replica."""
    x, y, _ = regression_data(96)
    model, optimizer = dense_model(), GradientAccumulateOptimizer(_optimizer(), 4)
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function
    def micro_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            loss /= strategy.num_replicas_in_sync
        optimizer.apply(tape.gradient(loss, variables), variables)

    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat(2)
    # Given the function itself, a strategy for CPUs would call the replicas inside of it.
    run = tf.function(lambda *batch: strategy.run(lambda x, y: micro_step(x, y), args=batch))
    for batch in strategy.experimental_distribute_dataset(data):
        run(*batch)
    optimizer.finalize_variable_values(variables)
    return model.get_weights()


def main():
    large = _train(dense_model(), _optimizer(), 32)
    MirroredExtended._use_merge_call = lambda self: False
    weights = {}
    for devices in (["CPU:0", "CPU:1"], ["CPU:0"]):
        strategy = tf.distribute.MirroredStrategy(devices)
        with strategy.scope():
            assert tf.__internal__.distribute.strategy_supports_no_merge_call()
            sizes = {"steps": 4, "micro": 8, "replicas": 2}
            found = {
                way: _train(*in_way(way, dense_model(), _optimizer(), **sizes)) for way in WAYS
            }
            found["function_on_each_replica"] = _train_in_a_function_on_each_replica(strategy)
        weights |= {f"{way} {len(devices)}": w for way, w in found.items()}
    print(json.dumps({way: difference(w, large) for way, w in weights.items()}))


if __name__ == "__main__":
    main()
