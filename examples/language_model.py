"""A small causal language model trained on padded batches: exact mean against mean of means.

    python examples/language_model.py --plot language_model.png

The text is Python's language reference, from the standard library. Paragraphs of similar length
share a micro-batch, as is common, because that needs little padding. So some micro-batches hold
few tokens and others many. The large batch takes the mean over all tokens, and
GradientAccumulateModel does too. Keras's own `gradient_accumulation_steps` takes the mean of the
micro-batches' means, in which a token of a short paragraph counts for more.
"""

import argparse
import os
import re
from collections import Counter
from pydoc_data.topics import topics

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from _common import (
    add_count,
    add_plot,
    aligned,
    check_multiple,
    check_plot,
    largest_difference,
    save_plot,
    shown_difference,
)
from gradient_accumulator_tf import GradientAccumulateModel

WAYS = ("large batch", "GradientAccumulateModel", "mean of means")
VOCABULARY, LENGTH, WIDTH = 500, 128, 64  # the net's tokens, positions and features
PADDING, UNKNOWN, BOUNDARY = range(3)


def load_data(paragraphs, batch_size):
    """Arrays of tokens, one per paragraph, as (list to train on, list to validate on)."""
    texts = [text for topic in topics.values() for text in re.split(r"\n\s*\n", topic)]
    words = [tuple(re.findall(r"\w+|[^\w\s]", text.lower())) for text in texts]
    # Each paragraph once, because a repeated one could be in both lists.
    words = [line[: LENGTH - 1] for line in dict.fromkeys(words) if line]
    order = np.random.default_rng(0).permutation(len(words))[:paragraphs]
    words = [words[i] for i in order]
    # Whole effective batches only. Keras takes a partial cycle into the next epoch, which would be
    # another kind of difference.
    used = len(words) * 9 // 10 // batch_size * batch_size
    counts = Counter(word for line in words[:used] for word in line)
    common = [word for word, _ in counts.most_common(VOCABULARY - 3)]
    numbers = {word: number for number, word in enumerate(common, start=3)}
    tokens = [
        np.array([BOUNDARY, *(numbers.get(word, UNKNOWN) for word in line), BOUNDARY], "int32")
        for line in words
    ]
    train = []
    for start in range(0, used, batch_size):
        # By length within an effective batch, so that every way sees the same effective batches.
        train += sorted(tokens[start : start + batch_size], key=len)
    return train, sorted(tokens[used:], key=len)


def padded_batches(tokens, batch_size):
    """Dataset of (tokens, the token that follows each), each batch padded to its longest."""
    dataset = tf.data.Dataset.from_tensor_slices(tf.ragged.constant(tokens, dtype="int32"))
    return dataset.map(lambda line: (line[:-1], line[1:])).padded_batch(batch_size)


