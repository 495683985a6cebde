"""A training that is killed again and again ends with the weights of one that never was.

    python examples/resume.py

A net is trained on handwritten digits with either wrapper, once undisturbed and once killed at
random moments (by SIGKILL, as a scheduler does, or a system without memory). Each time it is
started again and resumes at its last saved point. There are two ways to save: `fit` with
`AtomicBackupAndRestore` at the ends of epochs, and a custom loop with a `tf.train.Checkpoint` every
few batches. Both also save in mid-cycle.
"""

import argparse
import os
import random
import tempfile
import time
from multiprocessing import get_all_start_methods, get_context

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

from _common import (
    add_count,
    add_examples,
    aligned,
    check_batch_size,
    check_multiple,
    largest_difference,
    load_digits,
    shown_difference,
)
from gradient_accumulator_tf import (
    AtomicBackupAndRestore,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
)

WAYS = (
    "GradientAccumulateOptimizer",
    "GradientAccumulateModel(accum_steps=)",
    "GradientAccumulateModel(micro_batch_size=)",
)
SAVED_WITH = ("AtomicBackupAndRestore", "tf.train.Checkpoint")


class Progress(keras.callbacks.Callback):
    """Reports each batch to the parent process, and waits for its answer or for the kill."""

    def __init__(self, connection):
        super().__init__()
        self.connection = connection

    def on_train_begin(self, logs=None):
        optimizer = self.model.optimizer
        # With micro_batch_size every batch is a whole cycle.
        micro_step = int(getattr(optimizer, "micro_step", 0))
        self.connection.send(("resumed", (int(optimizer.iterations), micro_step)))

    def on_train_batch_end(self, batch, logs=None):
        self.connection.send(("batch", batch))
        self.connection.recv()


def fit_with_backups(model, dataset, epochs, folder, progress):
    """Begins or resumes a `fit` that saves at the ends of epochs."""
    callbacks = [] if folder is None else [AtomicBackupAndRestore(folder)]
    model.fit(dataset, epochs=epochs, verbose=0, shuffle=False, callbacks=[*callbacks, progress])


def loop_with_checkpoints(model, dataset, epochs, folder, save_every, progress):
    """Begins or resumes a loop that saves after every `save_every`-th batch.

    A CheckpointManager's file is there as a whole or not at all, so a kill while it is written does
    no harm.
    """
    model.optimizer.build(model.trainable_variables)
    done = tf.Variable(0, dtype="int64")
    state = tf.train.Checkpoint(
        model=model,
        optimizer=model.optimizer,
        done=done,
        # The state of random layers, which Keras does not save.
        random=[v.value for v in model.non_trainable_variables],
    )
    manager = tf.train.CheckpointManager(state, folder, max_to_keep=2) if folder else None
    if manager:
        manager.restore_or_initialize()
    progress.set_model(model)
    progress.on_train_begin()
    accumulating = model if isinstance(model, GradientAccumulateModel) else model.optimizer
    while done < epochs * len(dataset):
        for x, y in dataset.skip(done % len(dataset)):
            model.train_on_batch(x, y)
            done.assign_add(1)
            if done % len(dataset) == 0:
                accumulating.flush()
            if manager and done % save_every == 0:
                manager.save()
            progress.on_train_batch_end(int(done))


def fit_batch_size(way, args):
    """Images in a batch given to `fit`."""
    return args.batch_size if "micro_batch_size" in way else args.micro_batch_size


