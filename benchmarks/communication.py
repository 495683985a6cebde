"""The bytes that workers send for an update, for each way to accumulate, over the large batch's.

    python -m benchmarks.communication
    python -m benchmarks.communication --workers 4 --accum-steps 8 --json bytes.json

Worker processes train the same model in every way under a
`tf.distribute.MultiWorkerMirroredStrategy`. Meanwhile the bytes on the loopback interface are
counted, in /proc/net/dev, which only Linux has. Bytes of other programs are counted as well.
Workers compute on GPUs if there are any, one each. They still send over loopback, by TensorFlow's
ring: NCCL would send past it.
"""

import argparse
import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from benchmarks import _common
from benchmarks._rivals import ACROSS_STEPS, LARGE, OPTIMIZER, OURS, WITHIN_STEP
from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer, _keras

CLASSES = 10
FEATURES = 512
TOLERANCE = 1e-5  # what float32 makes of sums in another order
TIMEOUT = 1800  # seconds; without it a worker would wait forever for one that is stuck
TARGET = 1.05  # times the large batch's bytes
INTERFACES = Path("/proc/net/dev")

EVERY_STEP = "reduction at every micro-batch"
IDLE = "idle for as long"


# The ways: each has a model, and a function that trains it for an epoch.


class Way(NamedTuple):
    """One row of the table."""

    model: keras.Model
    train_epoch: Callable


def make_model(units):
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(units, "relu") for _ in range(2)]
    return keras.Sequential([keras.Input((FEATURES,)), *hidden, keras.layers.Dense(CLASSES)])


def make_optimizer():
    return keras.optimizers.SGD(0.001, momentum=0.9)


def make_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fit(model, optimizer, x, y, batch_size):
    """The way that trains with `fit`."""
    model.compile(optimizer, loss=make_loss())
    return Way(model, lambda: model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0))


def reducing_loop(model, optimizer, x, y, batch_size, accum_steps):
    """The way that sums each micro-batch's gradients over the workers before it adds them up."""
    strategy = tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    loss_fn = make_loss()
    variables = model.trainable_variables
    optimizer.build(variables)
    sharding = tf.data.Options()
    sharding.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size, drop_remainder=True)
    batches = strategy.experimental_distribute_dataset(batches.with_options(sharding))

    @tf.function
    def micro_step(sums, x, y, ends_cycle):
        def on_replica(sums, x, y):
            with tf.GradientTape() as tape:
                # A Keras loss is divided by the number of replicas already.
                share = loss_fn(y, model(x, training=True)) / accum_steps
            gradients = tape.gradient(share, variables)
            if ends_cycle:  # Keras itself sums over the workers what it applies
                mine = [a / replicas + b for a, b in zip(sums, gradients, strict=True)]
                optimizer.apply(mine, variables)
                return [tf.zeros_like(a) for a in sums]
            replica = tf.distribute.get_replica_context()
            gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
            return [a + b for a, b in zip(sums, gradients, strict=True)]

        return strategy.run(on_replica, args=(sums, x, y))

    def train_epoch():
        sums = [tf.zeros(v.shape, v.dtype) for v in variables]
        for step, (x, y) in enumerate(batches, start=1):
            sums = micro_step(sums, x, y, step % accum_steps == 0)

    return Way(model, train_epoch)


def make_ways(units, x, y, micro_batch_size, accum_steps):
    """Dict of name to function that returns a `Way`, in the order of the table's rows."""
    micro = micro_batch_size * tf.distribute.get_strategy().num_replicas_in_sync
    large = micro * accum_steps
    model, optimizer = functools.partial(make_model, units), make_optimizer
    return {
        LARGE: lambda: fit(model(), optimizer(), x, y, large),
        EVERY_STEP: lambda: reducing_loop(model(), optimizer(), x, y, micro, accum_steps),
        OPTIMIZER: lambda: fit(
            model(), GradientAccumulateOptimizer(optimizer(), accum_steps), x, y, micro
        ),
        ACROSS_STEPS: lambda: fit(
            GradientAccumulateModel(model=model(), accum_steps=accum_steps),
            optimizer(),
            x,
            y,
            micro,
        ),
        WITHIN_STEP: lambda: fit(
            GradientAccumulateModel(model=model(), micro_batch_size=micro_batch_size),
            optimizer(),
            x,
            y,
            large,
        ),
    }


