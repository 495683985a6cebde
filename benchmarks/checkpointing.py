"""Memory and time of one update, with three remedies for too much memory, alone and combined.

    python -m benchmarks.checkpointing --json checkpointing.json --plot checkpointing.png

Half precision, gradient checkpointing and accumulation are measured in all combinations, with the
same residual net and the same effective batches, each combination in a process of its own. Memory
is the peak of TensorFlow's allocator, on the first GPU or on a CPU that has a counter.
"""

import itertools
import statistics
import time

import keras
import numpy as np
import tensorflow as tf

from benchmarks import _common, _meters
from gradient_accumulator_tf import GradientAccumulateModel, GradientCheckpoint

SIDE, CLASSES = 64, 10
REMEDIES = ("mixed precision", "checkpointing", "accumulation")
COMBINATIONS = [
    tuple(r for r, is_used in zip(REMEDIES, used, strict=True) if is_used)
    for used in itertools.product([False, True], repeat=3)
]


def residual_block(filters):
    inputs = keras.Input((SIDE, SIDE, filters))
    x = keras.layers.Conv2D(filters, 3, padding="same", activation="tanh")(inputs)
    x = keras.layers.Conv2D(filters, 3, padding="same", activation="tanh")(x)
    return keras.Model(inputs, keras.layers.Add()([inputs, x]))


def build_net(blocks, filters, checkpointing):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((SIDE, SIDE, 3))
    x = keras.layers.Conv2D(filters, 3, padding="same")(x)
    for _ in range(blocks):
        block = residual_block(filters)
        x = GradientCheckpoint(block)(x) if checkpointing else block(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, dtype="float32")(x))


def device():
    gpus = tf.config.list_logical_devices("GPU")
    return gpus[0].name.removeprefix("/device:") if gpus else "CPU:0"


def measure(combination, options):
    """Dict of the peak in bytes, the seconds of each update and the weights after the first."""
    if "mixed precision" in combination:
        keras.config.set_dtype_policy("mixed_bfloat16")
    meter = _meters.device_meter(device())
    rng, batch_size = np.random.default_rng(0), options["batch_size"]
    x = rng.normal(size=(batch_size, SIDE, SIDE, 3)).astype("float32")
    y = rng.integers(CLASSES, size=batch_size)
    before = meter.now()
    model = build_net(options["blocks"], options["filters"], "checkpointing" in combination)
    if "accumulation" in combination:
        model = GradientAccumulateModel(model=model, micro_batch_size=options["micro_batch_size"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=options["jit"])
    first = model.get_weights()
    model.train_on_batch(x, y)
    weights = model.get_weights()
    meter.restart()
    seconds = []
    for _ in range(options["repeats"]):
        begin = time.perf_counter()
        model.train_on_batch(x, y)
        seconds.append(time.perf_counter() - begin)
    return {
        "combination": combination,
        "peak": meter.peak() - before,
        "seconds": seconds,
        "movement": _common.largest_difference(weights, first),
        "weights": weights,
    }


def name_of(result):
    return " + ".join(result["combination"]) or "none"


def table(results):
    rows = [["remedies", "peak MB", "seconds per update", "weight difference"]]
    for result in results:
        rows.append(
            [
                name_of(result),
                f"{result['peak'] / 1e6:.0f}",
                f"{statistics.median(result['seconds']):.2f}",
                f"{result['difference'] / results[0]['movement']:.1e}",
            ]
        )
    return _common.markdown(rows)


def plot(results, path):
    """Bars of memory and of time, a row for each combination."""
    names = [name_of(result) for result in results]
    colors = ["#0b6e99" if "accumulation" in r["combination"] else "#b8c4d0" for r in results]
    values = (
        ("Peak memory, MB", [r["peak"] / 1e6 for r in results], "%.0f"),
        ("Seconds per update", [statistics.median(r["seconds"]) for r in results], "%.2f"),
    )
    with _common.picture(path, (10, 4.2), columns=2, sharey=True) as (_, panels):
        for panel, (title, lengths, form) in zip(panels[0], values, strict=True):
            panel.bar_label(panel.barh(names, lengths, color=colors), fmt=form, padding=3)
            panel.set_title(title)
            panel.margins(x=0.15)
        panels[0][0].invert_yaxis()


def parse(argv):
    parser = _common.make_parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=64, help="the effective batch")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=12, help="residual blocks of the net")
    parser.add_argument("--filters", type=int, default=16, help="of each convolution")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates")
    parser.add_argument("--jit", action="store_true", help="compile with XLA")
    _common.add_outputs(parser, "what was measured", "the table")
    options = parser.parse_args(argv)
    sizes = (options.batch_size, options.micro_batch_size, options.blocks, options.repeats)
    if min(*sizes, options.filters) < 1:
        parser.error("sizes and repeats must be at least 1")
    try:
        _meters.device_meter(device()).now()
    except ValueError:
        parser.error("TensorFlow counts memory on a GPU, or on a CPU with oneDNN; here is neither")
    return options


def main(argv=None):
    """Measures, prints, and returns a list with a dict for each combination."""
    options = parse(argv)
    print(_common.machine(), flush=True)
    results = []
    for combination in COMBINATIONS:
        _common.progress(" + ".join(combination) or "none")
        results.append(_common.in_own_process(measure, combination, vars(options)))
    for result in results:
        result["difference"] = _common.largest_difference(result["weights"], results[0]["weights"])
    for result in results:
        del result["weights"]
    print(f"\n{table(results)}\n\nWeight difference: after one update, by what that moved.")
    _common.write_json(
        options.json, setting=_common.machine(), options=vars(options), results=results
    )
    if options.plot:
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
