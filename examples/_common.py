"""Shared by the examples: handwritten digits, a net for them, arguments, tables of results."""

import argparse
import math
from pathlib import Path

import keras
import numpy as np
from sklearn import datasets

# Data and model.


def load_digits(examples=None):
    """Images (n, 8, 8, 1) and labels (n,), as ((x, y) to train on, (x, y) to validate on)."""
    x, y = datasets.load_digits(return_X_y=True)
    # Shuffled here, once: `fit` must show every way the same images in the same order.
    order = np.random.default_rng(0).permutation(len(x))[:examples]
    x, y = x[order].reshape(-1, 8, 8, 1).astype("float32") / 16, y[order]
    held_out = math.ceil(len(x) / 7)
    return (x[held_out:], y[held_out:]), (x[:held_out], y[:held_out])


def build_net():
    """A small convolutional net, with the same first weights in every process.

    It has no BatchNormalization, which would normalise over the micro-batch, and no Dropout, which
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


# Arguments.


def positive_int(text):
    """The type of an argument that must be a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more. Received: {text}")
    return int(text)


def add_count(parser, name, default, meaning):
    """Adds an option for a whole number of 1 or more; a default of None stands for all."""
    meaning = f"{meaning} (default: {default or 'all'})"
    parser.add_argument(name, metavar="N", type=positive_int, default=default, help=meaning)


def add_examples(parser):
    """Adds the option for the number of images."""
    add_count(parser, "--examples", 1797, "how many of the 1797 images to use")


def add_plot(parser, drawn):
    """Adds the option for a picture of what is named."""
    parser.add_argument("--plot", metavar="FILE.png", help=f"draw {drawn} into this file")


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
    (x, _), _ = load_digits(args.examples)
    if args.batch_size > len(x):
        parser.error(
            f"--batch-size must be at most the number of training images, here {len(x)}. "
            f"Received: {args.batch_size}. Pass a smaller one, or a larger --examples."
        )


def check_plot(parser, args):
    """Ends with the parser's error if the picture's folder or matplotlib is missing.

    Checked before the training, not after it.
    """
    if not args.plot:
        return
    if not Path(args.plot).absolute().parent.is_dir():
        parser.error(f"--plot must name a file in an existing folder. Received: {args.plot}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        parser.error("--plot needs matplotlib. Install it, or leave out --plot.")


# Results.


def largest_difference(arrays, others):
    """The largest difference of two numbers at the same place."""
    return max(float(np.max(np.abs(a - b))) for a, b in zip(arrays, others, strict=True))


def compare(results, references):
    """Adds "weight_difference" to each way's results: the largest one from its reference.

    It is a fraction of the reference's largest movement of a weight. The reference of a way is the
    way itself if it is one of `references`, else the last one before it.
    """
    for result in results:
        if result["way"] in references:
            reference = result
        difference = largest_difference(result["weights"], reference["weights"])
        result["weight_difference"] = difference / reference["weight_movement"]


def shown_difference(difference):
    """A weight difference in two digits; "0" if there is none."""
    return f"{difference:.1e}" if difference else "0"


def aligned(rows, rules=(2,)):
    """Rows of text as lines in columns, with a rule above each of these rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines = []
    for number, (name, *values) in enumerate(rows):
        if number in rules:
            lines.append(rule)
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def save_plot(path, draw, *args):
    """Saves the figure that `draw(*args, figure)` has drawn on."""
    from matplotlib.figure import Figure  # needed with --plot only

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    draw(*args, figure)
    figure.savefig(path, dpi=120)
    print(f"Plot: {path}")
