"""Conditionals for side effects, on one replica and on all of them."""

import tensorflow as tf

from gradient_accumulator_tf import _keras


def run_if(condition, function):
    """Runs `function()` if `condition`, a scalar bool tensor, holds.

    XLA copies every variable around a conditional, and updates them in place in a loop of no or
    one turn. Without XLA the conditional is cheaper than the loop.
    """

    def branch(*_):
        function()
        return tf.constant(False)

    if _keras.compiles_with_xla():
        tf.while_loop(lambda due: due, branch, (condition,), parallel_iterations=1)
    else:
        tf.cond(condition, branch, lambda: tf.constant(False))


def across_replicas(action, *args):
    """Calls `action(run, *args)` where a conditional may hold what synchronises replicas.

    `run(function, args=())` then runs a function on every replica. To be called on every replica,
    or outside of them.

    Args:
        action: Function that takes `run` and `args`.
        *args: Nested structures of tensors and None, of each replica's own; `run` hands them on.
    """

    def run(function, args=()):
        return function(*args)

    # A replica may not synchronise in a conditional; one outside the replicas may run them. Nor may
    # the only replica of a strategy, whose optimizers make their merge calls all the same.
    if tf.distribute.in_cross_replica_context():
        action(tf.distribute.get_strategy().extended.call_for_each_replica, *args)
    elif not tf.distribute.has_strategy() or _keras.replicas_need_no_merge_call():
        action(run, *args)
    else:
        tf.distribute.get_replica_context().merge_call(
            lambda strategy, *args: action(strategy.extended.call_for_each_replica, *args), args
        )


def run_on_replicas_if(is_due, action):
    """Calls `action(run)` across replicas if `is_due()`; the functions may talk to other replicas.

    Args:
        is_due: Function that returns a scalar bool tensor, the same on all replicas.
        action: Function that takes `run`; see `across_replicas`.
    """
    across_replicas(lambda run: run_if(is_due(), lambda: action(run)))