class AddPositions(keras.layers.Layer):
    """Adds a learned vector for each position, counted from the start: padding comes last."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def build(self, shape):
        self.positions = self.add_weight(shape=(LENGTH, shape[-1]), name="positions")

    def call(self, x):
        return x + self.positions[: keras.ops.shape(x)[1]]


class Perplexity(keras.metrics.Mean):
    """exp of the mean cross-entropy over all tokens seen, without the padding."""

    def __init__(self, name="perplexity"):
        super().__init__(name=name)

    def update_state(self, y_true, y_pred, sample_weight=None):
        values = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        # Flat, because Keras would first take the mean of each line, with its padding.
        weights = keras.ops.reshape(y_true != PADDING, (-1,))
        super().update_state(keras.ops.reshape(values, (-1,)), sample_weight=weights)

    def result(self):
        return keras.ops.exp(super().result())


def build_net():
    """A transformer of one block, with the same first weights in every call.

    The embedding makes a mask of the padding, which goes through all layers to the loss, whose
    mean is then over the other tokens. There is no Dropout, which would draw other numbers.
    """
    keras.utils.set_random_seed(1)
    layers = keras.layers
    tokens = keras.Input((None,), dtype="int32")
    x = AddPositions()(layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)(tokens))
    normal = layers.LayerNormalization()(x)
    attention = layers.MultiHeadAttention(num_heads=4, key_dim=WIDTH // 4)
    # layers.Add, because + would lose the mask.
    x = layers.Add()([x, attention(normal, normal, use_causal_mask=True)])
    hidden = layers.Dense(4 * WIDTH, "gelu")(layers.LayerNormalization()(x))
    x = layers.Add()([x, layers.Dense(WIDTH)(hidden)])
    return keras.Model(tokens, layers.Dense(VOCABULARY)(layers.LayerNormalization()(x)))


def compile_for(way, batch_size, micro_batch_size):
    """The compiled model and the batch size for `fit`: all that the ways differ in."""
    model, accum_steps, options = build_net(), batch_size // micro_batch_size, {}
    if way == "GradientAccumulateModel":
        model = GradientAccumulateModel(model=model, accum_steps=accum_steps)
    elif way == "mean of means" and accum_steps > 1:
        options = {"gradient_accumulation_steps": accum_steps}
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, **options),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[Perplexity()],
        jit_compile=False,  # XLA would compile again for each length of a batch
    )
    return model, batch_size if way == "large batch" else micro_batch_size


def train(way, args):
    """Trains one way and returns its results, of each epoch."""
    lines, validation = load_data(args.paragraphs, args.batch_size)
    model, batch_size = compile_for(way, args.batch_size, args.micro_batch_size)
    weights = [model.get_weights()]
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(model.get_weights())
    )
    history = model.fit(
        padded_batches(lines, batch_size),
        epochs=args.epochs,
        shuffle=False,
        validation_data=padded_batches(validation, args.micro_batch_size),
        callbacks=[keep],
        verbose=2,
    ).history
    return {
        "way": way,
        "perplexity": history["perplexity"],
        "validation_perplexity": history["val_perplexity"],
        "weights": weights,
    }


def compare(results):
    """Adds to each way's results the difference of its weights from the large batch's.

    It is the largest difference after each epoch, as a fraction of the large batch's largest
    movement of a weight since the start.
    """
    reference = results[0]["weights"]
    for result in results:
        result["weight_difference"] = [
            largest_difference(weights, large) / largest_difference(large, reference[0])
            for weights, large in zip(result["weights"][1:], reference[1:], strict=True)
        ]


def table(results):
    """The results as lines of text, one for each epoch and one for the weights."""
    rows = [["validation perplexity", *(result["way"] for result in results)]]
    curves = [result["validation_perplexity"] for result in results]
    for epoch, values in enumerate(zip(*curves, strict=True), start=1):
        rows.append([f"epoch {epoch}", *(f"{value:.2f}" for value in values)])
    last = [result["weight_difference"][-1] for result in results]
    rows.append(["weight difference", *map(shown_difference, last)])
    return aligned(rows, rules=(1, len(rows) - 1))


def token_counts(lines, batch_size):
    """The tokens to predict in each batch."""
    starts = range(0, len(lines), batch_size)
    return [sum(len(line) - 1 for line in lines[i : i + batch_size]) for i in starts]


def draw(results, counts, figure):
    """Curves of the perplexity and of the weight difference, side by side."""
    perplexity, difference = figure.subplots(1, 2)
    colors = ("#b8c4d0", "#0b6e99", "#d1495b")
    difference.set(
        title="Weight difference from the large batch",
        xlabel="epoch",
        ylabel="fraction of the weights' movement",
        yscale="log",
        ylim=(1e-7, 10),
    )
    # The first two curves lie on each other, so a wide one is below a dashed one.
    styles = (
        {"linewidth": 9},
        {"linewidth": 2.5, "linestyle": "--"},
        {"linewidth": 2, "marker": "o"},
    )
    for result, color, style in zip(results, colors, styles, strict=True):
        values = result["validation_perplexity"]
        epochs = range(1, len(values) + 1)
        perplexity.plot(epochs, values, color=color, label=result["way"], **style)
        if result is not results[0]:
            values = result["weight_difference"]
            difference.plot(epochs, values, color=color, **style)
            label = {"xytext": (0, 9), "textcoords": "offset points", "ha": "right"}
            difference.annotate(f"{values[-1]:.1e}", (epochs[-1], values[-1]), color=color, **label)
    perplexity.set(title="Validation perplexity", xlabel="epoch")
    perplexity.legend(frameon=False, handlelength=3.5)
    for axes in (perplexity, difference):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"A language model on micro-batches of {min(counts)} to {max(counts)} tokens: "
        "the mean over all tokens, and the mean of means"
    )


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Train a small language model three ways and compare the results."
    )

    add_count(parser, "--epochs", 8, "passes over the text")
    add_count(parser, "--batch-size", 64, "paragraphs per update")
    add_count(parser, "--micro-batch-size", 8, "paragraphs per forward and backward pass")
    add_count(parser, "--paragraphs", None, "how many paragraphs to use")
    add_plot(parser, "the curves")
    args = parser.parse_args(argv)
    check_multiple(parser, args)
    lines, validation = load_data(args.paragraphs, args.batch_size)
    if not lines:
        parser.error(
            "--batch-size must be at most the number of training paragraphs, here "
            f"{len(validation) * 9 // 10}. Received: {args.batch_size}. Pass a smaller one, or a "
            "larger --paragraphs."
        )
    check_plot(parser, args)
    return args


def main(argv=None):
    """Trains all ways, prints the table, and returns a list with a dict for each way."""
    args = parse(argv)
    results = []
    for way in WAYS:
        print(f"\n{way}", flush=True)
        results.append(train(way, args))
    compare(results)
    print(f"\n{table(results)}\n")
    lines, _ = load_data(args.paragraphs, args.batch_size)
    counts = token_counts(lines, args.micro_batch_size)
    print(
        f"Effective batches of {args.batch_size} paragraphs, micro-batches of "
        f"{args.micro_batch_size}; a micro-batch holds {min(counts)} to {max(counts)} tokens."
    )
    print("Mean of means: Keras's gradient_accumulation_steps, on the same micro-batches.")
    print("Weight difference: the largest from the large batch, as a fraction of the movement.")
    if args.plot:
        save_plot(args.plot, draw, results, counts)
    return results


if __name__ == "__main__":
    main()
