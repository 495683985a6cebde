"""The time before a first training step: to trace, optimise and compile it, over plain fit's.

    python -m benchmarks.compile_time
    python -m benchmarks.compile_time --cases dense-1M-Adam --json start.json --plot start.png

Each measurement has a process of its own. It first traces and compiles a tiny net, because the
first time in a program also loads libraries. All are measured in turn, several times. Tracing ends
with the concrete function. The optimisation of the graph is the time that the first call takes
more than the second. XLA compiles from the concrete function too.
"""

import statistics
import sys
import time

import numpy as np
import tensorflow as tf

from benchmarks import _common, _rivals
from benchmarks._rivals import LARGE, OURS, PLAIN, WITHIN_STEP

RIVALS = (PLAIN, LARGE, *OURS)
KINDS = (
    "tracing",
    "tracing and graph optimisation",
    "XLA compilation",
    "tracing and XLA compilation",
)
CASES = ("dense-1M-Adam", "convolutional-Adam", "transformer-Adam")
TINY = _rivals.dense_case(_rivals.ADAM, 0, 4, 4)
WITHIN = 1.3  # times plain fit
# From the fewest micro-batches to the most. An unrolled loop would grow with their number.
GROWTH = 1.1


# The measurement, in a process of its own.


def traced(case, rival, micro_batch_size, accum_steps, jit):
    """The function of a training step, traced; a batch for it; and the seconds of the tracing.

    Keras makes its own function only in a first step.
    """
    rng = np.random.default_rng(0)
    x = case.inputs(rng, accum_steps * micro_batch_size)
    y = rng.integers(_rivals.CLASSES, size=len(x))
    micro, large = (_common.batches_of(size, x, y) for size in (micro_batch_size, len(x)))
    makers = _rivals.rival_makers(case, micro, large, micro_batch_size, accum_steps, jit)
    model, batches = makers[rival]().model, large if rival in (LARGE, WITHIN_STEP) else micro
    start = time.perf_counter()
    model.make_train_function()
    step = tf.function(model.train_step, jit_compile=jit, autograph=False, reduce_retracing=True)
    step.get_concrete_function(batches.element_spec)
    return step, next(iter(batches)), time.perf_counter() - start


def optimisation(step, batch):
    """Seconds in which TensorFlow optimises a traced function's graph."""
    calls = []
    for _ in range(2):
        start = time.perf_counter()
        tf.nest.map_structure(np.asarray, step(batch))
        calls.append(time.perf_counter() - start)
    return max(calls[0] - calls[1], 0.0)


def compilation(step, batch):
    """Seconds in which XLA compiles a traced function."""
    lowered = step.experimental_get_compiler_ir(batch)
    start = time.perf_counter()
    lowered(stage="optimized_hlo_serialized")
    return time.perf_counter() - start


def measure(case, *args):
    """Seconds of the `KINDS`, by name; arguments as for `traced`, without `jit`."""
    for net in (TINY, _rivals.CASES[case]):
        step, batch, tracing = traced(net, *args, jit=False)
        optimising = optimisation(step, batch)
        step, batch, tracing_for_xla = traced(net, *args, jit=True)
        compiling = compilation(step, batch)
    seconds = (tracing, tracing + optimising, compiling, tracing_for_xla + compiling)
    return dict(zip(KINDS, seconds, strict=True))


def measure_case(name, options):
    """Lists of seconds by kind, rival and number of micro-batches (as text, as in JSON)."""
    seconds = {
        kind: {r: {str(n): [] for n in options.accum_steps} for r in RIVALS} for kind in KINDS
    }
    for repeat in range(options.repeats):
        _common.progress(f"{name}, {repeat + 1} of {options.repeats}")
        for accum_steps in options.accum_steps:
            for rival in _common.in_turn(RIVALS, repeat):
                measured = _common.in_own_process(
                    measure, name, rival, options.micro_batch_size, accum_steps
                )
                for kind, value in measured.items():
                    seconds[kind][rival][str(accum_steps)].append(value)
    return seconds


# The report.


def setting(options):
    """One line that says what was measured on what."""
    return (
        f"{_common.machine()}; micro-batches of {options.micro_batch_size}. Seconds over those of "
        f"plain fit at the micro-batch: ratio of the medians of {options.repeats} processes, in "
        "brackets the quartiles."
    )