# The measurement, in every worker.


def loopback_bytes():
    """Bytes that the loopback interface has received, which is what all have sent on it."""
    line = next(line for line in INTERFACES.read_text().splitlines() if line.strip()[:3] == "lo:")
    return int(line.split(":")[1].split()[0])


def bytes_during(function, times):
    """Bytes over loopback in each of some calls of a function."""
    counts = []
    for _ in range(times):
        before = loopback_bytes()
        function()
        counts.append(loopback_bytes() - before)
    return counts


def measure(options, accum_steps):
    """Bytes per update by way: a list, with one number for each repeat.

    Raises:
        RuntimeError: If the weights of a way are not those of the large batch.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    rng = np.random.default_rng(0)
    examples = options.updates * accum_steps * options.micro_batch_size * replicas
    x = rng.normal(size=(examples, FEATURES)).astype("float32")
    y = rng.integers(CLASSES, size=examples)
    ways = make_ways(options.units, x, y, options.micro_batch_size, accum_steps)
    counts, expected, seconds = {}, None, 0.0
    for name, make in ways.items():
        way = make()
        way.train_epoch()  # traces, and makes the connections
        start = time.perf_counter()
        counts[name] = bytes_during(way.train_epoch, options.repeats)
        seconds = max(seconds, time.perf_counter() - start)
        weights = [keras.ops.convert_to_numpy(v) for v in way.model.trainable_variables]
        expected = weights if name == LARGE else expected
        difference = _common.largest_difference(weights, expected)
        if not difference <= TOLERANCE:  # so that NaN raises as well
            raise RuntimeError(f"{name}: weights are off the large batch's by {difference:.1e}")
    counts[IDLE] = bytes_during(lambda: time.sleep(seconds / options.repeats), options.repeats)
    return {name: [n / options.updates for n in epochs] for name, epochs in counts.items()}


def take_a_gpu(task):
    """Shows a worker one GPU only. Workers share GPUs if there are fewer of them."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        own = gpus[task % len(gpus)]
        tf.config.set_visible_devices(own, "GPU")
        tf.config.experimental.set_memory_growth(own, True)


def work(options):
    """The program of a worker. The first one writes the measurement, because all train in step."""
    _keras.mend_fit_on_several_workers()  # the large batch's fit needs it too
    cluster = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    take_a_gpu(cluster.task_id)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(
        cluster,
        tf.distribute.experimental.CommunicationOptions(
            implementation=tf.distribute.experimental.CommunicationImplementation.RING
        ),
    )
    with strategy.scope():
        measured = {f"accum_steps {n}": measure(options, n) for n in options.accum_steps}
    if cluster.task_id == 0:
        Path(options.worker).write_text(json.dumps(measured))


# The launcher.


