"""What accumulating costs: an epoch of each way to do it, over an epoch of plain fit.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --cases dense-1M-SGD --jit on --accum-steps 8 --json times.json

Each case has a process of its own, as TensorFlow gives back little of a model's memory. In it all
rivals train the same model on the same examples, an epoch each in turn, so that a busy moment of
the machine meets all of them. Plain fit updates after every micro-batch. TensorFlow trains on a GPU
if there is one; what was measured on is printed.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from examples.digits import in_own_process
from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer

CLASSES = 10
TOLERANCE = 1e-4  # what float32 makes of sums in another order, after an epoch

PLAIN = "plain fit"
LARGE = "plain fit, large batch"
BUILT_IN = "Keras gradient_accumulation_steps"
LOOP = "GradientTape loop (a list of variables)"
TENSOR_LOOP = "GradientTape loop (a list of tensors)"
OPTIMIZER = "GradientAccumulateOptimizer"
ACROSS_STEPS = "GradientAccumulateModel(accum_steps)"
WITHIN_STEP = "GradientAccumulateModel(micro_batch_size)"

# What should cost no more than what.
RULES = ((OPTIMIZER, PLAIN), (OPTIMIZER, BUILT_IN), (WITHIN_STEP, PLAIN))


# The cases: a model, an optimizer, and inputs.


class Case(NamedTuple):
    """One column of the table.

    Attributes:
        model: Function that returns the model, with the same weights in every call.
        optimizer: Function of keyword arguments that returns the optimizer.
        inputs: Function of a random generator and a number of examples.
        steps: Micro-batches in an epoch; enough for fit's own start and end not to matter.
        reference: The rival whose weights all that accumulate must reach.
    """

    model: Callable
    optimizer: Callable
    inputs: Callable
    steps: int
    reference: str = LARGE


def dense_model(features, *units):
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(n, "relu") for n in units]
    return keras.Sequential([keras.Input((features,)), *hidden, keras.layers.Dense(CLASSES)])


def embedding_model(rows, columns, length):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((length,), dtype="int32"),
            keras.layers.Embedding(rows, columns),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(CLASSES),
        ]
    )


def convolutional_model(size, *filters):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((size, size, 3))
    for n in filters:
        x = keras.layers.Conv2D(n, 3, padding="same", activation="relu")(x)
        x = keras.layers.AveragePooling2D(2)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(x))


def transformer_model(length, width, blocks):
    """A transformer on vectors: on tokens the embedding, a case of its own, would rule."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((length, width))
    for _ in range(blocks):
        normal = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(num_heads=4, key_dim=width // 4)
        x = layers.Add()([x, attention(normal, normal)])
        hidden = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(width)(hidden)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def normal_inputs(shape, rng, examples):
    return rng.normal(size=(examples, *shape)).astype("float32")


def token_inputs(tokens, length, rng, examples):
    return rng.integers(tokens, size=(examples, length), dtype="int32")


def dense_case(optimizer, steps, features, *units):
    return Case(
        functools.partial(dense_model, features, *units),
        optimizer,
        functools.partial(normal_inputs, (features,)),
        steps,
    )


def convolutional_case(optimizer, steps, size=32, filters=(32, 64, 128)):
    return Case(
        functools.partial(convolutional_model, size, *filters),
        optimizer,
        functools.partial(normal_inputs, (size, size, 3)),
        steps,
    )


def transformer_case(optimizer, steps, length=64, width=128, blocks=4):
    return Case(
        functools.partial(transformer_model, length, width, blocks),
        optimizer,
        functools.partial(normal_inputs, (length, width)),
        steps,
    )


def embedding_case(optimizer, steps, rows=200_000, columns=128, length=32, **kwargs):
    return Case(
        functools.partial(embedding_model, rows, columns, length),
        optimizer,
        functools.partial(token_inputs, rows, length),
        steps,
        **kwargs,
    )


SGD = functools.partial(keras.optimizers.SGD, 0.01)
# Adam divides a gradient by its own size: with the default epsilon, by its rounding error.
ADAM = functools.partial(keras.optimizers.Adam, 1e-4, epsilon=1e-4)

CASES = {
    "dense-1M-SGD": dense_case(SGD, 128, 512, 768, 768),
    "dense-1M-Adam": dense_case(ADAM, 96, 512, 768, 768),
    "dense-20M-SGD": dense_case(SGD, 16, 1024, 4096, 3840),
    "dense-20M-Adam": dense_case(ADAM, 16, 1024, 4096, 3840),
    "convolutional-SGD": convolutional_case(SGD, 32),
    "convolutional-Adam": convolutional_case(ADAM, 32),
    "transformer-SGD": transformer_case(SGD, 16),
    "transformer-Adam": transformer_case(ADAM, 16),
    "embedding-SGD": embedding_case(SGD, 64),
    # Keras's Adam on a sparse gradient is not that on the dense one, which all accumulation uses.
    "embedding-Adam": embedding_case(ADAM, 16, reference=LOOP),
}


# The rivals: each has a model, and a function that trains it for an epoch.


class Rival(NamedTuple):
    """One row of the table."""

    model: keras.Model
    train_epoch: Callable


def fit(model, optimizer, batches, jit):
    """The rival that trains with `fit`."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, jit_compile=jit)
    return Rival(model, lambda: model.fit(batches, shuffle=False, verbose=0))


def gradient_tape_loop(model, optimizer, batches, accum_steps, jit):
    """What people write by hand, with sums in variables as in Keras's own accumulation."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    variables = model.trainable_variables
    optimizer.build(variables)
    sums = [tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False) for v in variables]

    @tf.function(jit_compile=jit)
    def micro_step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
            share = loss / accum_steps
        gradients = tape.gradient(share, variables)
        for total, gradient in zip(sums, gradients, strict=True):
            total.assign_add(gradient)
        return loss

    @tf.function(jit_compile=jit)
    def update():
        optimizer.apply([total.read_value() for total in sums], variables)
        for total in sums:
            total.assign(tf.zeros_like(total))

    def train_epoch():
        losses = []
        for step, (x, y) in enumerate(batches, start=1):
            losses.append(micro_step(x, y))
            if step % accum_steps == 0:
                update()
        # The epoch's loss, as fit reports it.
        return float(tf.reduce_mean(losses))

    return Rival(model, train_epoch)


