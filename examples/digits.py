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
from sklearn.datasets import load_digits

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer

WAYS = ("large batch", "GradientAccumulateModel", "GradientAccumulateOptimizer")


def build_net():
    """A small convolutional net, with the same first weights in every process.

    It has no BatchNormalization, which would normalise by the micro-batch, and no Dropout, which
    would draw other numbers: with either, an accumulated batch is no longer the large batch.
    """
    keras.utils.set_random_seed(1)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            # To 64 x 64, so that the activations need the most memory, as they do in practice.
            layers.UpSampling2D(8, interpolation="bilinear"),
            # Smooth layers: in the kink of a relu, rounding decides which way a gradient goes.
            layers.Conv2D(16, 3, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Conv2D(32, 3, padding="same", activation="tanh"),
            layers.AveragePooling2D(4),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


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


def load_data(examples=None):
    """Images (n, 8, 8, 1) and labels (n,), as ((x, y) to train on, (x, y) to validate on)."""
    x, y = load_digits(return_X_y=True)
    # Shuffled here, once: `fit` is to show every way the same images in the same order.
    order = np.random.default_rng(0).permutation(len(x))[:examples]
    x, y = x[order].reshape(-1, 8, 8, 1).astype("float32") / 16, y[order]
    held_out = math.ceil(len(x) / 7)
    return (x[held_out:], y[held_out:]), (x[:held_out], y[:held_out])


def train(way, args):
    """Trains one way and returns its results."""
    (x, y), validation = load_data(args.examples)
    # Whole batches only: the optimizer's cycles go on from epoch to epoch, so that a smaller last
    # batch would shift all later cycles against the large batches.
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
        # Nothing accumulates in validation: at the large batch's size it would set the peak.
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
        # On Linux a process inherits what getrusage says from the one that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def largest_difference(arrays, others):
    return max(float(np.max(np.abs(a - b))) for a, b in zip(arrays, others, strict=True))


def compare(results, references):
    """Adds to each way's results the difference of its weights from its reference's.

    The largest, as a fraction of the reference's largest movement of a weight. The reference is
    the last way before it, or itself, that is one of `references`.
    """
    for result in results:
        if result["way"] in references:
            reference = result
        difference = largest_difference(result["weights"], reference["weights"])
        result["weight_difference"] = difference / reference["weight_movement"]


def in_own_process(function, *args):
    """`function(*args)`, from a fresh process that ends with it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def megabytes(memory):
    return "unknown" if math.isnan(memory) else f"{memory / 1e6:.0f} MB"


def aligned(rows):
    """Rows of text as lines in columns, the first two above a rule."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for way, *values in rows:
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([way.ljust(widths[0]), *cells]))
    lines.insert(2, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def shown_difference(difference):
    """A weight difference in two digits, and one that is none as "0"."""
    return f"{difference:.1e}" if difference else "0"


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
    # The curves lie on each other, so a wide one goes below a dashed one and one of dots.
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


def positive_int(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more. Received: {text}")
    return int(text)


def add_count(parser, name, default, meaning):
    """Gives the parser an option for a whole number of 1 or more."""
    meaning = f"{meaning} (default: %(default)s)"
    parser.add_argument(name, metavar="N", type=positive_int, default=default, help=meaning)


def check_multiple(parser, args):
    """Ends with the parser's error unless micro-batches make up an effective batch."""
    if args.batch_size % args.micro_batch_size:
        nearest = max(1, args.batch_size // args.micro_batch_size) * args.micro_batch_size
        parser.error(
            "--batch-size must be a multiple of --micro-batch-size. Received: "
            f"{args.batch_size} and {args.micro_batch_size}. Pass for example "
            f"--batch-size {nearest}."
        )


def check_batch_size(parser, args):
    """Ends with the parser's error if there are too few images for one effective batch."""
    (x, _), _ = load_data(args.examples)
    if args.batch_size > len(x):
        parser.error(
            f"--batch-size must be at most the number of training images, here {len(x)}. "
            f"Received: {args.batch_size}. Pass a smaller one, or a larger --examples."
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
    add_count(parser, "--examples", 1797, "how many of the 1797 images to use")
    parser.add_argument("--plot", metavar="FILE.png", help="draw losses and memory into this file")
    args = parser.parse_args(argv)
    check_multiple(parser, args)
    check_batch_size(parser, args)
    if args.plot and not Path(args.plot).absolute().parent.is_dir():
        parser.error(f"--plot must name a file in an existing folder. Received: {args.plot}")
    return args


def main(argv=None):
    """Trains all ways, prints the table, and returns a list with a dict for each way."""
    args = parse(argv)
    if args.plot:
        # Imported now, so that it is not found missing only after the training.
        from matplotlib.figure import Figure
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
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        draw(results, figure)
        figure.savefig(args.plot, dpi=120)
        print(f"Plot: {args.plot}")
    return results


if __name__ == "__main__":
    main()