def table(measured):
    """Markdown table of ratios: a row for each rival, a column for each number of micro-batches."""
    plain = measured[PLAIN]
    rows = [["", *(f"accum_steps {n}" for n in plain)]]
    for rival, columns in measured.items():
        rows.append([rival, *(_common.ratio_cell(columns[n], plain[n]) for n in columns)])
    rows.append(
        [f"seconds of {PLAIN}", *(f"{statistics.median(column):.2f}" for column in plain.values())]
    )
    return _common.markdown(rows)


def rules(measured):
    """Whether each of our rivals starts nearly as soon as plain fit, for all numbers."""
    lines = []
    for rival in OURS:
        columns = measured[rival]
        ratios = [_common.ratio(columns[n], measured[PLAIN][n])[0] for n in columns]
        medians = [statistics.median(column) for column in columns.values()]
        steps, growth = list(columns), medians[-1] / medians[0]
        lines.append(
            f"{rival}: within {WITHIN} times {PLAIN}? {answer(max(ratios), WITHIN)}; at "
            f"accum_steps {steps[-1]} no more than at {steps[0]}? {answer(growth, GROWTH)}"
        )
    return "\n".join(lines)


def answer(value, most):
    return f"{'yes' if round(value, 2) <= most else 'no'} ({value:.2f})"


def plot(results, path):
    """The ratios on a line for each rival, a panel per table."""
    size, shape = (1.5 + 2.6 * len(results), 1.8 * len(KINDS)), (len(KINDS), len(results))
    with _common.picture(path, size, *shape, sharex=True, sharey=True) as (figure, panels):
        for column, (case, kinds) in zip(panels.T, results.items(), strict=True):
            for panel, (kind, measured) in zip(column, kinds.items(), strict=True):
                draw(panel, measured)
                panel.set_title(f"{kind},\n{case}", fontsize="small")
        panels[0][0].invert_yaxis()
        panels[0][0].set_xlim(0, None)
        for panel in panels[-1]:
            panel.set_xlabel("seconds over plain fit's")
        _common.legend_below(figure, 3)


def draw(panel, measured):
    """One table's ratios, darker for more micro-batches."""
    plain = measured[PLAIN]
    for i, n in enumerate(plain):
        ratios = [_common.ratio(measured[r][n], plain[n])[0] for r in RIVALS[1:]]
        panel.plot(
            ratios,
            range(len(ratios)),
            "o",
            color="tab:blue",
            alpha=(i + 1) / len(plain),
            label=f"accum_steps {n}",
        )
    for at, style in ((1, "-"), (WITHIN, ":")):
        panel.axvline(at, color="0.4", linestyle=style, linewidth=0.8)
    panel.set_yticks(range(len(RIVALS) - 1), RIVALS[1:], fontsize="x-small")


def parse(argv):
    parser = _common.make_parser(__doc__)
    parser.add_argument(
        "--cases", nargs="+", choices=_rivals.CASES, default=list(CASES), metavar="CASE"
    )
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--accum-steps", nargs="+", type=int, default=[2, 64], metavar="N")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each measurement")
    _common.add_outputs(parser, "the seconds of every process")
    options = parser.parse_args(argv)
    if min(options.micro_batch_size, options.repeats) < 1 or min(options.accum_steps) < 2:
        parser.error(
            "sizes and repeats must be at least 1, and --accum-steps at least 2. Received: "
            f"--micro-batch-size {options.micro_batch_size}, --repeats {options.repeats}, "
            f"--accum-steps {options.accum_steps}. Pass larger numbers."
        )
    options.accum_steps = sorted(set(options.accum_steps))
    return options


def main(argv=None):
    """Measures, prints, and returns seconds[case][kind][rival][accum_steps], a list each."""
    options = parse(argv)
    print(setting(options), flush=True)
    results = {}
    for case in options.cases:
        results[case] = measure_case(case, options)
        for kind, measured in results[case].items():
            print(f"\n### {kind}, {case}\n", table(measured), "", rules(measured), sep="\n")
        sys.stdout.flush()
    _common.write_json(options.json, setting=setting(options), seconds=results)
    if options.plot:
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
