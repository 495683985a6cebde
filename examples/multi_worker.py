"""Handwritten digits learned by several workers, each a process on this or another machine.

    python examples/multi_worker.py --local-workers 2 --checkpoint-dir checkpoints

runs all workers here, on the loopback network. On a cluster, start one process for each worker:

    TF_CONFIG='{"cluster": ..., "task": ...}' python examples/multi_worker.py
    srun python examples/multi_worker.py --cluster slurm

All workers train one net on shares of the same effective batches. If they are killed and started
again with the same --checkpoint-dir, they resume after the last whole epoch. At the end the chief
trains the large batch by itself, and prints how far its weights are from those of the workers.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

from _common import (
    add_count,
    add_examples,
    build_net,
    check_batch_size,
    largest_difference,
    load_digits,
)
from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer


def run_local_workers(command, count):
    """Runs `command` as workers of one job, on this machine, and returns the exit status.

    The status is 0 if all have succeeded. If one fails, the others are killed, because they would
    wait for it. Worker 0 prints to this process's output, the others print errors only.
    """
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(count)]}
    workers = []
    try:
        for index in range(count):
            task = {"cluster": cluster, "task": {"type": "worker", "index": index}}
            workers.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, "TF_CONFIG": json.dumps(task)},
                    stdout=None if index == 0 else subprocess.DEVNULL,
                )
            )
        while True:
            statuses = [worker.poll() for worker in workers]
            if any(statuses):
                failed = next(i for i, status in enumerate(statuses) if status)
                print(f"Worker {failed} failed: the others are stopped.", file=sys.stderr)
                return 1
            if None not in statuses:
                return 0
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def free_ports(count):
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def find_cluster(kind, port):
    """The resolver of all workers' addresses and this worker's own.

    Args:
        kind: "tf_config", "slurm" or "kubernetes".
        port: Where the workers listen; TF_CONFIG has ports of its own.
    """
    resolvers = tf.distribute.cluster_resolver
    if kind == "tf_config":
        return resolvers.TFConfigClusterResolver()
    resolver = slurm_resolver(port) if kind == "slurm" else kubernetes_resolver(port)
    cluster = (
        resolver.cluster_spec()
    )  # Slurm's resolver knows its task, and sets its GPUs, after this call
    # Neither resolver counts the GPUs of the worker, and the strategy asks for their number.
    gpus = len(tf.config.list_physical_devices("GPU"))
    return resolvers.SimpleClusterResolver(
        cluster,
        task_type=resolver.task_type,
        task_id=resolver.task_id,
        num_accelerators={"GPU": gpus},
        rpc_layer="grpc",
    )


def slurm_resolver(port):
    """Reads the variables that srun sets. A node's tasks listen on `port`, `port + 1`, ..."""
    make = tf.distribute.cluster_resolver.SlurmClusterResolver
    if shutil.which("nvidia-smi"):
        return make(port_base=port)
    # The resolver assigns GPUs. Without any, it still needs a number: one for each task.
    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    return make(port_base=port, gpus_per_node=tasks, gpus_per_task=1, auto_set_gpu=False)


def kubernetes_resolver(port):
    """Asks for the running pods; needs the package `kubernetes` and the right to list pods.

    WORKER_SELECTOR is the workers' label selector, WORKERS their number and HOST_IP the address
    of this pod's node. TensorFlow expects workers at the addresses of their nodes, so the pods must
    use the host network, one on each node.
    """
    from kubernetes import client, config

    config.load_incluster_config()
    resolver = tf.distribute.cluster_resolver.KubernetesClusterResolver(
        {"worker": [os.environ["WORKER_SELECTOR"]]},
        tf_server_port=port,
        override_client=client.CoreV1Api(),  # the default client does not work in a pod
    )
    while True:
        try:
            addresses = resolver.cluster_spec().job_tasks("worker")
        except RuntimeError:
            addresses = []  # a pod is not running yet
        if len(addresses) == int(os.environ["WORKERS"]):
            break
        time.sleep(1)
    resolver.task_type = "worker"
    resolver.task_id = addresses.index(f"{os.environ['HOST_IP']}:{port}")
    return resolver


class SaveEveryEpoch(keras.callbacks.Callback):
    """Saves the state of the training after every epoch, and loads it at the start.

    Every worker takes part, because a sum over replicas can only be read by all together. All read
    the same files, so the folder must be shared. Only the chief writes there.
    """

    def __init__(self, model, folder, is_chief, scratch):
        super().__init__()
        model.optimizer.build(model.trainable_variables)
        self.epoch = tf.Variable(0, dtype="int64")
        state = tf.train.Checkpoint(model=model, optimizer=model.optimizer, epoch=self.epoch)
        latest = tf.train.latest_checkpoint(folder)
        if latest:
            state.restore(latest).assert_existing_objects_matched()
        self.manager = tf.train.CheckpointManager(
            state, folder if is_chief else scratch, max_to_keep=2
        )

    def on_epoch_end(self, epoch, logs=None):
        self.epoch.assign(epoch + 1)
        self.manager.save(checkpoint_number=epoch + 1)


