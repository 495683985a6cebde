"""A loss over the effective batch: peak memory, time and error of NT-Xent in micro-batches.

    python -m benchmarks.coupled_loss
    python -m benchmarks.coupled_loss --parts memory --effective-batches 64 256 --plot memory.png

A convolutional encoder sees two views of each image, and NT-Xent (Chen et al. 2020) compares all
views of a batch. Three parts: `error` compares weights with the large batch's after one update,
`memory` finds each way's peak in a process of its own, as in benchmarks/batch_norm.py, and `time`
takes steps in turn in one process.
"""

import functools
import gc

import keras
import numpy as np
import tensorflow as tf

from benchmarks import _common, _meters
from gradient_accumulator_tf import GradientAccumulateModel

LARGE = "large batch"
ORDINARY = "coupled_loss=False"
COUPLED = "coupled_loss=True"
WAYS = (LARGE, ORDINARY, COUPLED)
ALONE = "the loss alone"
PARTS = ("error", "memory", "time")
DIMENSIONS = 64
# What the memory and the time of `coupled_loss` may be over those of ordinary accumulation.
MOST_MEMORY, MOST_TIME = 1.15, 1.4


def nt_xent(y_true, y_pred, temperature=0.5):
    """Each of the views (examples, 2, dimensions) is to find the other one; a value for each."""
    del y_true
    views = tf.math.l2_normalize(tf.concat([y_pred[:, 0], y_pred[:, 1]], 0), axis=1)
    number = tf.shape(views)[0]
    itself = tf.eye(number, dtype=views.dtype)
    logits = tf.matmul(views, views, transpose_b=True) / temperature - 1e9 * itself
    partner = tf.roll(tf.range(number), number // 2, 0)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(partner, logits)


def build_net(size, filters):
    """Convolutions, each with twice the filters at half the size, shared by two inputs."""
    keras.utils.set_random_seed(0)
    images = x = keras.Input((size, size, 3))
    for factor in (1, 2, 4):
        x = keras.layers.Conv2D(factor * filters, 3, padding="same", activation="tanh")(x)
        x = keras.layers.AveragePooling2D(2)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    encoder = keras.Model(images, keras.layers.Dense(DIMENSIONS)(x))
    views = [keras.Input((size, size, 3)) for _ in range(2)]
    return keras.Model(views, keras.ops.stack([encoder(view) for view in views], axis=1))


def compiled(way, options):
    model = build_net(options.size, options.filters)
    if way != LARGE:
        model = GradientAccumulateModel(
            model=model,
            micro_batch_size=options.micro_batch_size,
            coupled_loss=way == COUPLED,
        )
    model.compile(keras.optimizers.SGD(0.1), nt_xent, jit_compile=options.jit)
    return model


def views_of_images(examples, size):
    """Two views of random images, as a tuple, and targets that nothing reads."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(examples, size, size, 3)).astype(keras.config.floatx())
    views = tuple(
        tf.constant(images + 0.3 * rng.normal(size=images.shape).astype(images.dtype))
        for _ in range(2)
    )
    return views, tf.zeros((examples, 1))


# How exact it is.


def weights_after_an_update(way, examples, options):
    """Weights before and after an update."""
    model = compiled(way, options)
    before = model.get_weights()
    model.train_on_batch(*views_of_images(examples, options.size))
    return before, model.get_weights()


def measure_error(options):
    """Dict by effective batch of each way's largest difference from it, over its movement."""
    errors = {}
    for examples in options.error_batches:
        runs = {
            way: _common.in_own_process(weights_after_an_update, way, examples, options)
            for way in WAYS
        }
        before, large = runs[LARGE]
        movement = _common.largest_difference(before, large)
        errors[examples] = {
            way: _common.largest_difference(runs[way][1], large) / movement for way in WAYS[1:]
        }
    return errors


def error_table(errors):
    rows = [["error over movement after an update", *map(str, errors)]]
    for way in WAYS[1:]:
        rows.append([way, *(f"{by_way[way]:.0e}" for by_way in errors.values())])
    return rows


# What it costs.


def peak(way, examples, options):
    """Bytes that a training step holds at its peak, above what was held before it."""
    x, y = views_of_images(examples, options.size)
    model = compiled(way, options)
    return peak_of(lambda: model.train_on_batch(x, y))


def peak_of_loss(examples):
    """Bytes that the loss and its derivative need by themselves, on the outputs of all examples."""
    outputs = tf.random.stateless_normal((examples, 2, DIMENSIONS), (1, 2))

    @tf.function
    def derivative(outputs):
        return tf.gradients(tf.reduce_mean(nt_xent(None, outputs)), outputs)

    return peak_of(lambda: derivative(outputs))


def peak_of(step):
    meter = _meters.find_meter()
    step()  # traces and compiles
    gc.collect()
    meter.restart()
    before = meter.now()
    step()
    return meter.peak() - before


def measure_memory(options):
    """Dict by way of a dict of bytes by effective batch, and the same of the loss alone."""
    measured = {way: {} for way in (*WAYS, ALONE)}
    with _common.environment(_meters.GIVES_BACK):
        for examples in options.effective_batches:
            for way in WAYS:
                _common.progress(f"memory, {way}, {examples}")
                # A process now and then holds what it could give back; the least is what it needs.
                measured[way][examples] = min(
                    _common.in_own_process(peak, way, examples, options)
                    for _ in range(options.processes)
                )
            measured[ALONE][examples] = _common.in_own_process(peak_of_loss, examples)
    return measured


def memory_table(measured):
    rows = [["peak MB of a step, effective batch", *map(str, measured[LARGE])]]
    for way, peaks in measured.items():
        rows.append([way, *(f"{bytes_ / 1e6:.0f}" for bytes_ in peaks.values())])
    return rows


def measure_time(options):
    """Dict by effective batch of the seconds of each way's timed steps."""
    return {
        examples: _common.in_own_process(times, examples, options)
        for examples in options.effective_batches
    }


def times(examples, options):
    x, y = views_of_images(examples, options.size)
    steps = {}
    for way in WAYS:
        _common.progress(f"time, {way}, {examples}")
        steps[way] = functools.partial(compiled(way, options).train_on_batch, x, y)
        steps[way]()
    return _common.time_in_turn(steps, options.repeats)


def time_table(measured):
    rows = [["step time over that of ordinary accumulation", *map(str, measured)]]
    for way in WAYS:
        cells = (
            _common.ratio_cell(seconds[way], seconds[ORDINARY]) for seconds in measured.values()
        )
        rows.append([way, *cells])
    medians = (np.median(seconds[ORDINARY]) for seconds in measured.values())
    rows.append([f"seconds of {ORDINARY}", *(f"{median:.2f}" for median in medians)])
    return rows


# The report.


def rules(results):
    """Lines that say whether the limits hold."""
    lines = []
    for examples in results.get("memory", {}).get(LARGE, ()):
        peaks = {way: by_size[examples] for way, by_size in results["memory"].items()}
        share = peaks[COUPLED] / peaks[ORDINARY]
        # What any way needs to compute the loss of all examples is not the accumulation's.
        alone = peaks[ALONE] / peaks[ORDINARY]
        holds = "yes" if share - alone <= MOST_MEMORY else "no"
        lines.append(
            f"{examples}: peak within {MOST_MEMORY} of ordinary accumulation, the loss by itself "
            f"apart? {holds} ({share:.2f}, the loss {alone:.2f})"
        )
    for examples, seconds in results.get("time", {}).items():
        share, _, _ = _common.ratio(seconds[COUPLED], seconds[ORDINARY])
        holds = "yes" if share <= MOST_TIME else "no"
        lines.append(
            f"{examples}: time within {MOST_TIME} of ordinary accumulation? {holds} ({share:.2f})"
        )
    return "\n".join(lines)


def plot(results, path):
    """A panel each of memory and of time over the effective batch."""
    parts = [part for part in ("memory", "time") if part in results]
    with _common.picture(path, (5 * len(parts), 3.8), columns=len(parts)) as (figure, panels):
        for panel, part in zip(panels[0], parts, strict=True):
            draw = {"memory": draw_memory, "time": draw_time}[part]
            draw(panel, results[part])
            panel.set(xscale="log", xlabel="effective batch")
            sizes = list(results["memory"][LARGE] if part == "memory" else results["time"])
            panel.set_xticks(sizes, sizes)
            panel.minorticks_off()
        _common.legend_below(figure, len(WAYS))


STYLES = dict(zip(WAYS, ("o-", "s-", "^--"), strict=True))
COLORS = dict(zip(WAYS, ("#b8c4d0", "#d1495b", "#0b6e99"), strict=True))


def draw_memory(panel, measured):
    for way in WAYS:
        megabytes = [bytes_ / 1e6 for bytes_ in measured[way].values()]
        panel.plot(list(measured[way]), megabytes, STYLES[way], color=COLORS[way], label=way)
    panel.set(title="Peak memory of a step (MB)", yscale="log")


def draw_time(panel, measured):
    for way in WAYS:
        ratios = [_common.ratio(s[way], s[ORDINARY])[0] for s in measured.values()]
        panel.plot(list(measured), ratios, STYLES[way], color=COLORS[way], label=way)
    panel.axhline(MOST_TIME, color="black", linewidth=0.8, linestyle=":")
    panel.set(title="Time of a step over ordinary accumulation's", ylim=(0, None))


def setting(options):
    return (
        f"{_common.machine()}. Images of {options.size} x {options.size}, two views, "
        f"{options.filters} filters in the first of three convolutions; micro-batches of "
        f"{options.micro_batch_size}; {'with' if options.jit else 'without'} XLA. Memory: the "
        f"least of {options.processes} processes. Time: ratio of the medians of {options.repeats} "
        "steps in turn, in brackets the quartiles."
    )


def parse(argv):
    parser = _common.make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--effective-batches", nargs="+", type=int, default=[64, 256, 1024], metavar="N"
    )
    parser.add_argument("--error-batches", nargs="+", type=int, default=[64, 256], metavar="N")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="height and width of images")
    parser.add_argument("--filters", type=int, default=32, help="of the first convolution")
    parser.add_argument("--processes", type=int, default=2, help="for each figure of memory")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps")
    parser.add_argument("--jit", action="store_true", help="compile with XLA")
    _common.add_outputs(parser, "what was measured", "memory and time")
    options = parser.parse_args(argv)
    sizes = (options.micro_batch_size, options.filters, options.processes, options.repeats)
    if min(sizes) < 1 or options.size < 8:
        parser.error("sizes and numbers must be at least 1, and --size at least 8")
    if "memory" in options.parts:
        _meters.check_meter(parser)
    return options


def main(argv=None):
    """Measures, prints, and returns a dict with what each part has found."""
    options = parse(argv)
    print(setting(options), flush=True)
    measure = {"error": measure_error, "memory": measure_memory, "time": measure_time}
    tables = {"error": error_table, "memory": memory_table, "time": time_table}
    results = {}
    for part in options.parts:
        results[part] = measure[part](options)
        print(f"\n{_common.markdown(tables[part](results[part]))}", flush=True)
    print(f"\n{rules(results)}")
    _common.write_json(options.json, setting=setting(options), **results)
    if options.plot and {"memory", "time"} & set(results):
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
