"""A conditional for side effects, in the form that costs least where it is compiled."""

import tensorflow as tf

from gradient_accumulator_tf import _compat


def run_if(condition, function):
    """Runs `function()` if `condition`, a scalar bool tensor, holds.

    XLA copies every variable around a conditional, and updates them in place in a loop of no or
    one turn. Without XLA the conditional is cheaper than the loop.
    """

    def branch(*_):
        function()
        return tf.constant(False)

    if _compat.compiles_with_xla():
        tf.while_loop(lambda due: due, branch, (condition,), parallel_iterations=1)
    else:
        tf.cond(condition, branch, lambda: tf.constant(False))
