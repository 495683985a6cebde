"""Shared by the benchmarks: processes, runs in turn, ratios with their spread, tables, files."""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

# Arguments.


def make_parser(docstring):
    """The parser of a benchmark, described by the first line of its docstring."""
    return argparse.ArgumentParser(description=docstring.splitlines()[0])


def add_outputs(parser, measured, drawn="the tables"):
    """Adds `--json` and `--plot`, the files that a benchmark can write.

    Args:
        parser: The benchmark's parser.
        measured: What `--json` writes, for the help.
        drawn: What `--plot` draws, for the help.
    """
    parser.add_argument("--json", metavar="FILE", help=f"write {measured}")
    parser.add_argument("--plot", metavar="FILE", help=f"draw {drawn}; needs matplotlib")


# Measurements.


def progress(text):
    """Says on the error output what is being measured."""
    print(f"measuring {text}", file=sys.stderr, flush=True)


def in_own_process(function, *args):
    """`function(*args)`, computed in a new process that ends with it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@contextlib.contextmanager
def environment(variables):
    """Sets environment variables for the processes that start within the context."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def batches_of(size, x, y):
    """A dataset of the examples in batches, of unknown size as in `fit` on arrays.

    It costs as little as possible, because its time is part of what is measured.
    """
    x, y = tf.constant(x), tf.constant(y)

    def batch(i):
        return x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]

    # With autotuning the end of an epoch can wait for its next turn, 10 ms x (2^k - 1) after the
    # epoch's start: times are then rounded up to one of 150, 310, 630, 1270 ms and so on.
    options = tf.data.Options()
    options.autotune.enabled = False
    return tf.data.Dataset.range(len(x) // size).map(batch).with_options(options)


def in_turn(names, repeat):
    """List of the names, which starts with another one in each repeat."""
    names = list(names)
    first = repeat % len(names)
    return names[first:] + names[:first]


def time_in_turn(functions, repeats):
    """Seconds of each call: dict by name of `repeats` calls of each function, interleaved."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats):
        for name in in_turn(functions, repeat):
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds, base):
    """Median of `seconds` over the median of `base`, and the same of the two quartiles."""
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75]) / statistics.median(base)
    return middle, low, high


def largest_difference(arrays, others):
    """The largest difference of two numbers at the same place: 0.0 without any, NaN with a NaN."""
    differences = [np.max(np.abs(a - b), initial=0.0) for a, b in zip(arrays, others, strict=True)]
    return float(np.max(differences, initial=0.0))


# Reports.


def machine():
    """The versions and devices of this machine, in a few words."""
    gpus = tf.config.list_physical_devices("GPU")
    names = Counter(
        tf.config.experimental.get_device_details(gpu).get("device_name", "unknown") for gpu in gpus
    )
    kinds = ", ".join(f"{count} GPU ({name})" for name, count in names.items())
    return (
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} CPU cores, "
        f"{kinds or 'no GPU'}"
    )


def markdown(rows):
    """Markdown table of rows of text, the first of which are the headings."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ratio_cell(seconds, base):
    """A table's cell: the ratio of the medians, in brackets the quartiles."""
    return "{:.2f} ({:.2f}-{:.2f})".format(*ratio(seconds, base))


def write_json(path, **contents):
    """Writes what was measured; writes nothing if no path was given."""
    if path:
        Path(path).write_text(json.dumps(contents, indent=1))


@contextlib.contextmanager
def picture(path, size, rows=1, columns=1, **kwargs):
    """Yields a figure and an array (rows, columns) of its panels, and saves it at the end.

    Args:
        path: The file to write.
        size: Width and height in inches.
        rows: Rows of panels.
        columns: Columns of panels.
        **kwargs: For matplotlib's `Figure.subplots`.
    """
    import matplotlib  # the tables need no matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **kwargs)
        figure.savefig(path, dpi=120)


def legend_below(figure, ncols):
    """One legend for all panels, with each label once."""
    handles = {}
    for panel in figure.axes:
        handles.update(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=ncols, fontsize="small"
    )
