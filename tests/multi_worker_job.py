"""One worker of the job that `test_multi_worker.py` starts: trains in every way and saves arrays.

TF_CONFIG=... python -m tests.multi_worker_job DIRECTORY
"""

import json
import os
import pathlib
import signal
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the workers would all take the same GPUs

import keras
import numpy as np
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateOptimizer
from tests import oracle
from tests.oracle import KERAS, dense_model, in_way, regression_data, state_of

LARGE, MICRO, EXAMPLES, EPOCHS = 24, 6, 60, 2  # the last effective batch has half the examples
WAYS = list(oracle.WAYS)
if KERAS < (3, 10):  # its metrics synchronise replicas, which the loop within a step may not
    WAYS.remove("micro_batch_size")


def make_optimizer():
    return keras.optimizers.Adam(0.02, global_clipnorm=0.05, use_ema=True, ema_momentum=0.8)


def make_loss():
    return keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")


def make_scaled():
    return keras.optimizers.SGD(0.05)


def overflowing_data():
    """The last example of the first effective batch overflows in float16."""
    x, y, _ = regression_data(3 * LARGE)
    y[LARGE - 1] = 1e9
    return x, y


def compiled(way, optimizer, loss):
    """A compiled model that accumulates, and the batch size for its `fit`."""
    sizes = {"steps": LARGE // MICRO, "micro": MICRO, "replicas": 2}
    model, optimizer, batch_size = in_way(way, dense_model(), optimizer, **sizes)
    model.compile(optimizer, loss, weighted_metrics=["mae"])
    return model, batch_size


def fit(way):
    """Trains on data with uneven ends, but for the optimizer wrapper, which counts steps alike."""
    x, y, weights = regression_data(EXAMPLES)
    if way == "optimizer":
        x, y, weights = x[: 2 * LARGE], y[: 2 * LARGE], np.ones(2 * LARGE, "float32")
    model, batch_size = compiled(way, make_optimizer(), make_loss())
    data = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(batch_size)
    history = model.fit(data, epochs=EPOCHS, verbose=0).history
    logs = model.evaluate(x, y, sample_weight=weights, batch_size=LARGE, verbose=0)
    return {"weights": model.get_weights(), "loss": history["loss"], "evaluate": logs}


def concordance(y_true, y_pred):
    """A loss that compares the outputs of all examples."""
    distances = (y_true - keras.ops.mean(y_true)) * (y_pred - keras.ops.mean(y_pred))
    spread = keras.ops.var(y_true) + keras.ops.var(y_pred)
    return 1 - 2 * keras.ops.mean(distances) / (spread + keras.ops.mean(y_true - y_pred) ** 2)


def coupled():
    """Trains with a loss over the outputs of all workers."""
    x, y, _ = regression_data(EXAMPLES)
    sizes = {"steps": LARGE // MICRO, "micro": MICRO, "replicas": 2}
    arguments = {**sizes, "coupled_loss": "all_replicas"}
    model = in_way("micro_batch_size", dense_model(), **arguments)[0]
    model.compile(make_scaled(), concordance)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(LARGE)
    history = model.fit(data, epochs=EPOCHS, verbose=0).history
    return {"weights": model.get_weights(), "loss": history["loss"]}


def custom_loop(strategy):
    x, y, _ = regression_data(EXAMPLES)
    model, optimizer = dense_model(), GradientAccumulateOptimizer(make_optimizer(), LARGE // MICRO)
    variables = model.trainable_variables
    optimizer.build(variables)

    def micro_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.math.divide_no_nan(
                tf.reduce_sum((model(x, training=True) - y) ** 2), tf.cast(tf.shape(x)[0], x.dtype)
            )
            loss /= strategy.num_replicas_in_sync
        optimizer.apply(tape.gradient(loss, variables), variables, weight=tf.shape(x)[0])

    run = tf.function(lambda *batch: strategy.run(micro_step, args=batch))
    for _ in range(EPOCHS):
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(MICRO)
        for batch in strategy.experimental_distribute_dataset(data):
            run(*batch)
        optimizer.flush()
    optimizer.finalize_variable_values(variables)
    return {"weights": model.get_weights(), "iterations": [optimizer.iterations.numpy()]}


def mixed_precision(way):
    keras.config.set_dtype_policy("mixed_float16")
    model, batch_size = compiled(way, make_scaled(), "mse")
    keras.config.set_dtype_policy("float32")
    model.optimizer.initial_scale = 256.0
    data = tf.data.Dataset.from_tensor_slices(overflowing_data()).batch(batch_size)
    model.fit(data, verbose=0)
    return {
        "weights": model.get_weights(),
        "scale": [model.optimizer.dynamic_scale.numpy()],
        "updates": [model.optimizer.inner_optimizer.iterations.numpy()],
    }


def train_and_save(strategy, path):
    """Ten micro-steps: two updates and half a cycle, then every worker saves."""
    x, y, _ = regression_data(4 * LARGE)
    model = _checkpointed(seed=1)
    _run(strategy, model, x, y, range(10))
    _checkpoint(model).save(path)
    return {"micro_step": [model.optimizer.micro_step.numpy()], "weights": model.get_weights()}


def resume(strategy, path):
    x, y, _ = regression_data(4 * LARGE)
    model = _checkpointed(seed=5)
    _checkpoint(model).restore(path).assert_consumed()
    _run(strategy, model, x, y, range(10, 16))
    return {
        "weights": model.get_weights(),
        "state": state_of(model.optimizer.inner_optimizer.variables),
    }


def _checkpointed(seed):
    model = dense_model(seed=seed)
    model.compile(GradientAccumulateOptimizer(keras.optimizers.Adam(0.02), LARGE // MICRO), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def _checkpoint(model):
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def _run(strategy, model, x, y, micro_batches):
    run = tf.function(lambda *batch: strategy.run(model.train_step, args=(batch,)))
    first, last = micro_batches[0] * MICRO, (micro_batches[-1] + 1) * MICRO
    data = tf.data.Dataset.from_tensor_slices((x[first:last], y[first:last])).batch(MICRO)
    for batch in strategy.experimental_distribute_dataset(data):
        run(*batch)


def is_killed(strategy, path, index):
    """Saves in mid-cycle; in the middle of a later cycle worker 1 is killed, and 0 goes on."""
    x, y, _ = regression_data(4 * LARGE)
    model = _checkpointed(seed=1)
    _run(strategy, model, x, y, range(6))
    _checkpoint(model).save(path)
    _run(strategy, model, x, y, range(6, 10))
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _run(strategy, model, x, y, range(10, 16))


def is_restarted(strategy, path, index):
    """From what the killed job saved to the end; and the same job undisturbed."""
    del index
    x, y, _ = regression_data(4 * LARGE)
    restarted, undisturbed = _checkpointed(seed=5), _checkpointed(seed=1)
    _checkpoint(restarted).restore(path).assert_consumed()
    _run(strategy, restarted, x, y, range(6, 16))
    _run(strategy, undisturbed, x, y, range(16))
    return {
        "restarted": {"weights": restarted.get_weights()},
        "undisturbed": {"weights": undisturbed.get_weights()},
    }


def keras_alone(strategy):
    """What Keras's `fit` raises in each of the two places that are mended."""
    from keras.src.backend.tensorflow import trainer

    x, y, _ = regression_data(LARGE)
    model = dense_model()
    model.compile("sgd", "mse")
    errors = []
    try:
        model.fit(x, y, batch_size=LARGE, verbose=0)
        errors.append("")
    except ValueError as error:
        errors.append(str(error))
    scalars = strategy.run(lambda: tf.constant(1.0))
    try:
        trainer.reduce_per_replica({"loss": scalars}, strategy, "auto")
        errors.append("")
    except ValueError as error:
        errors.append(str(error))
    return errors


def trains_in_every_way(strategy, path, index):
    del index
    results = {way: fit(way) for way in WAYS}
    results["custom_loop"] = custom_loop(strategy)
    if "micro_batch_size" in WAYS:
        results["coupled"] = coupled()
    results |= {f"mixed_{way}": mixed_precision(way) for way in WAYS}
    results["saved"] = train_and_save(strategy, path)
    # All have saved once all have passed here.
    strategy.reduce("SUM", strategy.run(lambda: tf.constant(1.0)), axis=None).numpy()
    results["resumed"] = resume(strategy, f"{path.parent}/checkpoint-1")
    return results


def main():
    directory = pathlib.Path(sys.argv[1])
    what = sys.argv[2] if len(sys.argv) > 2 else "trains_in_every_way"
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    # Only the chief's file stays; the others take part, as sums over replicas are collective.
    path = directory / ("checkpoint" if index == 0 else f"checkpoint_of_{index}")
    if what == "is_restarted":
        path = str(directory / "checkpoint-1")
    with strategy.scope():
        if what == "trains_in_every_way":
            errors = keras_alone(strategy)
            (directory / f"worker_{index}.json").write_text(json.dumps(errors))
        results = globals()[what](strategy, path, index)
    arrays = {
        f"{name}/{part}/{i}": array
        for name, parts in results.items()
        for part, values in parts.items()
        for i, array in enumerate(values)
    }
    np.savez(directory / f"worker_{index}.npz", **arrays)


if __name__ == "__main__":
    main()
