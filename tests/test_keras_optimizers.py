"""What `_keras` reads of an optimizer is still there, and still needed."""

import keras
import pytest
import tensorflow as tf

from gradient_accumulator_tf import _keras
from tests.oracle import mirrored


@pytest.mark.fast
def test_variable_key_knows_a_keras_variable_by_its_tensorflow_variable():
    optimizer, variable = keras.optimizers.SGD(), keras.Variable(0.0)
    assert _keras.variable_key(optimizer, variable) == _keras.variable_key(
        optimizer, variable.value
    )


@pytest.mark.fast
def test_the_strategy_that_an_optimizer_was_made_under():
    assert _keras.strategy_of(keras.optimizers.SGD()) is tf.distribute.get_strategy()
    strategy = mirrored()
    with strategy.scope():
        optimizer = keras.optimizers.SGD()
    assert _keras.strategy_of(optimizer) is strategy


@pytest.mark.fast
def test_gradients_over_replicas_are_summed_once():
    # Whoever comes first sums; then they are the same on all replicas, and stay as they are.
    strategy = mirrored()
    with strategy.scope():
        optimizer, variable = keras.optimizers.SGD(), keras.Variable(0.0)

    def on_replica():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        gradient = tf.cast(replica, tf.float32) + 1.0
        summed = _keras.gradients_over_replicas(optimizer, [gradient, None], [variable, variable])
        with _keras.replicas_agree(optimizer):
            again = _keras.gradients_over_replicas(optimizer, summed, [variable, variable])
        assert again[1] is None
        return summed[0], again[0]

    for value in strategy.run(on_replica):
        assert [float(v) for v in strategy.experimental_local_results(value)] == [3.0, 3.0]


@pytest.mark.fast
def test_an_optimizer_rebuilt_for_other_variables():
    a, b, c = (keras.Variable(float(i), name=name) for i, name in enumerate("abc"))
    optimizer = keras.optimizers.SGD(1.0, momentum=0.5, use_ema=True, ema_momentum=0.5)
    optimizer.exclude_from_weight_decay(var_list=[b], var_names=["c"])
    optimizer.build([a, b])
    optimizer.apply([tf.constant(1.0), tf.constant(2.0)], [a, b])
    with pytest.raises(ValueError, match="recreate a new optimizer"):  # else this can go
        optimizer.apply([tf.constant(1.0)], [c])
    copy = _keras.rebuilt_optimizer(optimizer, [c, b])
    state = {v.path.split("/")[-1]: float(v) for v in copy.variables}
    slots = {name: value for name, value in state.items() if "momentum" in name}
    assert sorted(slots.values()) == [-2.0, 0.0]
    averages = {name: value for name, value in state.items() if "average" in name}
    assert sorted(averages.values()) == [-1.0, 2.0]  # of b so far, and of c as it is
    assert (state["iteration"], state["learning_rate"]) == (1.0, 1.0)
    assert [copy._use_weight_decay(v.value) for v in (b, c)] == [False, False]
    assert copy._use_weight_decay(a.value)
    copy.apply([tf.constant(1.0), tf.constant(0.0)], [c, b])
    assert (float(c), float(b)) == (1.0, -2.0)
