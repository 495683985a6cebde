"""Peak memory of each way to train on an effective batch.

    python -m benchmarks.memory
    python -m benchmarks.memory --tables updates --json memory.json --plot memory.png

Each measurement has a process of its own, which trains an epoch to trace and compile, and is
measured in the second. On a GPU it is what TensorFlow's allocator held there at the most. Where
there is none it is what the process held (Linux only), with oneDNN off, whose allocator keeps
what is freed.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from benchmarks import overhead
from benchmarks.overhead import BUILT_IN, LARGE, PLAIN, machine, markdown
from examples.digits import in_own_process

RIVALS = (
    PLAIN,
    LARGE,
    BUILT_IN,
    overhead.LOOP,
    overhead.TENSOR_LOOP,
    overhead.OPTIMIZER,
    overhead.ACROSS_STEPS,
    overhead.WITHIN_STEP,
)
OPTIMIZERS = {"SGD": overhead.SGD, "Adam": overhead.ADAM}
SMALL = 4  # width of the nets that show what a program itself takes

# The C library then asks the system for each large block, and gives it back when it is freed.
GIVES_BACK = {"TF_ENABLE_ONEDNN_OPTS": "0", "MALLOC_MMAP_THRESHOLD_": "1000000"}


# The nets: one whose parameters weigh the most, and one whose activations do.


def dense_case(width, layers, optimizer):
    """`layers` dense layers of one width: `4 * layers * width**2` bytes of parameters."""
    return overhead.dense_case(OPTIMIZERS[optimizer], 0, width, *[width] * layers)


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
            layers.Dense(overhead.CLASSES),
        ]
    )


def conv_case(width, optimizer):
    return overhead.Case(
        functools.partial(conv_net, width),
        OPTIMIZERS[optimizer],
        lambda rng, examples: rng.normal(size=(examples, 64, 64, 1)).astype("float32"),
        steps=0,
    )


# The measurement, in a process of its own.


class Meter(NamedTuple):
    """Bytes held now, at the most since `restart`, and a function that makes now the most."""

    now: Callable
    peak: Callable
    restart: Callable


def device_meter(device):
    """Of the tensors on a device."""
    memory = tf.config.experimental
    return Meter(
        lambda: memory.get_memory_info(device)["current"],
        lambda: memory.get_memory_info(device)["peak"],
        lambda: memory.reset_memory_stats(device),
    )


def process_meter():
    """Of all that this process holds."""

    def held(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def restart():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    return Meter(lambda: held("VmRSS:"), lambda: held("VmHWM:"), restart)


def find_meter():
    gpus = tf.config.list_logical_devices("GPU")
    return device_meter(gpus[0].name.removeprefix("/device:")) if gpus else process_meter()


def check_meter(parser):
    """Ends with the parser's error where memory cannot be measured."""
    if not tf.config.list_physical_devices("GPU") and not Path("/proc/self/clear_refs").exists():
        parser.error("without a GPU memory can be measured on Linux only")


def measure(make_case, width, rival, micro_batch_size, accum_steps, jit):
    """Bytes that training takes at its peak, and bytes of a float32 copy of the parameters.

    Without what the program itself takes: that is what a second training of the same net adds,
    with layers so small that they weigh nothing.
    """
    meter = find_meter()

    def rival_of(width):
        case, rng = make_case(width), np.random.default_rng(0)
        x = case.inputs(rng, 2 * accum_steps * micro_batch_size)
        y = rng.integers(overhead.CLASSES, size=len(x))
        batches = [
            overhead.batches_of(size, x, y)
            for size in (micro_batch_size, micro_batch_size * accum_steps)
        ]
        makers = overhead.rival_makers(case, *batches, micro_batch_size, accum_steps, jit)
        return makers[rival]()

    def train(width):
        # Data that is not trained with must be gone before memory is looked at.
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


@contextlib.contextmanager
def environment(variables):
    """Sets environment variables, for processes started meanwhile."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure_apart(*args):
    with environment(GIVES_BACK):
        return in_own_process(measure, *args)


def measure_updates(options):
    """Peak bytes by column and rival, and the bytes of the parameters."""
    measured = {}
    for optimizer in options.optimizers:
        make_case = functools.partial(dense_case, layers=options.layers, optimizer=optimizer)
        for jit in options.jit:
            column = measured[f"{optimizer}, jit {jit}"] = {}
            for rival in RIVALS:
                if rival == LARGE:
                    continue  # its activations weigh next to nothing here
                print(f"measuring {rival}: {optimizer}, jit {jit}", file=sys.stderr, flush=True)
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
                print(f"measuring {rival}: batch {batch}", file=sys.stderr, flush=True)
                row[batch], _ = measure_apart(
                    make_case, options.filters, rival, micro_batch_size, accum_steps, False
                )
    return measured


# The report.


def copies(measured):
    """By column and rival, float32 copies of the parameters that the peak is above plain fit's."""
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
    return markdown(rows)


def batches_table(measured):
    def cell(peak):
        return "-" if peak is None else f"{peak / 1e6:.0f}"

    rows = [["", *map(str, next(iter(measured.values())))]]
    rows += [[rival, *map(cell, row.values())] for rival, row in measured.items()]
    return markdown(rows)


def plot(results, path):
    """Lines of peak over effective batch, and bars of copies above plain fit."""
    from matplotlib.figure import Figure  # not needed for the tables

    figure = Figure(figsize=(6 * len(results), 5), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    colors = {rival: f"C{i}" for i, rival in enumerate(RIVALS)}
    styles = dict(zip(RIVALS, ("k:", "-", "--", "-.", ":", "-", "--", "-"), strict=True))
    for panel, (name, measured) in zip(panels, results.items(), strict=True):
        if name == "batches":
            for rival, row in measured.items():
                values = [np.nan if p is None else p / 1e6 for p in row.values()]
                style = styles[rival].replace("k", "")
                panel.plot(list(row), values, style, marker="o", color=colors[rival], label=rival)
            panel.set(xscale="log", yscale="log", xlabel="effective batch", ylabel="peak, MB")
            panel.set_xticks(list(row), list(row), minor=False)
            panel.minorticks_off()
            panel.set_title("Convolutions, growing effective batch")
        else:
            above = copies(measured)
            rivals = [rival for rival in next(iter(above.values())) if rival != PLAIN]
            width = 0.8 / len(rivals)
            for i, rival in enumerate(rivals):
                places = np.arange(len(above)) + (i - (len(rivals) - 1) / 2) * width
                heights = [column[rival] for column in above.values()]
                panel.bar(places, heights, width, color=colors[rival], label=rival)
            panel.axhline(1, color="black", linewidth=0.8)
            panel.set_xticks(range(len(above)), list(above))
            panel.set(ylabel="copies of the parameters", title="Dense layers, peak above plain fit")
        panel.spines[["top", "right"]].set_visible(False)
    handles = {}
    for panel in panels:
        handles.update(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    columns = 2 if len(results) == 1 else 3
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=columns, fontsize="small"
    )
    figure.savefig(path, dpi=120)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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
    parser.add_argument("--json", metavar="FILE", help="write the bytes that were measured")
    parser.add_argument("--plot", metavar="FILE", help="draw the tables; needs matplotlib")
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
    check_meter(parser)
    return options


def main(argv=None):
    """Measures, prints, and returns a dict with what each table was made of."""
    options = parse(argv)
    print(machine(), flush=True)
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
    if options.json:
        Path(options.json).write_text(
            json.dumps({"setting": machine(), "options": vars(options), **results}, indent=1)
        )
    if options.plot:
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
