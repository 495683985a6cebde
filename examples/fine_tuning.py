"""Fine-tuning a net with batch norms in micro-batches: what each kind of batch norm gives.

    python examples/fine_tuning.py
    python examples/fine_tuning.py --weights imagenet  # downloads them

A MobileNet that knows five handwritten digits learns the other five. Batch norm normalises by the
micro-batch, so the accumulated result is not the large batch's. Frozen batch norms normalise by
their moving statistics, as is usual in fine-tuning, and the result is the large batch's.
Pre-training on the first five digits replaces pre-trained weights, which need a download.
"""

import argparse
import contextlib
import os
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from _common import (
    add_count,
    add_examples,
    aligned,
    check_multiple,
    compare,
    largest_difference,
    load_digits,
    shown_difference,
)
from gradient_accumulator_tf import GradientAccumulateModel, swap_batch_norm

SIDE = 32  # the least that keras.applications takes
KNOWN = 5  # digits below it are for pre-training, the others for fine-tuning


class Way(NamedTuple):
    """What replaces the batch norms (None: nothing), and whether to accumulate."""

    batch_norm: str | None
    accumulates: bool


# A large batch, then the ways that are compared with it.
WAYS = {
    "large batch": Way(None, False),
    "accumulated, Keras's batch norm": Way(None, True),
    'accumulated, "accum"': Way("accum", True),
    'large batch, "frozen"': Way("frozen", False),
    'accumulated, "frozen"': Way("frozen", True),
}


def load_data(known, examples=None):
    """Images (n, 32, 32, 3) and labels (n,) of the known or the other digits: two pairs of them.

    The first pair is to train on, the second to validate on.
    """

    def chosen(x, y):
        mine = (y < KNOWN) == known
        x, y = x[mine], y[mine] - (0 if known else KNOWN)
        # Colours in [-1, 1], as MobileNet expects them.
        return np.tile(x.repeat(SIDE // 8, 1).repeat(SIDE // 8, 2), 3) * 2 - 1, y

    training, validation = load_digits(examples)
    return chosen(*training), chosen(*validation)


@contextlib.contextmanager
def precision(dtype):
    """Computes in this dtype within the context."""
    before = keras.config.floatx()
    try:
        keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)
        yield
    finally:
        keras.config.set_floatx(before)
        keras.config.set_dtype_policy(before)


def build_base(weights=None, seed=1):
    """MobileNet without its last layer; weights are None or "imagenet"."""
    keras.utils.set_random_seed(seed)
    base = keras.applications.MobileNet(
        input_shape=(SIDE, SIDE, 3), alpha=0.25, include_top=False, pooling="avg", weights=weights
    )
    for layer in base.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # 0.99, the default, is too slow for such a short training
    return base


def with_head(base):
    """The base and a new last layer for five digits, the same in every call."""
    head = keras.layers.Dense(KNOWN, kernel_initializer=keras.initializers.GlorotUniform(seed=1))
    return keras.Sequential([keras.Input((SIDE, SIDE, 3)), base, head])


def compile_for(model, learning_rate):
    model.compile(
        keras.optimizers.SGD(learning_rate, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,  # XLA would take longer to compile this net than the net to train
    )
    return model


def pretrained(args):
    """Weights of the base."""
    if args.weights == "imagenet":
        return build_base("imagenet").get_weights()
    (x, y), validation = load_data(True, args.examples)
    base = build_base()
    model = compile_for(with_head(base), 0.05)
    epochs = args.pretraining_epochs
    model.fit(x, y, batch_size=32, epochs=epochs, validation_data=validation, verbose=2)
    return base.get_weights()


def prepare(way, base_weights, micro_batch_size):
    """The compiled model: all that the ways differ in."""
    base = build_base()
    base.set_weights(base_weights)
    model = with_head(base)
    if way.batch_norm:
        model = swap_batch_norm(model, to=way.batch_norm)
    if way.accumulates:
        model = GradientAccumulateModel(model=model, micro_batch_size=micro_batch_size)
    return compile_for(model, 0.01)


def train(name, base_weights, args):
    """Fine-tunes one way and returns its results."""
    (x, y), validation = load_data(False, args.examples)
    model = prepare(WAYS[name], base_weights, args.micro_batch_size)
    # Without moving statistics, and without gamma and beta, which frozen layers do not train.
    trained = [v for v in model.trainable_variables if v.name in ("kernel", "bias")]
    first_weights = [v.numpy() for v in trained]
    history = model.fit(
        x,
        y,
        batch_size=args.batch_size,
        epochs=args.epochs,
        shuffle=False,
        validation_data=validation,
        validation_batch_size=args.micro_batch_size,
        verbose=2,
    ).history
    weights = [v.numpy() for v in trained]
    return {
        "way": name,
        "micro_batch": args.micro_batch_size if WAYS[name].accumulates else args.batch_size,
        "updates": int(model.optimizer.iterations.numpy()),
        "validation_accuracy": history["val_accuracy"],
        "weight_movement": largest_difference(weights, first_weights),
        "weights": weights,
    }


def table(results):
    """The results as lines of text, one for each way under two of headings."""
    rows = [
        ("", "micro-", "", "validation", "weight"),
        ("way", "batch", "updates", "accuracy", "difference"),
    ]
    for result in results:
        rows.append(
            (
                result["way"],
                str(result["micro_batch"]),
                str(result["updates"]),
                f"{result['validation_accuracy'][-1]:.4f}",
                shown_difference(result["weight_difference"]),
            )
        )
    return aligned(rows)


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Fine-tune a net with batch norms in five ways and compare the results."
    )
    parser.add_argument(
        "--weights",
        choices=("digits", "imagenet"),
        default="digits",
        help="pre-train on some digits, or download what was trained on ImageNet "
        "(default: %(default)s)",
    )
    add_count(parser, "--pretraining-epochs", 6, "passes over the first five digits")
    add_count(parser, "--epochs", 6, "passes over the other five")
    add_count(parser, "--batch-size", 64, "images per update")
    add_count(parser, "--micro-batch-size", 8, "images per forward and backward pass")
    add_examples(parser)
    # In float32 rounding, enlarged by the net's kinks, would hide the differences.
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float64",
        help="what to compute in (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    check_multiple(parser, args)
    (x, _), (x_val, _) = load_data(False, args.examples)
    if args.batch_size > len(x) or not len(x_val):
        parser.error(
            "--batch-size must be at most the number of images to fine-tune on, here "
            f"{len(x)}, and one of --examples must be left to validate on, here {len(x_val)}. "
            f"Received: --batch-size {args.batch_size}, --examples {args.examples}. Pass a "
            "smaller batch, or more examples."
        )
    return args


def main(argv=None):
    """Trains all ways, prints the table, and returns a list with a dict for each way."""
    args = parse(argv)
    results = []
    with precision(args.dtype):
        print("pre-training" if args.weights == "digits" else "loading weights", flush=True)
        base_weights = pretrained(args)
        for name in WAYS:
            print(f"\n{name}", flush=True)
            results.append(train(name, base_weights, args))
    compare(results, [name for name, way in WAYS.items() if not way.accumulates])
    print(f"\n{table(results)}\n")
    print(
        "Weight difference: the largest of kernels and biases, from the large batch above, as a\n"
        f"fraction of how far that moved them; computed in {args.dtype}. For the large batch's\n"
        'own statistics in micro-batches: GradientAccumulateModel(batch_norm="exact").'
    )
    return results


if __name__ == "__main__":
    main()