def tensor_loop(model, optimizer, batches, accum_steps, jit):
    """What people write by hand, with sums in tensors that each micro-step takes and returns."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function(jit_compile=jit)
    def micro_step(sums, x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
            share = loss / accum_steps
        gradients = tape.gradient(share, variables)
        return loss, [a + tf.convert_to_tensor(b) for a, b in zip(sums, gradients, strict=True)]

    @tf.function(jit_compile=jit)
    def update(sums):
        optimizer.apply(sums, variables)

    def train_epoch():
        losses = []
        sums = zeros = [tf.zeros(v.shape, v.dtype) for v in variables]
        for step, (x, y) in enumerate(batches, start=1):
            loss, sums = micro_step(sums, x, y)
            losses.append(loss)
            if step % accum_steps == 0:
                update(sums)
                sums = zeros
        return float(tf.reduce_mean(losses))

    return Rival(model, train_epoch)


def rival_makers(case, micro_batches, large_batches, micro_batch_size, accum_steps, jit):
    """Dict of name to a function that returns the `Rival`, in the order of the table's rows."""

    def across_steps(model, optimizer):
        return fit(model, optimizer, micro_batches, jit)

    def within_step(model, optimizer):
        return fit(model, optimizer, large_batches, jit)

    model, optimizer = case.model, case.optimizer
    return {
        PLAIN: lambda: across_steps(model(), optimizer()),
        LARGE: lambda: within_step(model(), optimizer()),
        BUILT_IN: lambda: across_steps(model(), optimizer(gradient_accumulation_steps=accum_steps)),
        LOOP: lambda: gradient_tape_loop(model(), optimizer(), micro_batches, accum_steps, jit),
        TENSOR_LOOP: lambda: tensor_loop(model(), optimizer(), micro_batches, accum_steps, jit),
        OPTIMIZER: lambda: across_steps(
            model(), GradientAccumulateOptimizer(optimizer(), accum_steps)
        ),
        ACROSS_STEPS: lambda: across_steps(
            GradientAccumulateModel(model=model(), accum_steps=accum_steps), optimizer()
        ),
        WITHIN_STEP: lambda: within_step(
            GradientAccumulateModel(model=model(), micro_batch_size=micro_batch_size), optimizer()
        ),
    }


