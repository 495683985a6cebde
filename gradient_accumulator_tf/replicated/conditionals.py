"""Conditionals for side effects, on one replica and on all of them."""

import tensorflow as tf

from gradient_accumulator_tf import _keras


def run_if(condition, function):
    """Runs a function if a condition holds.

    With XLA it is a loop of zero or one turns: XLA updates variables in place in a loop, and copies
    each of them around a conditional. Without XLA it is a conditional, which is cheaper there.

    Args:
        condition: Scalar bool tensor.
        function: Function without arguments. Its result is not used.
    """

    def branch(*_):
        function()
        return tf.constant(False)

    if _keras.compiles_with_xla():
        tf.while_loop(lambda due: due, branch, (condition,), parallel_iterations=1)
    else:
        tf.cond(condition, branch, lambda: tf.constant(False))


def across_replicas(action, *args):
    """Calls `action(run, *args)` in a context whose conditionals may synchronise replicas.

    Must be called on every replica, or outside of them.

    Args:
        action: Function that takes `run` and `args`. `run(function, args=())` runs a function on
            every replica.
        *args: Nested structures of each replica's own tensors and None. The action gets them for
            all replicas, and `run` gives each replica its own.
    """

    def run(function, args=()):
        return function(*args)

    # TensorFlow accepts no merge call in a conditional on a replica. It accepts a conditional
    # outside of the replicas that calls them. This also holds for the only replica of a strategy,
    # because Keras's optimizers make their merge calls there too.
    if tf.distribute.in_cross_replica_context():
        action(tf.distribute.get_strategy().extended.call_for_each_replica, *args)
    elif not tf.distribute.has_strategy() or _keras.replicas_need_no_merge_call():
        action(run, *args)
    else:
        tf.distribute.get_replica_context().merge_call(
            lambda strategy, *args: action(strategy.extended.call_for_each_replica, *args), args
        )


def run_on_replicas_if(is_due, action):
    """Calls `action(run)` if `is_due()`, in a context where replicas may be synchronised.

    Args:
        is_due: Function that returns a scalar bool tensor, the same on all replicas.
        action: Function that takes `run`, as in `across_replicas`.
    """
    across_replicas(lambda run: run_if(is_due(), lambda: action(run)))
