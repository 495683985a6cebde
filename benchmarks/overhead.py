"""What accumulating costs: an epoch of each way to do it, over an epoch of plain fit.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --cases dense-1M-SGD --jit on --accum-steps 8 --json times.json

Each case has a process of its own, because TensorFlow gives back little of a model's memory. In it
all rivals train the same model on the same examples, an epoch each in turn, so that a busy moment
of the machine affects all of them. Plain fit updates after every micro-batch. TensorFlow trains on
a GPU if there is one. The first line of the output names the device.
"""

import itertools
import statistics

import keras
import numpy as np

from benchmarks import _common, _rivals
from benchmarks._rivals import BUILT_IN, LARGE, OPTIMIZER, OURS, PLAIN, WITHIN_STEP

TOLERANCE = 1e-4  # what float32 makes of sums in another order, after an epoch

# What should cost no more than what.
RULES = ((OPTIMIZER, PLAIN), (OPTIMIZER, BUILT_IN), (WITHIN_STEP, PLAIN))


# The measurement.


def measure(case, jit, micro_batch_size, accum_steps, steps, repeats):
    """Seconds of each timed epoch, and the error of the weights, both by rival."""
    updates = -(-(steps or case.steps) // accum_steps)
    rng = np.random.default_rng(0)
    x = case.inputs(rng, updates * accum_steps * micro_batch_size)
    y = rng.integers(_rivals.CLASSES, size=len(x))
    makers = _rivals.rival_makers(
        case,
        _common.batches_of(micro_batch_size, x, y),
        _common.batches_of(micro_batch_size * accum_steps, x, y),
        micro_batch_size,
        accum_steps,
        jit,
    )
    rivals = {name: make() for name, make in makers.items()}
    differences = warm_up(rivals, case.reference)
    epochs = {name: rival.train_epoch for name, rival in rivals.items()}
    return _common.time_in_turn(epochs, repeats), differences


def warm_up(rivals, reference):
    """Trains all for an epoch, which traces and compiles.

    Returns:
        The largest difference of a weight from the reference's, by rival that accumulates.
    """
    rivals[reference].train_epoch()
    expected = weights_of(rivals[reference])
    differences = {}
    for name, rival in rivals.items():
        if name == reference:
            continue
        rival.train_epoch()
        if name not in (PLAIN, LARGE):
            differences[name] = _common.largest_difference(weights_of(rival), expected)
    return differences


def weights_of(rival):
    return [keras.ops.convert_to_numpy(v) for v in rival.model.trainable_variables]


# The report.


def setting(options):
    """One line that says what was measured on what."""
    return (
        f"{_common.machine()}; micro-batches of {options.micro_batch_size}. Epoch time over that "
        f"of plain fit at the micro-batch: ratio of the medians of {options.repeats} epochs, in "
        "brackets the quartiles."
    )


def table(measured):
    """Markdown table of ratios: a row for each rival, a column for each case."""
    rivals = list(next(iter(measured.values())))
    rows = [["", *measured]]
    for rival in rivals:
        cells = [_common.ratio_cell(s[rival], s[PLAIN]) for s in measured.values()]
        rows.append([rival, *cells])
    plain = [statistics.median(seconds[PLAIN]) for seconds in measured.values()]
    rows.append([f"seconds of {PLAIN}", *(f"{median:.2f}" for median in plain)])
    return _common.markdown(rows)


def rule(measured, rival, base):
    """Whether `rival` costs no more than `base` in each case, as measured."""
    answers = []
    for case, seconds in measured.items():
        middle = round(_common.ratio(seconds[rival], seconds[base])[0], 2)
        answers.append(f"{case} {'yes' if middle <= 1 else 'no'} ({middle:.2f})")
    return f"{rival} <= {base}? {', '.join(answers)}"


def plot(results, path):
    """The tables' ratios on a line for each case, a panel for each table."""
    columns = len({name.split(",")[0] for name in results})
    rows = len(results) // columns
    cases = list(next(iter(results.values())))
    size = (1 + 5 * columns, 1.2 + (0.8 + 0.3 * len(cases)) * rows)
    with _common.picture(path, size, rows, columns, sharex=True, sharey=True) as (figure, panels):
        for panel, (name, measured) in zip(panels.T.flat, results.items(), strict=True):
            draw(panel, measured)
            panel.set(title=name, xscale="log")
            panel.set_yticks(range(len(cases)), cases)
            panel.xaxis.set_major_formatter("{x:g}")
        panels[0][0].invert_yaxis()
        for panel in panels[-1]:
            panel.set_xlabel("epoch time over plain fit's")
        _common.legend_below(figure, 2)


def draw(panel, measured):
    """One table's ratios."""
    markers = ("|", "s", "X", "D", "d", "o", "^", "*")
    for rival, marker in zip(next(iter(measured.values())), markers, strict=True):
        middle = [_common.ratio(s[rival], s[PLAIN])[0] for s in measured.values()]
        ours = rival in OURS
        panel.plot(
            middle,
            range(len(middle)),
            marker,
            color=None if ours else "0.6" if rival != BUILT_IN else "black",
            markersize=8 if ours else 6,
            zorder=3 if ours else 2,
            label=rival,
        )
    panel.axvline(1, color="0.4", linewidth=0.8)
    panel.grid(axis="y", color="0.93")


def parse(argv):
    parser = _common.make_parser(__doc__)
    cases = _rivals.CASES
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases), metavar="CASE")
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
    _common.add_outputs(parser, "the seconds of every epoch")
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
        _common.progress(f"{name}, jit {mode}, {accum_steps} steps")
        measured[name], differences = _common.in_own_process(
            measure,
            _rivals.CASES[name],
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
    _common.write_json(options.json, setting=setting(options), seconds=results)
    if options.plot:
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
