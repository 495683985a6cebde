"""Batch norm in micro-batches: what training reaches, and what each way to do it costs.

    python -m benchmarks.batch_norm
    python -m benchmarks.batch_norm --parts accuracy --seeds 1 --epochs 3 --plot accuracy.png

Four parts: `accuracy` trains a net with six batch norms on scikit-learn's digits, `equality`
compares the weights of exact and large batch after one and ten updates, `time` takes steps in
turn in one process, and `memory` finds each way's peak in a process of its own: on a GPU from
TensorFlow's statistics, else from what the process held, as in benchmarks/memory.py.
"""

import functools
import gc
import time

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from benchmarks import _common, _meters
from gradient_accumulator_tf import GradientAccumulateModel, swap_batch_norm

LARGE = "large batch"
EXACT = 'batch_norm="exact"'
ACCUM = "AccumBatchNorm"
MICRO = "Keras's batch norm"
GROUP = "group norm"
WAYS = (LARGE, EXACT, ACCUM, MICRO, GROUP)
PARTS = ("accuracy", "equality", "time", "memory")
CLASSES = 10


# Nets.


def six_norms(size=8, channels=1):
    """A convolutional net with six batch norms."""
    inputs = x = keras.Input((size, size, channels))
    for filters, strides in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        x = keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(x))


def residual_net(size):
    """Blocks with projection shortcuts."""
    inputs = x = keras.Input((size, size, 3))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        shortcut = keras.layers.Conv2D(filters, 1, strides, use_bias=False)(x)
        shortcut = keras.layers.BatchNormalization()(shortcut)
        y = keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        y = keras.layers.ReLU()(keras.layers.BatchNormalization()(y))
        y = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(y)
        y = keras.layers.BatchNormalization()(y)
        x = keras.layers.ReLU()(keras.layers.Add()([y, shortcut]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(x))


def u_net(size):
    """Two levels down and up again, with shortcuts between the levels."""
    inputs = x = keras.Input((size, size, 3))

    def block(x, filters):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        return keras.layers.ReLU()(keras.layers.BatchNormalization()(x))

    skips = []
    for filters in (16, 32):
        x = block(x, filters)
        skips.append(x)
        x = keras.layers.MaxPooling2D()(x)
    x = block(x, 64)
    for filters in (32, 16):
        x = keras.layers.Concatenate()([keras.layers.UpSampling2D()(x), skips.pop()])
        x = block(x, filters)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(x))


def application(name, size):
    make = getattr(keras.applications, name)
    return make(
        weights=None, input_shape=(size, size, 3), classes=CLASSES, classifier_activation=None
    )


NETS = {
    "six norms": functools.partial(six_norms, channels=3),
    "residual net": residual_net,
    "U-Net": u_net,
    "MobileNetV2": functools.partial(application, "MobileNetV2"),
    "ResNet50": functools.partial(application, "ResNet50"),
}

# Deep nets are chaotic: at higher rates, another order of the examples alone makes a difference of
# 1e-2 after ten updates.
LEARNING_RATES = {"MobileNetV2": 1e-4, "ResNet50": 1e-5}


def made(make_net, seed=0, **kwargs):
    keras.utils.set_random_seed(seed)
    return make_net(**kwargs)


def prepared(way, net, micro_batch_size):
    """The net as it is trained in one of `WAYS`."""
    if way == LARGE:
        return net
    if way in (ACCUM, GROUP):
        net = swap_batch_norm(net, to={ACCUM: "accum", GROUP: "group"}[way])
    batch_norm = "exact" if way == EXACT else "micro_batch"
    return GradientAccumulateModel(
        model=net, micro_batch_size=micro_batch_size, batch_norm=batch_norm
    )


def compile_for(model, optimizer):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def random_images(examples, size, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, size, size, 3)).astype(keras.config.floatx())
    return x, rng.integers(CLASSES, size=examples)


# What training reaches.


