"""A loss that compares examples: contrastive pre-training on handwritten digits, and a probe.

    python examples/contrastive.py --plot contrastive.png

A supervised contrastive loss (Khosla et al. 2020) pulls images of one digit together and pushes all
others apart, within a batch. In micro-batches an image meets fewer others, so ordinary accumulation
trains something else, however many micro-batches an update has. With `coupled_loss=True` the loss
sees the whole effective batch. A linear classifier then shows what the embeddings have learned.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from sklearn.linear_model import LogisticRegression

from _common import (
    add_count,
    add_examples,
    add_plot,
    aligned,
    check_batch_size,
    check_multiple,
    check_plot,
    compare,
    largest_difference,
    load_digits,
    save_plot,
    shown_difference,
)
from gradient_accumulator_tf import GradientAccumulateModel

LARGE = "large batch"
COUPLED = "accumulated, coupled_loss=True"
ORDINARY = "accumulated, coupled_loss=False"
SMALL = "small batch"
WAYS = (LARGE, COUPLED, ORDINARY, SMALL)


def contrastive_loss(labels, embeddings, temperature=0.1):
    """How well each image finds those of its digit among all others: a value for each image."""
    ops = keras.ops
    labels = ops.reshape(labels, (-1,))
    itself = ops.eye(ops.shape(embeddings)[0], dtype=embeddings.dtype)
    same = ops.cast(labels[:, None] == labels, embeddings.dtype) - itself
    logits = embeddings @ ops.transpose(embeddings) / temperature - 1e9 * itself
    found = ops.sum(same * ops.log_softmax(logits), axis=1)
    return -found / ops.maximum(ops.sum(same, axis=1), 1)


def build_encoder(dimensions=8):
    """A small convolutional net onto the unit sphere, with the same first weights in every call.

    Its layers are smooth, and none of them looks across examples or draws random numbers.
    """
    keras.utils.set_random_seed(1)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Conv2D(32, 3, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(dimensions),
            layers.UnitNormalization(),
        ]
    )


def compile_for(way, batch_size, micro_batch_size):
    """The compiled model and the batch size for `fit`: all that the ways differ in."""
    model = build_encoder()
    if way in (COUPLED, ORDINARY):
        model = GradientAccumulateModel(
            model=model, micro_batch_size=micro_batch_size, coupled_loss=way == COUPLED
        )
    model.compile(keras.optimizers.Adam(1e-2), loss=contrastive_loss)
    return model, micro_batch_size if way == SMALL else batch_size


class Probe(keras.callbacks.Callback):
    """Has a linear classifier learn from the embeddings after each epoch.

    Args:
        training: Tuple (x, y) that it learns from.
        validation: Tuple (x, y) that its accuracy is measured on.
    """

    def __init__(self, training, validation):
        super().__init__()
        self._training, self._validation = training, validation
        self.accuracies = []

    def on_epoch_end(self, epoch, logs=None):
        (x, y), (x_validation, y_validation) = self._training, self._validation
        classifier = LogisticRegression(max_iter=1000).fit(self._embed(x), y)
        self.accuracies.append(classifier.score(self._embed(x_validation), y_validation))

    def _embed(self, x):
        return self.model.predict(x, batch_size=256, verbose=0)


def train(way, args):
    """Trains one way and returns its results."""
    training, validation = load_digits(args.examples)
    x, y = (array[: len(training[0]) // args.batch_size * args.batch_size] for array in training)
    model, batch_size = compile_for(way, args.batch_size, args.micro_batch_size)
    first_weights = model.get_weights()
    probe = Probe((x, y), validation)
    history = model.fit(
        x,
        y,
        batch_size=batch_size,
        epochs=args.epochs,
        shuffle=False,
        callbacks=[probe],
        verbose=2,
    ).history
    weights = model.get_weights()
    return {
        "way": way,
        "compared": args.micro_batch_size if way in (ORDINARY, SMALL) else args.batch_size,
        "updates": int(model.optimizer.iterations.numpy()),
        "loss": history["loss"],
        "accuracy": probe.accuracies,
        "weight_movement": largest_difference(weights, first_weights),
        "weights": weights,
    }


def table(results):
    """The results as lines of text, one for each way under two of headings."""
    rows = [
        ("", "images", "", "probe's", "weight"),
        ("way", "compared", "updates", "accuracy", "difference"),
    ]
    for result in results:
        rows.append(
            (
                result["way"],
                str(result["compared"]),
                str(result["updates"]),
                f"{result['accuracy'][-1]:.4f}",
                shown_difference(result["weight_difference"]),
            )
        )
    return aligned(rows)


def draw(results, figure):
    """The probe's accuracy over the epochs, and how far the weights are from the large batch's."""
    curves, bars = figure.subplots(1, 2, width_ratios=[3, 2])
    colors = ("#b8c4d0", "#0b6e99", "#d1495b", "#e3a73b")
    # The first two curves lie on each other, so a wide one is below a dashed one.
    styles = ({"linewidth": 9}, {"linewidth": 2.5, "linestyle": "--"}, {}, {})
    for result, color, style in zip(results, colors, styles, strict=True):
        epochs = range(1, len(result["accuracy"]) + 1)
        accuracy = [100 * value for value in result["accuracy"]]
        label = f"{result['way']} ({result['updates']} updates)"
        curves.plot(epochs, accuracy, color=color, label=label, **style)
    curves.set(title="Accuracy of a linear probe on the embeddings", xlabel="epoch", ylabel="%")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.legend(frameon=False, handlelength=3.5)

    others = results[1:]
    names = [result["way"].replace(", ", "\n").replace("=", "\n=") for result in others]
    distances = [result["weight_difference"] for result in others]
    drawn = bars.bar(names, distances, color=colors[1:])
    bars.bar_label(drawn, [shown_difference(distance) for distance in distances], padding=3)
    bars.set(title="Weight difference from the large batch", yscale="log")
    bars.margins(y=0.12)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Pre-train on digits with a contrastive loss in four ways and compare them."
    )
    add_count(parser, "--epochs", 10, "passes over the training images")
    add_count(parser, "--batch-size", 256, "images per update")
    add_count(parser, "--micro-batch-size", 8, "images per forward and backward pass")
    add_examples(parser)
    add_plot(parser, "accuracies and distances")
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
        results.append(train(way, args))
    compare(results, WAYS[:1])
    print(f"\n{table(results)}\n")
    print(
        "Images compared: how many the loss sees together. Probe: a linear classifier on the\n"
        "embeddings, on images that no training saw. Weight difference: the largest from the\n"
        "large batch, as a fraction of the movement."
    )
    if args.plot:
        save_plot(args.plot, draw, results)
    return results


if __name__ == "__main__":
    main()