def batches_of(size, x, y):
    """The examples in batches, as cheaply as can be, of unknown size as in `fit` on arrays."""
    x, y = tf.constant(x), tf.constant(y)

    def batch(i):
        return x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]

    # With autotuning the end of an epoch can wait for its next turn, 10 ms x (2^k - 1) after the
    # epoch's start: times are then rounded up to one of 150, 310, 630, 1270 ms and so on.
    options = tf.data.Options()
    options.autotune.enabled = False
    return tf.data.Dataset.range(len(x) // size).map(batch).with_options(options)


# The measurement.


def measure(case, jit, micro_batch_size, accum_steps, steps, repeats):
    """Seconds of each timed epoch, by rival; and by rival how far its weights are off."""
    updates = -(-(steps or case.steps) // accum_steps)
    rng = np.random.default_rng(0)
    x = case.inputs(rng, updates * accum_steps * micro_batch_size)
    y = rng.integers(CLASSES, size=len(x))
    makers = rival_makers(
        case,
        batches_of(micro_batch_size, x, y),
        batches_of(micro_batch_size * accum_steps, x, y),
        micro_batch_size,
        accum_steps,
        jit,
    )
    rivals = {name: make() for name, make in makers.items()}
    differences = warm_up(rivals, case.reference)
    return time_in_turn(rivals, repeats), differences


def warm_up(rivals, reference):
    """Trains all for an epoch, which traces and compiles.

    Returns:
        For each rival that accumulates, the largest difference of a weight to the reference's.
    """
    rivals[reference].train_epoch()
    expected = weights_of(rivals[reference])
    differences = {}
    for name, rival in rivals.items():
        if name == reference:
            continue
        rival.train_epoch()
        if name not in (PLAIN, LARGE):
            differences[name] = max(
                float(np.max(np.abs(a - b), initial=0.0))
                for a, b in zip(weights_of(rival), expected, strict=True)
            )
    return differences


def weights_of(rival):
    return [keras.ops.convert_to_numpy(v) for v in rival.model.trainable_variables]


def time_in_turn(rivals, repeats):
    """Seconds of `repeats` epochs of each rival; every repeat starts with another one."""
    seconds = {name: [] for name in rivals}
    names = list(rivals)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            rivals[name].train_epoch()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds, base):
    """Median of `seconds` over the median of `base`, and the same of the two quartiles."""
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75]) / statistics.median(base)
    return middle, low, high


# The report.


def machine():
    """What is measured on, in a few words."""
    gpus = tf.config.list_physical_devices("GPU")
    names = Counter(
        tf.config.experimental.get_device_details(gpu).get("device_name", "unknown") for gpu in gpus
    )
    kinds = ", ".join(f"{count} GPU ({name})" for name, count in names.items())
    return (
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPU cores, "
        f"{kinds or 'no GPU'}"
    )


def setting(options):
    """One line that says what was measured on what."""
    return (
        f"{machine()}; micro-batches of {options.micro_batch_size}. Epoch time over that of plain "
        f"fit at the micro-batch: ratio of the medians of {options.repeats} epochs, in brackets "
        "the quartiles."
    )