def accuracies(way, seed, options):
    """Validation accuracy after each epoch on handwritten digits."""
    images, digits = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype("float32")
    order = np.random.default_rng(seed).permutation(len(images))
    training, validation = order[:-360], order[-360:]
    training = training[: len(training) // options.batch_size * options.batch_size]
    model = prepared(way, made(six_norms, seed), options.accuracy_micro_batch_size)
    compile_for(model, keras.optimizers.SGD(0.05, momentum=0.9))
    return model.fit(
        images[training],
        digits[training],
        batch_size=options.batch_size,
        epochs=options.epochs,
        validation_data=(images[validation], digits[validation]),
        verbose=0,
    ).history["val_accuracy"]


def measure_accuracy(options):
    return {
        way: [
            _common.in_own_process(accuracies, way, seed, options) for seed in range(options.seeds)
        ]
        for way in options.ways
    }


def accuracy_table(measured, options):
    epochs = sorted({1, max(1, options.epochs // 4), max(1, options.epochs // 2), options.epochs})
    rows = [["validation accuracy after", *(f"{n} epochs" for n in epochs)]]
    for way, runs in measured.items():
        cells = [[100 * run[n - 1] for run in runs] for n in epochs]
        rows.append([way, *(f"{np.mean(cell):.1f} % (sd {np.std(cell):.1f})" for cell in cells)])
    return rows


# How exact it is.


def distances(name, optimizer, options):
    """How far weights are from the large batch's after one and after ten updates, in float64.

    Returns:
        Dict by number of updates, each with two distances: of exact batch norm, and of the large
        batch with its examples in another order. And how far the trainable weights moved.
    """
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    x, y = random_images(options.equality_batch_size, options.size)
    order = np.random.default_rng(1).permutation(len(x))
    weights = {1: [], 10: []}
    for way, i in ((LARGE, slice(None)), (EXACT, slice(None)), (LARGE, order)):
        model = prepared(
            way, made(NETS[name], size=options.size), options.equality_micro_batch_size
        )
        start = [v.numpy() for v in model.trainable_variables]
        rate = LEARNING_RATES.get(name, 1e-2)
        compile_for(model, getattr(keras.optimizers, optimizer)(rate))
        for update in range(1, 11):
            model.train_on_batch(x[i], y[i])
            if update in weights:
                weights[update].append(model.get_weights())
    movement = _common.largest_difference(start, [v.numpy() for v in model.trainable_variables])
    far = {
        n: [_common.largest_difference(runs[0], run) for run in runs[1:]]
        for n, runs in weights.items()
    }
    return far, movement


def measure_equality(options):
    return {
        f"{name}, {optimizer}": _common.in_own_process(distances, name, optimizer, options)
        for name in options.nets
        for optimizer in ("SGD", "Adam")
    }


def equality_table(measured):
    rows = [
        ["largest difference of a weight after", "1 update", "10 updates", "weights moved by"],
    ]
    for case, (far, movement) in measured.items():
        cells = [f"{exact:.0e} ({control:.0e})" for exact, control in far.values()]
        rows.append([case, *cells, f"{movement:.0e}"])
    return rows


# What it costs.


def measure_time(options):
    """Seconds of each timed step, by net and way; and seconds of the first step."""
    return {name: _common.in_own_process(times, name, options) for name in options.nets}


def times(name, options):
    x, y = map(tf.constant, random_images(options.batch_size, options.size))
    epochs, first = {}, {}
    for way in options.ways:
        net = made(NETS[name], size=options.size)
        model = compile_for(
            prepared(way, net, options.micro_batch_size), keras.optimizers.SGD(1e-3)
        )
        dataset = _common.batches_of(
            options.batch_size, tf.concat([x] * options.steps, 0), tf.concat([y] * options.steps, 0)
        )
        epochs[way] = functools.partial(model.fit, dataset, verbose=0)
        train_step, tracing = model.train_step, []

        def traced(data, train_step=train_step, tracing=tracing):
            begin = time.perf_counter()  # Python runs it only when it is traced
            logs = train_step(data)
            tracing.append(time.perf_counter() - begin)
            return logs

        model.train_step = traced
        begin = time.perf_counter()
        model.fit(dataset.take(1), verbose=0)
        first[way] = sum(tracing), time.perf_counter() - begin
        epochs[way]()
    return _common.time_in_turn(epochs, options.repeats), first


def time_table(measured):
    rows = [["step time over that of Keras's batch norm", *measured]]
    ways = list(next(iter(measured.values()))[0])
    for way in ways:
        rows.append([way, *(_common.ratio_cell(s[way], s[MICRO]) for s, _ in measured.values())])
    for way in (LARGE, EXACT):
        found = [first[way] for _, first in measured.values() if way in first]
        for what, i in (("trace the step", 0), ("trace and run the first step", 1)):
            rows.append([f"seconds to {what}, {way}", *(f"{seconds[i]:.1f}" for seconds in found)])
    return rows


def peak(name, way, batch_size, options):
    """Bytes that a training step holds at its peak, and that its graph takes in the process."""
    x, y = map(tf.constant, random_images(batch_size, options.size))
    net = made(NETS[name], size=options.size)
    model = compile_for(prepared(way, net, options.micro_batch_size), keras.optimizers.SGD(1e-3))
    meter = _meters.find_meter()
    begin = meter.now()
    model.train_on_batch(x, y)  # traces and compiles
    gc.collect()
    meter.restart()
    before = meter.now()
    model.train_on_batch(x, y)
    return meter.peak() - before, before - begin


def measure_memory(options):
    with _common.environment(_meters.GIVES_BACK):
        return {
            name: {
                way: [
                    _common.in_own_process(peak, name, way, n, options)
                    for n in options.memory_batch_sizes
                ]
                for way in options.ways
            }
            for name in options.nets
        }


def slope(sizes, peaks):
    """Bytes per example of the effective batch."""
    return np.polyfit(sizes, peaks, 1)[0]


def memory_table(measured, options):
    sizes = options.memory_batch_sizes
    header = ["peak MB of a step, effective batch", *map(str, sizes)]
    rows = [[*header, "MB per example", "of large batch's", "MB of the graph"]]
    for name, ways in measured.items():
        large, _ = zip(*ways[LARGE], strict=True)
        for way, found in ways.items():
            peaks, graphs = zip(*found, strict=True)
            share = slope(sizes, peaks) / slope(sizes, large)
            cells = [f"{bytes_ / 1e6:.0f}" for bytes_ in peaks]
            cells += [f"{slope(sizes, peaks) / 1e6:.2f}", f"{100 * share:.0f} %"]
            rows.append([f"{name}, {way}", *cells, f"{np.median(graphs) / 1e6:.0f}"])
    return rows


# The report.


def plot_accuracy(measured, path):
    """Mean accuracy over epochs, with the range over the seeds."""
    styles = ("-", "--", "-.", ":", (0, (1, 3)))
    with _common.picture(path, (7, 4.5)) as (_, panels):
        panel = panels[0][0]
        for (way, runs), style in zip(measured.items(), styles, strict=False):
            runs = 100 * np.array(runs)
            epochs = np.arange(1, runs.shape[1] + 1)
            (line,) = panel.plot(epochs, runs.mean(0), linestyle=style, label=way)
            panel.fill_between(epochs, runs.min(0), runs.max(0), alpha=0.15, color=line.get_color())
        panel.set(xlabel="epoch", ylabel="validation accuracy (%)")
        panel.legend()


def plot_memory(measured, options, path):
    """Peak memory against the effective batch, a panel for each net."""
    size = (3.2 * len(measured), 3.6)
    with _common.picture(path, size, columns=len(measured)) as (figure, panels):
        for panel, (name, ways) in zip(panels[0], measured.items(), strict=True):
            for way, marker in zip(ways, "os^vx", strict=False):
                peaks = [bytes_ / 1e6 for bytes_, _ in ways[way]]
                panel.plot(options.memory_batch_sizes, peaks, marker=marker, label=way)
            panel.set(title=name, xlabel="effective batch", ylim=(0, None))
        panels[0][0].set_ylabel("peak memory of a step (MB)")
        _common.legend_below(figure, 3)


def setting(options):
    return (
        f"{_common.machine()}. Accuracy: effective batch {options.batch_size}, micro-batch "
        f"{options.accuracy_micro_batch_size}, {options.seeds} seeds. Time and memory: images of "
        f"{options.size} x {options.size}, micro-batch {options.micro_batch_size}; time at "
        f"effective batch {options.batch_size}, ratio of the medians of {options.repeats} epochs "
        f"in turn, in brackets the quartiles. Equality: batch {options.equality_batch_size}, "
        f"micro-batch {options.equality_micro_batch_size}, float64; in brackets the large batch "
        "with its examples in another order."
    )


def parse(argv):
    parser = _common.make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--accuracy-micro-batch-size", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="height and width of images")
    parser.add_argument("--equality-batch-size", type=int, default=8)
    parser.add_argument("--equality-micro-batch-size", type=int, default=3)
    parser.add_argument("--memory-batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--steps", type=int, default=2, help="updates in a timed epoch")
    parser.add_argument("--repeats", type=int, default=7)
    _common.add_outputs(parser, "what was measured", "the accuracies")
    parser.add_argument("--memory-plot", metavar="FILE", help="draw the peak memory")
    options = parser.parse_args(argv)
    if "memory" in options.parts:
        _meters.check_meter(parser)
    return options


def main(argv=None):
    options = parse(argv)
    print(setting(options), flush=True)
    measure = {
        "accuracy": measure_accuracy,
        "equality": measure_equality,
        "time": measure_time,
        "memory": measure_memory,
    }
    tables = {
        "accuracy": lambda measured: accuracy_table(measured, options),
        "equality": equality_table,
        "time": time_table,
        "memory": lambda measured: memory_table(measured, options),
    }
    results = {}
    for part in options.parts:
        results[part] = measure[part](options)
        print(f"\n{_common.markdown(tables[part](results[part]))}", flush=True)
    _common.write_json(options.json, setting=setting(options), **results)
    if options.plot and "accuracy" in results:
        plot_accuracy(results["accuracy"], options.plot)
    if options.memory_plot and "memory" in results:
        plot_memory(results["memory"], options, options.memory_plot)
    return results


if __name__ == "__main__":
    main()
