"""What `_keras` reads of how TensorFlow runs a step is still there, and still needed."""

import keras
import pytest
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.replicated.variables import sum_variable
from tests.oracle import mirrored


@pytest.mark.fast
def test_xla_is_seen_while_it_traces():
    seen = []

    def function():
        seen.append(_keras.compiles_with_xla())

    function()
    tf.function(function)()
    tf.function(function, jit_compile=True)()
    assert seen == [False, False, True]


@pytest.mark.fast
def test_a_replica_must_not_synchronise_in_a_conditional_on_cpus():
    with mirrored().scope():
        assert not _keras.replicas_need_no_merge_call()


def test_a_replicas_own_variable_of_a_sum():
    # When a distributed variable takes `scatter_add`, `replica_local` can go.
    strategy = mirrored()
    with strategy.scope():
        total = sum_variable((2,), tf.float32, "total")
        variable = keras.Variable([0.0, 0.0])

    def on_replica():
        with pytest.raises((AttributeError, NotImplementedError, ValueError)):
            total.scatter_add(tf.IndexedSlices([1.0], [0]))
        _keras.replica_local(total).scatter_add(tf.IndexedSlices([1.0], [1]))
        _keras.assign_on_replica(variable, [1.0, 2.0])

    strategy.run(on_replica)
    assert total.read_value().numpy().tolist() == [0.0, 2.0]
    for value in strategy.experimental_local_results(variable.value):
        assert value.numpy().tolist() == [1.0, 2.0]
    assert _keras.replica_local(variable) is variable


@pytest.mark.fast
def test_strategies_that_keep_variables_elsewhere():
    central = tf.distribute.experimental.CentralStorageStrategy(["CPU:0"], "CPU:1")
    assert _keras.is_parameter_server(central)
    assert not _keras.is_parameter_server(mirrored())
    assert not _keras.is_parameter_server(tf.distribute.get_strategy())
