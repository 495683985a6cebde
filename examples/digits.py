"""Handwritten digits learned three ways: as one large batch, and with either wrapper.

    python examples/digits.py --plot digits.png

Each way trains the same net on the same images in the same order, in a process of its own, so
that its peak memory is its own. All end with the same weights; the wrappers need less memory.
"""

import argparse
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from _common import (
    add_count,
    add_examples,
    add_plot,
    aligned,
    build_net,
    check_batch_size,
    check_multiple,
    check_plot,
    largest_difference,
    load_digits,
    save_plot,
    shown_difference,
)
from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer

WAYS = ("large batch", "GradientAccumulateModel", "GradientAccumulateOptimizer")


def compile_for(way, batch_size, micro_batch_size):
    """The compiled model and the batch size for `fit`: all that the ways differ in."""
    model, optimizer = build_net(), keras.optimizers.Adam(1e-2)
    if way == "GradientAccumulateModel":
        model = GradientAccumulateModel(model=model, micro_batch_size=micro_batch_size)
    elif way == "GradientAccumulateOptimizer":
        accum_steps = batch_size // micro_batch_size
        optimizer = GradientAccumulateOptimizer(optimizer, accum_steps=accum_steps)
        batch_size = micro_batch_size
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])
    return model, batch_size


def train(way, args):
    """Trains one way and returns its results."""
    (x, y), validation = load_digits(args.examples)
    # Whole batches only. The optimizer's cycles do not end with an epoch, so a smaller last batch
    # would shift all later cycles against the large batches.
    used = len(x) // args.batch_size * args.batch_size
    model, batch_size = compile_for(way, args.batch_size, args.micro_batch_size)
    first_weights = model.get_weights()
    memory_before = peak_memory()
    history = model.fit(
        x[:used],
        y[:used],
        batch_size=batch_size,
        epochs=args.epochs,
        shuffle=False,
        validation_data=validation,
        # Validation does not accumulate. With the large batch's size it would set the peak.
        validation_batch_size=args.micro_batch_size,
    ).history
    weights = model.get_weights()
    return {
        "way": way,
        "effective_batch": args.batch_size,
        "micro_batch": args.batch_size if way == "large batch" else args.micro_batch_size,
        "updates": int(model.optimizer.iterations),
        "loss": history["loss"],
        "validation_accuracy": history["val_accuracy"][-1],
        "memory": peak_memory() - memory_before,
        "weight_movement": largest_difference(weights, first_weights),
        "weights": weights,
    }


def peak_memory():
    """The most bytes held so far: on the GPU, or by this process where there is none."""
    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux the peak of getrusage is inherited from the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_own_process(function, *args):
    """`function(*args)`, computed in a new process that ends with it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def megabytes(memory):
    return "unknown" if math.isnan(memory) else f"{memory / 1e6:.0f} MB"


def table(results):
    """The results as lines of text, one for each way under two of headings."""
    rows = [
        ("", "effective", "micro-", "", "validation", "weight", "peak"),
        ("way", "batch", "batch", "updates", "accuracy", "difference", "memory"),
    ]
    for result in results:
        rows.append(
            (
                result["way"],
                str(result["effective_batch"]),
                str(result["micro_batch"]),
                str(result["updates"]),
                f"{result['validation_accuracy']:.4f}",
                shown_difference(result["weight_difference"]),
                megabytes(result["memory"]),
            )
        )
    return aligned(rows)


def draw(results, figure):
    """Loss curves and memory bars, side by side."""
    curves, bars = figure.subplots(1, 2, width_ratios=[3, 2])
    colors = ("#b8c4d0", "#0b6e99", "#d1495b")
    # The curves lie on each other, so a wide one is below a dashed one and one of dots.
    styles = (
        {"linewidth": 9},
        {"linewidth": 2.5, "linestyle": "--"},
        {"linestyle": "", "marker": "o"},
    )
    for result, color, style in zip(results, colors, styles, strict=True):
        epochs = range(1, len(result["loss"]) + 1)
        curves.plot(epochs, result["loss"], color=color, label=result["way"], **style)
    curves.set(title="Training loss", xlabel="epoch", ylim=(0, None))
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.legend(frameon=False, handlelength=3.5)

    names = [result["way"].replace("Accumulate", "\nAccumulate\n") for result in results]
    memory = [result["memory"] for result in results]
    drawn = bars.bar(names, np.nan_to_num(memory) / 1e6, color=colors)
    bars.bar_label(drawn, [megabytes(value) for value in memory], padding=3)
    bars.set(title="Peak memory added by training", ylabel="MB")
    bars.margins(y=0.12)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    sizes = results[-1]
    figure.suptitle(
        f"Batches of {sizes['effective_batch']}, at once or in micro-batches of "
        f"{sizes['micro_batch']}: one result, less memory"
    )


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Train a net on handwritten digits three ways and compare the results."
    )
    add_count(parser, "--epochs", 12, "passes over the training images")
    add_count(parser, "--batch-size", 512, "images per update")
    add_count(
        parser, "--micro-batch-size", 32, "images per forward and backward pass of the wrappers"
    )
    add_examples(parser)
    add_plot(parser, "losses and memory")
    args = parser.parse_args(argv)
    check_multiple(parser, args)
    check_batch_size(parser, args)
    check_plot(parser, args)
    return args


def main(argv=None):
    """Trains all ways, prints the table, and returns a list with a dict for each way."""
    args = parse(argv)
    results = []
    for way in WAYS:
        print(f"\n{way}", flush=True)
        results.append(in_own_process(train, way, args))
    reference = results[0]
    for result in results:
        result["weight_difference"] = largest_difference(result["weights"], reference["weights"])
    print(f"\n{table(results)}\n")
    moved = reference["weight_movement"]
    print(
        f"Weight difference: the largest from the large batch; weights moved by up to {moved:.2g}."
    )
    print("Peak memory: what training added to the peak, after imports, data and model.")
    if args.plot:
        save_plot(args.plot, draw, results)
    return results


if __name__ == "__main__":
    main()
