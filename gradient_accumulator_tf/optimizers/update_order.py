"""One variable's update after the other's, so that only one at a time needs memory for it."""

import contextlib
import functools

import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.replicated.replicas import number_of_replicas


def update_of(optimizer, variables):
    """Function of a list of gradients, the same on all replicas, that updates on a replica.

    Args:
        optimizer: A Keras optimizer.
        variables: List of the variables that the gradients are of.
    """

    def update(gradients):
        # Keras also runs a step's graph in the call that finds no more data. The dependency on the
        # gradients keeps that call from counting.
        with (
            tf.control_dependencies([g for g in gradients if g is not None]),
            _keras.replicas_agree(optimizer),
            one_by_one(optimizer),
        ):
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

    return update


@contextlib.contextmanager
def one_by_one(optimizer):
    """Within this context `optimizer` updates each variable only when the one before is done.

    In plain training gradients become ready one by one. A cycle's means are ready all at once,
    and a graph would compute the same intermediate of Adam for all variables before the next one:
    more than a copy of the parameters. On several replicas nothing changes.

    Args:
        optimizer: A Keras optimizer whose gradients are dense; the innermost one is meant.
    """
    if tf.executing_eagerly() or number_of_replicas() > 1:
        yield
        return
    optimizer = _keras.innermost(optimizer)
    optimizers, last = getattr(optimizer, "optimizers", [optimizer]), []

    def update_after_the_last(update_step, gradient, variable, learning_rate):
        with tf.control_dependencies(last):
            gradient = tf.identity(gradient)
        update_step(gradient, variable, learning_rate)
        # A read waits for what was written before.
        last[:] = [tf.convert_to_tensor(variable)]

    for o in optimizers:
        vars(o)["update_step"] = functools.partial(update_after_the_last, o.update_step)
    try:
        yield
    finally:
        for o in optimizers:
            del vars(o)["update_step"]