def markdown(rows):
    """Markdown table of rows of text, the first of which are the headings."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table(measured):
    """Markdown table of ratios: a row for each rival, a column for each case."""
    rivals = list(next(iter(measured.values())))
    rows = [["", *measured]]
    for rival in rivals:
        cells = [ratio(seconds[rival], seconds[PLAIN]) for seconds in measured.values()]
        rows.append([rival, *(f"{mid:.2f} ({low:.2f}-{high:.2f})" for mid, low, high in cells)])
    plain = [statistics.median(seconds[PLAIN]) for seconds in measured.values()]
    rows.append([f"seconds of {PLAIN}", *(f"{median:.2f}" for median in plain)])
    return markdown(rows)


def rule(measured, rival, base):
    """Whether `rival` costs no more than `base` in each case, as measured."""
    answers = []
    for case, seconds in measured.items():
        middle = round(ratio(seconds[rival], seconds[base])[0], 2)
        answers.append(f"{case} {'yes' if middle <= 1 else 'no'} ({middle:.2f})")
    return f"{rival} <= {base}? {', '.join(answers)}"


def plot(results, path):
    """The tables' ratios on a line for each case, a panel for each table."""
    from matplotlib.figure import Figure  # not needed for the tables

    columns = len({name.split(",")[0] for name in results})
    rows = len(results) // columns
    cases = list(next(iter(results.values())))
    figure = Figure(
        figsize=(1 + 5 * columns, 1.2 + (0.8 + 0.3 * len(cases)) * rows), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    markers = ("|", "s", "X", "D", "d", "o", "^", "*")
    for panel, (name, measured) in zip(panels.T.flat, results.items(), strict=True):
        for rival, marker in zip(next(iter(measured.values())), markers, strict=True):
            middle = [ratio(s[rival], s[PLAIN])[0] for s in measured.values()]
            ours = rival in (OPTIMIZER, ACROSS_STEPS, WITHIN_STEP)
            panel.plot(
                middle,
                range(len(cases)),
                marker,
                color=None if ours else "0.6" if rival != BUILT_IN else "black",
                markersize=8 if ours else 6,
                zorder=3 if ours else 2,
                label=rival,
            )
        panel.axvline(1, color="0.4", linewidth=0.8)
        panel.set(title=name, xscale="log")
        panel.set_yticks(range(len(cases)), cases)
        panel.grid(axis="y", color="0.93")
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_formatter("{x:g}")
    panels[0][0].invert_yaxis()
    for panel in panels[-1]:
        panel.set_xlabel("epoch time over plain fit's")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--jit", choices=["off", "on", "both"], default="both")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument(
        "--accum-steps",
        nargs="+",
        type=int,
        default=[2, 8, 64],
        metavar="N",
        help="micro-batches per update, with a table for each number",
    )
    parser.add_argument("--repeats", type=int, default=11, help="timed epochs of each rival")
    parser.add_argument(
        "--steps", type=int, help="micro-batches in an epoch, rounded up to whole updates"
    )
    parser.add_argument("--json", metavar="FILE", help="write the seconds of every epoch")
    parser.add_argument("--plot", metavar="FILE", help="draw the tables; needs matplotlib")
    options = parser.parse_args(argv)
    sizes = (options.micro_batch_size, options.repeats, options.steps or 1)
    if min(sizes) < 1 or min(options.accum_steps) < 2:
        parser.error(
            "sizes and repeats must be at least 1, and --accum-steps at least 2. Received: "
            f"--micro-batch-size {options.micro_batch_size}, --repeats {options.repeats}, --steps "
            f"{options.steps}, --accum-steps {options.accum_steps}. Pass larger numbers."
        )
    return options


def measure_all(options, mode, accum_steps):
    """Seconds of each timed epoch by case and rival, with jit compilation "off" or "on"."""
    measured = {}
    for name in options.cases:
        print(f"measuring {name}, jit {mode}, {accum_steps} steps", file=sys.stderr, flush=True)
        measured[name], differences = in_own_process(
            measure,
            CASES[name],
            mode == "on",
            options.micro_batch_size,
            accum_steps,
            options.steps,
            options.repeats,
        )
        for rival, difference in differences.items():
            if not difference <= TOLERANCE:  # so that NaN warns as well
                print(f"Warning: {name}: weights of {rival} are off by {difference:.1e}")
    return measured


def main(argv=None):
    """Measures, prints, and returns seconds[table][case][rival], a list of epochs each.

    There is a table for each jit mode and number of micro-batches: "jit off, accum_steps 2".
    """
    options = parse(argv)
    print(setting(options), flush=True)
    results = {}
    modes = ("off", "on") if options.jit == "both" else (options.jit,)
    for mode, accum_steps in itertools.product(modes, options.accum_steps):
        name = f"jit {mode}, accum_steps {accum_steps}"
        print(f"\n### {name}\n", flush=True)
        measured = results[name] = measure_all(options, mode, accum_steps)
        rules = [rule(measured, *pair) for pair in RULES]
        print(table(measured), *rules, sep="\n\n")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"setting": setting(options), "seconds": results}, file, indent=1)
    if options.plot:
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