def compile_for(way, args):
    """A compiled model, with the same first weights in every process."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(32, "relu"),
            keras.layers.Dense(10),
        ]
    )
    optimizer, accum_steps = keras.optimizers.Adam(1e-3), args.batch_size // args.micro_batch_size
    if way == "GradientAccumulateOptimizer":
        optimizer = GradientAccumulateOptimizer(optimizer, accum_steps)
    elif way == "GradientAccumulateModel(accum_steps=)":
        model = GradientAccumulateModel(model=model, accum_steps=accum_steps)
    else:
        model = GradientAccumulateModel(model=model, micro_batch_size=args.micro_batch_size)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def training_data(args):
    return load_digits(args.examples)[0]


def train(way, saved_with, folder, args, connection):
    """One life of a training: from what is saved in `folder` to its end, or until it is killed.

    It sends to the parent where it resumes, then each batch, and at the end its weights.

    Args:
        way: One of `WAYS`.
        saved_with: One of `SAVED_WITH`.
        folder: Where to save, or None to save nothing.
        args: What `parse` returns.
        connection: The pipe to the parent.
    """
    model, data = compile_for(way, args), training_data(args)
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(fit_batch_size(way, args))
    progress = Progress(connection)
    connection.send(("first_weights", model.get_weights()))
    if saved_with == SAVED_WITH[0]:
        fit_with_backups(model, dataset, args.epochs, folder, progress)
    else:
        loop_with_checkpoints(model, dataset, args.epochs, folder, args.save_every, progress)
    connection.send(("weights", model.get_weights()))


def live(*what, kill_after=None, delay=0.0):
    """Runs `train(*what)` in a process of its own.

    Args:
        *what: The first four arguments of `train`.
        kill_after: Number of batches after which it is killed; None lets it end.
        delay: Seconds between that batch and the kill.

    Returns:
        Dict with "first_weights", before anything was restored; "resumed", the updates and the
        micro-step at which it resumed; and "weights", None if it was killed.
    """
    context = process_context()
    connection, childs_end = context.Pipe()
    process = context.Process(target=train, args=(*what, childs_end), daemon=True)
    process.start()
    childs_end.close()
    result, batches = {"weights": None}, 0
    try:
        while result["weights"] is None:
            kind, value = connection.recv()
            if kind != "batch":
                result[kind] = value
                continue
            batches += 1
            connection.send("go on")
            if batches == kill_after:
                time.sleep(delay)
                process.kill()
                break
    except EOFError:
        raise RuntimeError(f"The training failed after {batches} batches.") from None
    finally:
        process.join()
        connection.close()
    return result


def process_context():
    """A context for processes. Where possible they start with TensorFlow imported already."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["gradient_accumulator_tf"])
    return context


def killed_training(way, saved_with, args, generator):
    """A training that is killed `args.kills` times: list of what `live` returned for each life."""
    epoch = -(-len(training_data(args)[0]) // fit_batch_size(way, args))
    # A life does at most one batch more than `kill_after`. So no training ends before its last
    # kill.
    longest = max(1, args.epochs * epoch // args.kills - 1)
    lives = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.kills):
            kill = {
                "kill_after": generator.randint(1, longest),
                "delay": generator.uniform(0, 0.03),
            }
            lives.append(live(way, saved_with, folder, args, **kill))
        lives.append(live(way, saved_with, folder, args))
    return lives


def table(results):
    """The results as lines of text, one for each training under two of headings."""
    rows = [
        ("", "", "", "resumed in", "weight"),
        ("wrapper", "saved with", "kills", "mid-cycle", "difference"),
    ]
    for result in results:
        rows.append(
            (
                result["way"],
                result["saved_with"],
                str(result["kills"]),
                str(result["resumed_in_mid_cycle"]),
                shown_difference(result["weight_difference"]),
            )
        )
    return aligned(rows)


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Kill trainings at random moments, resume them, and compare their weights."
    )
    add_count(parser, "--kills", 5, "how many times each training is killed")
    add_count(parser, "--epochs", 8, "passes over the training images")
    add_count(parser, "--batch-size", 128, "images per update")
    add_count(parser, "--micro-batch-size", 32, "images per forward and backward pass")
    add_count(parser, "--save-every", 3, "batches between two savings of the loop")
    add_examples(parser)
    add_count(parser, "--seed", 1, "of the random moments")
    args = parser.parse_args(argv)
    check_multiple(parser, args)
    check_batch_size(parser, args)
    return args


def main(argv=None):
    """Trains undisturbed and killed, prints the table, and returns a dict for each of its rows."""
    args = parse(argv)
    results = []
    for way in WAYS:
        for saved_with in SAVED_WITH:
            undisturbed = live(way, saved_with, None, args)
            print(f"\n{way}, saved with {saved_with}", flush=True)
            lives = killed_training(way, saved_with, args, random.Random(args.seed))
            resumed = [life["resumed"] for life in lives[1:]]
            places = ", ".join(map(str, resumed))
            print(f"resumed after (updates, micro-steps): {places}", flush=True)
            results.append(
                {
                    "way": way,
                    "saved_with": saved_with,
                    "kills": sum(life["weights"] is None for life in lives),
                    "resumed_after_updates": max(updates for updates, _ in resumed),
                    "resumed_in_mid_cycle": sum(micro_step > 0 for _, micro_step in resumed),
                    "weight_movement": largest_difference(
                        undisturbed["weights"], undisturbed["first_weights"]
                    ),
                    "weight_difference": largest_difference(
                        undisturbed["weights"], lives[-1]["weights"]
                    ),
                }
            )
    print(f"\n{table(results)}\n\nWeight difference: from the training that was never killed.")
    return results


if __name__ == "__main__":
    main()