def compile_for(wrapper, batch_size, micro_batch_size, replicas):
    """The compiled model and the batch size for `fit`; wrapper None is the large batch."""
    model, optimizer = build_net(), keras.optimizers.Adam(1e-2)
    if wrapper == "model":
        model = GradientAccumulateModel(model=model, micro_batch_size=micro_batch_size)
    elif wrapper == "optimizer":
        # `fit` splits its batch evenly, so this is one micro-batch on each replica.
        micro_batches = micro_batch_size * replicas
        optimizer = GradientAccumulateOptimizer(optimizer, batch_size // micro_batches)
        batch_size = micro_batches
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])
    return model, batch_size


def train_large_batch(x, y, args):
    """A model trained on the large batch by this process alone, and how far its weights moved."""
    model, batch_size = compile_for(None, args.batch_size, args.micro_batch_size, replicas=1)
    first_weights = model.get_weights()
    model.fit(x, y, batch_size=batch_size, epochs=args.epochs, shuffle=False, verbose=2)
    return model, largest_difference(model.get_weights(), first_weights)


def accuracy_of(model, x, y):
    return float((model.predict(x, verbose=0).argmax(-1) == y).mean())


def work(args, parser):
    """The program of each worker."""
    # First of all, because TensorFlow must not have started before it knows the other workers.
    strategy = tf.distribute.MultiWorkerMirroredStrategy(find_cluster(args.cluster, args.port))
    replicas = strategy.num_replicas_in_sync
    if args.batch_size % (args.micro_batch_size * replicas):
        parser.error(
            "--batch-size must be a multiple of --micro-batch-size times the replicas. Received: "
            f"{args.batch_size}, and {args.micro_batch_size} times {replicas}."
        )
    resolver = strategy.cluster_resolver
    workers = resolver.cluster_spec().num_tasks("worker")
    is_chief = resolver.task_id == 0
    (x, y), (x_val, y_val) = load_digits(args.examples)
    # Whole batches only, because the optimizer's cycles do not end with an epoch.
    used = len(x) // args.batch_size * args.batch_size
    x, y = x[:used], y[:used]
    with strategy.scope():
        model, batch_size = compile_for(
            args.wrapper, args.batch_size, args.micro_batch_size, replicas
        )
    with tempfile.TemporaryDirectory() as scratch:
        first_epoch, callbacks = 0, []
        if args.checkpoint_dir:
            with strategy.scope():
                save = SaveEveryEpoch(model, args.checkpoint_dir, is_chief, scratch)
            first_epoch, callbacks = int(save.epoch.numpy()), [save]
        if first_epoch:
            print(f"Resuming after epoch {first_epoch}.", flush=True)
        model.fit(
            x,
            y,
            batch_size=batch_size,
            initial_epoch=first_epoch,
            epochs=args.epochs,
            shuffle=False,
            callbacks=callbacks,
            verbose=2 if is_chief else 0,
        )
        if args.checkpoint_dir:
            model.save(Path(args.checkpoint_dir if is_chief else scratch, "model.keras"))
    if not is_chief:
        return
    # Outside the strategy nothing waits for the other workers.
    weights = model.get_weights()
    print("\nThe large batch, on one device", flush=True)
    large, moved = train_large_batch(x, y, args)
    alone = build_net()
    alone.set_weights(weights)
    difference = largest_difference(weights, large.get_weights())
    accuracy, of_large_batch = (accuracy_of(m, x_val, y_val) for m in (alone, large))
    print(
        f"\nworkers              {workers}"
        f"\nreplicas             {replicas}"
        f"\nupdates              {int(model.optimizer.iterations.numpy())}"
        f"\nvalidation accuracy  {accuracy:.4f} (large batch: {of_large_batch:.4f})"
        f"\nweight difference    {difference:.1e} (weights moved by {moved:.2g})",
        flush=True,
    )


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Train a net on handwritten digits on several workers."
    )

    parser.add_argument(
        "--cluster",
        choices=("tf_config", "slurm", "kubernetes"),
        default="tf_config" if "TF_CONFIG" in os.environ else None,
        help="be one worker, and find the others so (default: tf_config if TF_CONFIG is set)",
    )
    add_count(parser, "--local-workers", 2, "without a cluster: the workers to run on this machine")
    add_count(parser, "--port", 8888, "where workers listen under slurm and kubernetes")
    parser.add_argument(
        "--wrapper",
        choices=("model", "optimizer"),
        default="model",
        help="GradientAccumulateModel or GradientAccumulateOptimizer (default: %(default)s)",
    )
    add_count(parser, "--epochs", 2, "passes over the training images")
    add_count(parser, "--batch-size", 256, "images per update, over all workers")
    add_count(
        parser, "--micro-batch-size", 16, "images per forward and backward pass of one replica"
    )
    add_examples(parser)
    parser.add_argument(
        "--checkpoint-dir",
        metavar="FOLDER",
        help="save here, resume from here; shared by all workers",
    )
    args = parser.parse_args(argv)
    check_batch_size(parser, args)
    return args, parser


def main(argv=None):
    """Runs one worker of a job, or a whole job of local workers; returns the exit status."""
    args, parser = parse(argv)
    if args.cluster:
        work(args, parser)
        return 0
    # So that its workers are stopped too if it is terminated.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    arguments = sys.argv[1:] if argv is None else argv
    command = [sys.executable, __file__, *arguments]
    return run_local_workers(command, args.local_workers)


if __name__ == "__main__":
    sys.exit(main())
