"""Peak memory of each way to train on an effective batch.

    python -m benchmarks.memory
    python -m benchmarks.memory --tables updates --json memory.json --plot memory.png

Each measurement has a process of its own. Its first epoch traces and compiles, its second is
measured. On a GPU the peak is that of TensorFlow's allocator. Without a GPU it is that of the
process (Linux only), and oneDNN is off, because its allocator keeps what is freed.
"""

import functools
import gc

import keras
import numpy as np

from benchmarks import _common, _meters, _rivals
from benchmarks._rivals import BUILT_IN, LARGE, LOOP, OURS, PLAIN, TENSOR_LOOP

RIVALS = (PLAIN, LARGE, BUILT_IN, LOOP, TENSOR_LOOP, *OURS)
# In the pictures.
COLORS = {rival: f"C{i}" for i, rival in enumerate(RIVALS)}
LINES = dict(zip(RIVALS, (":", "-", "--", "-.", ":", "-", "--", "-"), strict=True))

OPTIMIZERS = {"SGD": _rivals.SGD, "Adam": _rivals.ADAM}
SMALL = 4  # width of the nets that show what a program itself takes

# The nets: one with most memory in parameters, one with most in activations.


def dense_case(width, layers, optimizer):
    """`layers` dense layers of one width: `4 * layers * width**2` bytes of parameters."""
    return _rivals.dense_case(OPTIMIZERS[optimizer], 0, width, *[width] * layers)


def conv_net(width):
    """Two convolutions on images of 64 x 64."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((64, 64, 1)),
            layers.Conv2D(width, 3, padding="same", activation="relu"),
            layers.AveragePooling2D(2),
            layers.Conv2D(2 * width, 3, padding="same", activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(_rivals.CLASSES),
        ]
    )


def conv_case(width, optimizer):
    return _rivals.Case(
        functools.partial(conv_net, width),
        OPTIMIZERS[optimizer],
        lambda rng, examples: rng.normal(size=(examples, 64, 64, 1)).astype("float32"),
        steps=0,
    )


# The measurement, in a process of its own.


def measure(make_case, width, rival, micro_batch_size, accum_steps, jit):
    """Bytes that training takes at its peak, and bytes of a float32 copy of the parameters.

    The memory of the program itself is not in it. That is measured as what a second training adds
    with layers so small that they take next to nothing.
    """
    meter = _meters.find_meter()

    def rival_of(width):
        case, rng = make_case(width), np.random.default_rng(0)
        x = case.inputs(rng, 2 * accum_steps * micro_batch_size)
        y = rng.integers(_rivals.CLASSES, size=len(x))
        batches = [
            _common.batches_of(size, x, y)
            for size in (micro_batch_size, micro_batch_size * accum_steps)
        ]
        makers = _rivals.rival_makers(case, *batches, micro_batch_size, accum_steps, jit)
        return makers[rival]()

    def train(width):
        # Data that is not needed for training must be freed before memory is read.
        made = rival_of(width)
        made.train_epoch()
        gc.collect()
        meter.restart()
        return made, meter.now()

    _first, before = train(SMALL)  # the first one also loads libraries
    _second, after = train(SMALL)
    program = after - before
    made, _ = train(width)
    made.train_epoch()
    parameters = sum(4 * int(np.prod(v.shape)) for v in made.model.trainable_variables)
    return meter.peak() - after - program, parameters


def measure_apart(*args):
    with _common.environment(_meters.GIVES_BACK):
        return _common.in_own_process(measure, *args)


def measure_updates(options):
    """Peak bytes by column and rival, and the bytes of the parameters."""
    measured = {}
    for optimizer in options.optimizers:
        make_case = functools.partial(dense_case, layers=options.layers, optimizer=optimizer)
        for jit in options.jit:
            column = measured[f"{optimizer}, jit {jit}"] = {}
            for rival in RIVALS:
                if rival == LARGE:
                    continue  # its activations take next to nothing here
                _common.progress(f"{rival}: {optimizer}, jit {jit}")
                column[rival], parameters = measure_apart(
                    make_case,
                    options.width,
                    rival,
                    options.micro_batch_size,
                    options.accum_steps,
                    jit == "on",
                )
    return {"peak": measured, "parameters": parameters}


def measure_batches(options):
    """Peak bytes by rival and effective batch; None where a rival cannot train so."""
    micro_batch_size, measured = options.micro_batch_size, {}
    make_case = functools.partial(conv_case, optimizer="Adam")
    for rival in RIVALS:
        row = measured[rival] = {}
        for batch in options.effective_batches:
            accum_steps = batch // micro_batch_size
            if rival == PLAIN and row:
                row[batch] = next(iter(row.values()))  # it knows nothing of effective batches
            elif rival == BUILT_IN and accum_steps == 1:
                row[batch] = None
            else:
                _common.progress(f"{rival}: batch {batch}")
                row[batch], _ = measure_apart(
                    make_case, options.filters, rival, micro_batch_size, accum_steps, False
                )
    return measured


# The report.


def copies(measured):
    """The peak above plain fit's, in float32 copies of the parameters, by column and rival."""
    return {
        column: {rival: (p - peaks[PLAIN]) / measured["parameters"] for rival, p in peaks.items()}
        for column, peaks in measured["peak"].items()
    }