def free_addresses(count):
    """Addresses on this machine that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]


@contextlib.contextmanager
def started_workers(command, count):
    """A command in each worker of a cluster; no process outlives the context.

    Yields:
        List of the processes, and list of the files that hold their output.
    """
    addresses = free_addresses(count)
    with contextlib.ExitStack() as stack:
        outputs, processes = [], []
        for index in range(count):
            cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment = {
                **os.environ,
                "TF_CONFIG": json.dumps(cluster),
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            }
            # Not a pipe, which blocks its writer when it is full.
            outputs.append(stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")))
            processes.append(
                subprocess.Popen(
                    command, env=environment, stdout=outputs[-1], stderr=subprocess.STDOUT
                )
            )
            # Called in reverse order: kill, which leaves a process that has ended alone, then wait.
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        yield processes, outputs


def run_workers(command, count, timeout=TIMEOUT):
    """Runs a command in each worker of a cluster; no process outlives the call.

    Raises:
        RuntimeError: If a worker fails, or all are not done in time; with their output.
    """
    with started_workers(command, count) as (processes, outputs):
        deadline = time.monotonic() + timeout
        while (codes := [process.poll() for process in processes]) != [0] * count:
            if any(codes) or time.monotonic() > deadline:
                raise RuntimeError(report(codes, outputs, timeout))
            time.sleep(0.1)


def report(codes, outputs, timeout):
    """The exit status of each worker, and what it printed."""
    lines = ["a worker failed" if any(codes) else f"workers were not done in {timeout} s"]
    for index, (code, output) in enumerate(zip(codes, outputs, strict=True)):
        output.seek(0)
        state = "still running" if code is None else f"exit status {code}"
        lines.append(f"--- worker {index}, {state}:\n{output.read()}")
    return "\n".join(lines)


# The report.


def per_update(counts):
    """Bytes of the quietest repeat: other programs and repeated packets can only add to them."""
    return min(counts)


def ratio(measured, name):
    return per_update(measured[name]) / per_update(measured[LARGE])


def setting(options):
    """One line that says what was measured on what."""
    parameters = make_model(options.units).count_params()
    return (
        f"{_common.machine()}; {options.workers} workers on this machine; {parameters:,} "
        f"parameters ({4 * parameters / 1e6:.2f} MB of gradients), micro-batches of "
        f"{options.micro_batch_size} per worker. MB over the loopback interface per update, all "
        f"workers together: the smallest of {options.repeats} means over {options.updates} "
        f"updates, in brackets the ratio to the large batch."
    )


def table(results):
    """Markdown table of bytes: a row for each way, a column for each number of micro-batches."""
    rows = [["", *results]]
    for name in next(iter(results.values())):
        cells = [(per_update(m[name]) / 1e6, ratio(m, name)) for m in results.values()]
        rows.append([name, *(f"{size:.3f} ({times:.3f})" for size, times in cells)])
    return _common.markdown(rows)


def rule(results, name):
    """Whether a way sends what the large batch sends, or hardly more, for each `accum_steps`."""
    answers = []
    for steps, measured in results.items():
        times = ratio(measured, name)
        answers.append(f"{steps} {'yes' if times <= TARGET else 'no'} ({times:.3f})")
    return f"{name} within 5 % of the large batch? {', '.join(answers)}"


def plot(results, path):
    """Lines of the bytes over the number of micro-batches."""
    steps = [int(name.split()[-1]) for name in results]
    # Most lines lie on each other, so a wide one is below thinner ones.
    styles = ({"linewidth": 7, "alpha": 0.4}, {"color": "black"}, {}, {"ls": "--"}, {"ls": ":"})
    with _common.picture(path, (7, 4.5)) as (_, panels):
        panel = panels[0][0]
        for name, style in zip((LARGE, EVERY_STEP, *OURS), styles, strict=True):
            megabytes = [per_update(measured[name]) / 1e6 for measured in results.values()]
            panel.plot(steps, megabytes, marker="o", label=name, **style)
        panel.set(xlabel="accum_steps", ylabel="MB per update", ylim=(0, None))
        panel.set_xticks(steps)
        panel.legend(frameon=False)


def parse(argv):
    parser = _common.make_parser(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--accum-steps", type=int, nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--units", type=int, default=768, help="width of the two hidden layers")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="examples, per worker")
    parser.add_argument("--updates", type=int, default=10, help="updates in an epoch")
    parser.add_argument("--repeats", type=int, default=3, help="measured epochs of each way")
    _common.add_outputs(parser, "the bytes of every epoch", "the table")
    # The launcher passes it to a worker: the file to write.
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    sizes = [options.units, options.micro_batch_size, options.updates, options.repeats]
    if min(*sizes, *options.accum_steps) < 1 or options.workers < 2:
        parser.error("sizes, updates and repeats must be at least 1, and --workers at least 2")
    if not INTERFACES.exists():
        parser.error(f"bytes are read from {INTERFACES}, which this system (not Linux?) lacks")
    return options


def main(argv=None):
    """Measures, prints, and returns bytes[accum_steps][way], a number for each repeat."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.worker:
        return work(options)
    print(setting(options), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder, "measured.json")
        worker = [sys.executable, "-m", "benchmarks.communication", *argv]
        run_workers([*worker, "--worker", str(measured)], options.workers)
        results = json.loads(measured.read_text())
    print(f"\n{table(results)}\n", *(rule(results, name) for name in OURS), sep="\n")
    _common.write_json(options.json, setting=setting(options), bytes=results)
    if options.plot:
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
