"""What replicas of a `tf.distribute` strategy tell each other: sums, once per update."""

import tensorflow as tf


def number_of_replicas():
    """Replicas in sync under the strategy in force; 1 without one."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(tensors):
    """Each tensor's sum over all replicas; to be called in replica context.

    One reduction for each dtype, as one message cannot hold several.

    Args:
        tensors: Nested structure of dense tensors and None.
    """
    if number_of_replicas() == 1:
        return tensors
    context = tf.distribute.get_replica_context()
    flat = tf.nest.flatten(tensors)
    for dtype in dict.fromkeys(t.dtype for t in flat if t is not None):
        places = [i for i, t in enumerate(flat) if t is not None and t.dtype == dtype]
        sums = context.all_reduce(tf.distribute.ReduceOp.SUM, [flat[i] for i in places])
        for i, total in zip(places, sums, strict=True):
            flat[i] = total
    return tf.nest.pack_sequence_as(tensors, flat)