def updates_table(measured):
    above = copies(measured)
    rivals = list(next(iter(above.values())))
    rows = [["", *above]]
    rows += [[rival, *(f"{column[rival]:.2f}" for column in above.values())] for rival in rivals]
    plain = [peaks[PLAIN] / 1e6 for peaks in measured["peak"].values()]
    rows.append([f"MB of {PLAIN}", *(f"{peak:.0f}" for peak in plain)])
    return _common.markdown(rows)


def batches_table(measured):
    def cell(peak):
        return "-" if peak is None else f"{peak / 1e6:.0f}"

    rows = [["", *map(str, next(iter(measured.values())))]]
    rows += [[rival, *map(cell, row.values())] for rival, row in measured.items()]
    return _common.markdown(rows)


def plot(results, path):
    """Lines of peak over effective batch, and bars of copies above plain fit."""
    draw = {"batches": draw_batches, "updates": draw_updates}
    size = (6 * len(results), 5)
    with _common.picture(path, size, columns=len(results)) as (figure, panels):
        for panel, (name, measured) in zip(panels[0], results.items(), strict=True):
            draw[name](panel, measured)
        _common.legend_below(figure, 2 if len(results) == 1 else 3)


def draw_batches(panel, measured):
    for rival, row in measured.items():
        values = [np.nan if p is None else p / 1e6 for p in row.values()]
        panel.plot(list(row), values, LINES[rival], marker="o", color=COLORS[rival], label=rival)
    panel.set(xscale="log", yscale="log", xlabel="effective batch", ylabel="peak, MB")
    panel.set_xticks(list(row), list(row), minor=False)
    panel.minorticks_off()
    panel.set_title("Convolutions, growing effective batch")


def draw_updates(panel, measured):
    above = copies(measured)
    rivals = [rival for rival in next(iter(above.values())) if rival != PLAIN]
    width = 0.8 / len(rivals)
    for i, rival in enumerate(rivals):
        places = np.arange(len(above)) + (i - (len(rivals) - 1) / 2) * width
        heights = [column[rival] for column in above.values()]
        panel.bar(places, heights, width, color=COLORS[rival], label=rival)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xticks(range(len(above)), list(above))
    panel.set(ylabel="copies of the parameters", title="Dense layers, peak above plain fit")


def parse(argv):
    parser = _common.make_parser(__doc__)
    parser.add_argument(
        "--tables", nargs="+", choices=["updates", "batches"], default=["batches", "updates"]
    )
    parser.add_argument("--jit", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME"
    )
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--accum-steps", type=int, default=4, help="of the table of updates")
    parser.add_argument("--layers", type=int, default=12, help="dense ones, of the same table")
    parser.add_argument("--width", type=int, default=2500, help="of these layers")
    parser.add_argument("--filters", type=int, default=16, help="of the first convolution")
    parser.add_argument(
        "--effective-batches",
        nargs="+",
        type=int,
        default=[8, 16, 32, 64, 128, 256, 512],
        metavar="N",
        help="of the table of batches",
    )
    _common.add_outputs(parser, "the bytes that were measured")
    options = parser.parse_args(argv)
    if min(options.micro_batch_size, options.layers, options.width, options.filters) < 1:
        parser.error("sizes must be at least 1")
    if options.accum_steps < 2:
        parser.error("--accum-steps must be at least 2")
    bad = [n for n in options.effective_batches if n < 1 or n % options.micro_batch_size]
    if bad:
        parser.error(
            f"--effective-batches must be multiples of --micro-batch-size. Received: {bad} and "
            f"{options.micro_batch_size}."
        )
    _meters.check_meter(parser)
    return options


def main(argv=None):
    """Measures, prints, and returns a dict with what each table was made of."""
    options = parse(argv)
    print(_common.machine(), flush=True)
    results = {}
    for name in options.tables:
        if name == "batches":
            measured = results[name] = measure_batches(options)
            print(
                f"\nPeak MB by effective batch, in micro-batches of {options.micro_batch_size}\n",
                batches_table(measured),
                sep="\n",
                flush=True,
            )
        else:
            measured = results[name] = measure_updates(options)
            print(
                f"\nCopies of the parameters ({measured['parameters'] / 1e6:.0f} MB) that the peak "
                f"is above plain fit at the micro-batch\n",
                updates_table(measured),
                sep="\n",
                flush=True,
            )
    _common.write_json(options.json, setting=_common.machine(), options=vars(options), **results)
    if options.plot:
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
