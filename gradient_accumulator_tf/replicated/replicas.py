"""Replicas of a `tf.distribute` strategy: their number, sums over them, strategies that work."""

import contextlib

import tensorflow as tf

from gradient_accumulator_tf import _keras


def number_of_replicas():
    """Replicas in sync under the strategy in force; 1 without one."""
    return tf.distribute.get_strategy().num_replicas_in_sync


@contextlib.contextmanager
def lone_replica():
    """Within this context the only replica of a strategy may synchronise anywhere.

    A strategy's own replica context waits for other replicas even if there are none. So it refuses
    layers and metrics that synchronise in a loop or conditional. With several replicas, or without
    a strategy, nothing changes.
    """
    strategy = tf.distribute.get_strategy()
    in_replica = tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()
    if in_replica and number_of_replicas() == 1:
        # A reduction needs a device, and a tensor in a loop's body reports none by itself.
        (device,) = strategy.extended.worker_devices
        with tf.distribute.ReplicaContext(strategy, replica_id_in_sync_group=0), tf.device(device):
            yield
    else:
        yield


def sum_over_replicas(tensors):
    """Sums each tensor over all replicas. Must be called in replica context.

    There is one reduction for each dtype, because one message cannot hold several.

    Args:
        tensors: Nested structure of dense tensors and None.

    Returns:
        The same structure, the same on all replicas.
    """
    if number_of_replicas() == 1:
        return tensors
    context = tf.distribute.get_replica_context()
    flat = tf.nest.flatten(tensors)
    for dtype in dict.fromkeys(t.dtype for t in flat if t is not None):
        places = [i for i, t in enumerate(flat) if t is not None and t.dtype == dtype]
        # `all_reduce` needs a device, and a value read from a variable reports none.
        here = [tf.identity(flat[i]) for i in places]
        sums = context.all_reduce(tf.distribute.ReduceOp.SUM, here)
        for i, total in zip(places, sums, strict=True):
            flat[i] = total
    return tf.nest.pack_sequence_as(tensors, flat)


def undo_averaging(value):
    """`value` times the number of replicas.

    Under a strategy Keras divides every mean, and so its gradient, by the number of replicas, since
    it adds the gradients up over them. A mean that is weighed by this replica's own examples must
    not be divided.

    Args:
        value: Number or scalar tensor.
    """
    return value * number_of_replicas()


def on_average_replica(total):
    """A sum over all replicas divided by their number; None stays None.

    It is the share in which Keras divides means: see `undo_averaging`.
    """
    return None if total is None else total / number_of_replicas()


def rows_of_all_replicas(tensor):
    """The rows of all replicas as one tensor, in the order of the replicas.

    Must be called in replica context, outside of loops and conditionals.
    """
    if number_of_replicas() == 1:
        return tensor
    # It needs a device, and a value read from a variable reports none.
    return tf.distribute.get_replica_context().all_gather(tf.identity(tensor), axis=0)


def own_rows(rows, number):
    """The reverse of `rows_of_all_replicas`: this replica's `number` rows."""
    if number_of_replicas() == 1:
        return rows
    context = tf.distribute.get_replica_context()
    numbers = context.all_gather(tf.reshape(number, [1]), axis=0)
    start = tf.reduce_sum(numbers[: context.replica_id_in_sync_group])
    return rows[start : start + number]


@contextlib.contextmanager
def as_on_one_device():
    """Within this context Keras divides no mean by the number of replicas.

    For a loss over the examples of all replicas, which each replica computes as a whole. Variables
    are read as this replica has them. None may be assigned within it, and nothing synchronised.
    """
    context = tf.distribute.get_replica_context()
    devices = context.strategy.extended.worker_devices
    # A variable has a copy for each replica of this worker. Workers have equally many.
    replica = int(tf.get_static_value(context.replica_id_in_sync_group)) % len(devices)
    device = devices[replica]
    strategy = tf.distribute.OneDeviceStrategy(device)
    alone = tf.distribute.ReplicaContext(strategy, replica_id_in_sync_group=replica)
    with alone, tf.device(device):
        yield


def check_strategy():
    """Raises ValueError if nothing here can work under the strategy in force."""
    strategy = tf.distribute.get_strategy()
    if _keras.is_parameter_server(strategy):
        raise ValueError(
            "Accumulating needs a strategy under which replicas train in step and each has "
            f"variables of its own. Received: {type(strategy).__name__}, which keeps variables "
            "on devices that do not compute. Use tf.distribute.MirroredStrategy (one machine) "
            "or tf.distribute.MultiWorkerMirroredStrategy (several)."
        )


def prepare_fit():
    """Mends Keras's `fit`, for the rest of the process, if the strategy in force needs it."""
    if isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
        _keras.mend_fit_on_several_workers()


def check_made_under(strategy, optimizer):
    """Raises ValueError unless an optimizer was made under the strategy that trains with it."""
    made = _keras.strategy_of(optimizer)
    if made is not strategy:
        raise ValueError(
            "An optimizer must be made in the scope of the strategy that trains with it. Received: "
            f"{type(optimizer).__name__} made under {type(made).__name__}, to train under "
            f"{type(strategy).__name__}. Make model and optimizer, and compile, within "
            "`with strategy.scope():`."
        )
