"""What TensorFlow keeps private of how a step runs: XLA, strategies, variables of a replica."""

import tensorflow as tf


def compiles_with_xla():
    """Whether XLA will compile the trace in progress.

    `control_flow_util.GraphOrParentsInXlaContext`, which TensorFlow's own loops and recurrent
    layers ask. XLA needs all sizes when it compiles, and has no operation that scatters in place.
    Everything else only becomes slower or faster.
    """
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def replicas_need_no_merge_call():
    """Whether the strategy in force lets a replica synchronise inside a loop or conditional.

    `tf.__internal__.distribute.strategy_supports_no_merge_call`. It is true for XLA with GPUs only.
    Keras's own optimizers ask it too.
    """
    return tf.__internal__.distribute.strategy_supports_no_merge_call()


def replica_local(variable):
    """This replica's own variable of one that is summed over replicas when it is read.

    `DistributedVariable._get`. On a replica such a variable accepts `assign_add`, but not
    `scatter_add`.
    """
    return variable._get() if isinstance(variable, tf.distribute.DistributedValues) else variable


def assign_on_replica(variable, value):
    """Assigns a value to this replica's own copy of a Keras variable."""
    own = replica_local(variable.value)
    own.assign(tf.cast(value, own.dtype))


def is_parameter_server(strategy):
    """Whether a strategy keeps its variables on other devices than those that compute.

    TensorFlow has three such classes without a common base, so their names tell.
    """
    return any(
        "ParameterServer" in c.__name__ or "CentralStorage" in c.__name__
        for c in type(strategy).__mro__
    )


def data_of_trace():
    """List of the tensors by which the function being traced gets its data.

    `FuncGraph.inputs` are its arguments and what it captured. An operation whose type begins with
    "IteratorGetNext" returns what an iterator has.
    """
    if tf.executing_eagerly():
        return []
    graph = tf.compat.v1.get_default_graph()
    tensors = list(getattr(graph, "inputs", ()))
    for operation in graph.get_operations():
        if operation.type.startswith("IteratorGetNext"):
            tensors += operation.outputs
    # Variables and iterators come as resources.
    return [t for t in tensors if t.dtype not in (tf.resource, tf.variant)]
