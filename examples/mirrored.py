"""Handwritten digits learned on all GPUs of one machine, compared with one device.

    python examples/mirrored.py

Without a GPU it runs on logical CPU devices. They share the machine's cores, so this shows the
arithmetic and not the speed. All ways train on the same effective batches and end with the same
weights.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

from _common import (
    add_count,
    add_examples,
    aligned,
    build_net,
    check_batch_size,
    largest_difference,
    load_digits,
    shown_difference,
)
from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer

WAYS = (
    "large batch",
    "GradientAccumulateModel(micro_batch_size=)",
    "GradientAccumulateModel(accum_steps=)",
    "GradientAccumulateOptimizer",
)


def find_devices(count):
    """The names of all GPUs, or of `count` logical CPU devices where there is none."""
    gpus = tf.config.list_logical_devices("GPU") if tf.config.list_physical_devices("GPU") else []
    if gpus:
        return [device.name for device in gpus]
    try:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * count,
        )
    except RuntimeError:
        pass  # TensorFlow has started, so it keeps the devices that it has.
    return [device.name for device in tf.config.list_logical_devices("CPU")][:count]


def strategy_on(devices):
    """A `MirroredStrategy` for several devices, a `OneDeviceStrategy` for one."""
    if len(devices) == 1:
        return tf.distribute.OneDeviceStrategy(devices[0])
    # On GPUs TensorFlow chooses the reduction. Its choice for CPU devices would give all strategies
    # that one process makes the same keys for their messages.
    on_cpu = "CPU" in devices[0]
    reduction = tf.distribute.ReductionToOneDevice() if on_cpu else None
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)


def compile_for(way, batch_size, micro_batch_size, replicas):
    """The compiled model and the batch size for `fit`: all that the ways differ in."""
    model, optimizer = build_net(), keras.optimizers.Adam(1e-2)
    # `fit` splits its batch evenly, so this is one micro-batch on each replica.
    micro_batches = micro_batch_size * replicas
    accum_steps = batch_size // micro_batches
    if way == "GradientAccumulateModel(micro_batch_size=)":
        model = GradientAccumulateModel(model=model, micro_batch_size=micro_batch_size)
    elif way == "GradientAccumulateModel(accum_steps=)":
        model = GradientAccumulateModel(model=model, accum_steps=accum_steps)
        batch_size = micro_batches
    elif way == "GradientAccumulateOptimizer":
        optimizer = GradientAccumulateOptimizer(optimizer, accum_steps)
        batch_size = micro_batches
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])
    return model, batch_size


def load_data(args, devices):
    """(x, y) to train on and (x, y) to validate on, in sizes that all ways can use."""
    (x, y), (x_val, y_val) = load_digits(args.examples)
    # Whole batches only, because the optimizer's cycles do not end with an epoch.
    used = len(x) // args.batch_size * args.batch_size
    # Every replica must get an image of the last batch: TensorFlow's convolutions on the CPU fail
    # on a batch without examples.
    validated = len(x_val) // len(devices) * len(devices)
    return (x[:used], y[:used]), (x_val[:validated], y_val[:validated])


def train(way, devices, data, args):
    """Trains one way on the devices and returns its results."""
    (x, y), validation = data
    strategy = strategy_on(devices)
    replicas = strategy.num_replicas_in_sync
    with strategy.scope():
        model, batch_size = compile_for(way, args.batch_size, args.micro_batch_size, replicas)
    first_weights = model.get_weights()
    history = model.fit(
        x,
        y,
        batch_size=batch_size,
        epochs=args.epochs,
        shuffle=False,
        validation_data=validation,
        validation_batch_size=args.micro_batch_size * replicas,
        verbose=2,
    ).history
    weights = model.get_weights()
    return {
        "way": way,
        "replicas": replicas,
        "effective_batch": args.batch_size,
        "micro_batch": args.batch_size if way == "large batch" else args.micro_batch_size,
        "updates": int(model.optimizer.iterations.numpy()),
        "validation_accuracy": history["val_accuracy"][-1],
        "weight_movement": largest_difference(weights, first_weights),
        "weights": weights,
    }


def table(results):
    """The results as lines of text, one for each way under two of headings."""
    rows = [
        ("", "", "effective", "micro-batch", "", "validation", "weight"),
        ("way", "replicas", "batch", "per replica", "updates", "accuracy", "difference"),
    ]
    for result in results:
        counts = ("replicas", "effective_batch", "micro_batch", "updates")
        rows.append(
            (
                result["way"],
                *(str(result[name]) for name in counts),
                f"{result['validation_accuracy']:.4f}",
                shown_difference(result["weight_difference"]),
            )
        )
    return aligned(rows)


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Train a net on handwritten digits on several devices and on one."
    )

    add_count(parser, "--devices", 2, "logical CPU devices, where there is no GPU")
    add_count(parser, "--epochs", 3, "passes over the training images")
    add_count(parser, "--batch-size", 256, "images per update, over all devices")
    add_count(
        parser, "--micro-batch-size", 16, "images per forward and backward pass of one device"
    )
    add_examples(parser)
    args = parser.parse_args(argv)
    check_batch_size(parser, args)
    return args, parser


def main(argv=None):
    """Trains all ways, prints the table, and returns a list with a dict for each way."""
    args, parser = parse(argv)
    devices = find_devices(args.devices)
    if "CPU" in devices[0]:
        print(f"There is no GPU here: running on {len(devices)} logical CPU devices.")
    together = args.micro_batch_size * len(devices)
    if args.batch_size % together:
        nearest = max(1, args.batch_size // together) * together
        parser.error(
            "--batch-size must be a multiple of --micro-batch-size times the devices. Received: "
            f"{args.batch_size}, and {args.micro_batch_size} times {len(devices)}. Pass for "
            f"example --batch-size {nearest}."
        )
    data, results = load_data(args, devices), []
    for way in WAYS:
        print(f"\n{way}", flush=True)
        used = devices[:1] if way == "large batch" else devices
        results.append(train(way, used, data, args))
    reference = results[0]
    for result in results:
        result["weight_difference"] = largest_difference(result["weights"], reference["weights"])
    print(f"\n{table(results)}\n")
    moved = reference["weight_movement"]
    print(
        "Weight difference: the largest from the large batch on one device; weights moved by up "
        f"to {moved:.2g}."
    )
    return results


if __name__ == "__main__":
    main()
