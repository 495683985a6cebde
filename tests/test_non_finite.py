"""Gradients with an inf or a nan in them: passed on, or dropped, counted and shown."""

from typing import get_args

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import (
    AccumBatchNorm,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
)
from gradient_accumulator_tf.cycle.non_finite import POLICIES, NonFinite
from tests.oracle import (
    EFFECTIVE,
    MICRO,
    WAYS,
    dense_model,
    difference,
    in_way,
    mirrored,
    regression_data,
    state_of,
    updates_of,
)

CYCLES = 4
DROPPING = ["drop_micro_batch", "drop_cycle"]


def test_type_checkers_know_every_policy():
    assert get_args(NonFinite) == tuple(POLICIES)


def _sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def _model(way, policy, make_model=dense_model, optimizer=_sgd, replicas=1, **compile_with):
    """An accumulating model, and the batch size for `fit`."""
    model, optimizer, batch_size = in_way(
        way, make_model(), optimizer(), replicas=replicas, non_finite=policy
    )
    model.compile(optimizer, **{"loss": "mse", **compile_with})
    return model, batch_size


def _data(bad, value=np.nan):
    """Inputs and targets of `CYCLES` cycles, the targets of examples `bad` spoiled."""
    x, y, _ = regression_data(CYCLES * EFFECTIVE)
    y[bad] = value
    return x, y


def _kept(policy, bad, shares=(MICRO,) * 3):
    """For each cycle, the examples that the policy leaves, of shares of so many examples."""
    kept = []
    for start in range(0, CYCLES * EFFECTIVE, EFFECTIVE):
        left = []
        for size in (EFFECTIVE,) if policy == "drop_cycle" else shares:
            share, start = range(start, start + size), start + size
            left += [] if set(share) & set(bad) else share
        kept.append(left)
    return kept


def _large(x, y, kept, make_model=dense_model, optimizer=_sgd):
    """The plain model after an update for each list of examples that is not empty; its losses."""
    model = make_model()
    model.compile(optimizer(), "mse")
    losses = []
    for k in filter(None, kept):
        model.reset_metrics()  # Keras 3.8 does not
        losses.append(model.train_on_batch(x[k], y[k]))
    return model, losses


# One micro-batch of cycle 0, two of cycle 1, all of cycle 2, and none of cycle 3.
BAD = [5, 12, 15, 20, 24, 29, 35]
DROPPED = {"drop_micro_batch": (1 + 2 + 3, 1), "drop_cycle": (0, 3)}


@pytest.mark.parametrize(
    "way, policy, execution",
    [
        *((way, policy, "graph") for way in WAYS for policy in DROPPING),
        ("optimizer", "drop_micro_batch", "eager"),
        ("optimizer", "drop_micro_batch", "jit"),
        ("accum_steps", "drop_micro_batch", "steps_per_execution"),
        ("micro_batch_size", "drop_micro_batch", "eager"),
        ("micro_batch_size", "drop_micro_batch", "jit"),
    ],
    indirect=["execution"],
)
def test_the_update_is_the_large_batchs_without_what_was_dropped(way, policy, execution):
    x, y = _data(BAD)
    model, batch_size = _model(way, policy, **execution)
    history = model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0).history
    kept = _kept(policy, BAD)
    large, losses = _large(x, y, kept)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6
    assert updates_of(model.optimizer) == updates_of(large.optimizer) == 4 - DROPPED[policy][1]
    owner = model.optimizer if way == "optimizer" else model
    counts = owner.dropped_micro_steps, owner.dropped_cycles
    assert tuple(int(c.numpy()) for c in counts) == DROPPED[policy]
    assert all(c.dtype == "int64" for c in counts)
    if way == "optimizer":
        return
    assert (history["dropped_micro_steps"], history["dropped_cycles"]) == (
        [DROPPED[policy][0]],
        [DROPPED[policy][1]],
    )
    if way == "micro_batch_size":
        sizes = [len(k) for k in kept if k]
        np.testing.assert_allclose(history["loss"], np.dot(losses, sizes) / sum(sizes), rtol=1e-5)
    assert np.isfinite(history["loss"]).all()


def test_without_a_policy_they_reach_the_weights_as_the_large_batchs_do(way):
    x, y = _data([30])
    model, batch_size = _model(way, "propagate")
    history = model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0).history
    assert all(np.isnan(w).all() for w in model.get_weights())
    assert list(history) == ["loss"]
    owner = model.optimizer if way == "optimizer" else model
    assert (owner.dropped_micro_steps, owner.dropped_cycles) == (0, 0)


@pytest.mark.parametrize("policy", DROPPING)
def test_where_all_is_finite_no_policy_changes_anything(mode, policy):
    x, y = _data([])
    model, batch_size = _model(mode, policy)
    history = model.fit(x[:-5], y[:-5], batch_size=batch_size, shuffle=False, verbose=0).history
    plain, same_batch = _model(mode, "propagate")
    expected = plain.fit(x[:-5], y[:-5], batch_size=same_batch, shuffle=False, verbose=0).history
    assert difference(model.get_weights(), plain.get_weights()) < 1e-6
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_checked_by_hand(value, graph):
    a, b = keras.Variable([0.0, 0.0]), keras.Variable(0.0)
    optimizer = GradientAccumulateOptimizer(
        keras.optimizers.SGD(1.0), 3, non_finite="drop_micro_batch"
    )
    assert (optimizer.dropped_micro_steps, optimizer.dropped_cycles) == (0, 0)
    optimizer.build([a, b])
    step = lambda g, h, w: optimizer.apply([g, h], [a, b], weight=w)  # noqa: E731
    step = tf.function(step) if graph else step
    steps = [
        (([1.0, 2.0], 4.0, 1.0), [0, 0], 0),
        (([1.0, value], 9.0, 5.0), [0, 0], 0),  # all of it is dropped, and its weight
        (([5.0, 6.0], 0.0, 3.0), [-4, -5], -1),
        *[(([value, 1.0], 1.0, 1.0), [-4, -5], -1)] * 3,
        *[(([1.0, 1.0], value, 1.0), [-4, -5], -1)] * 2,
        (([1.0, 1.0], 2.0, 0.5), [-5, -6], -3),
    ]
    for (g, h, weight), expected_a, expected_b in steps:
        step(tf.constant(g), tf.constant(h), tf.constant(weight))
        assert (a.numpy().tolist(), float(b)) == (expected_a, expected_b)
    assert int(optimizer.dropped_micro_steps) == 6
    assert int(optimizer.dropped_cycles) == 1
    assert int(optimizer.iterations) == 2


def test_a_weight_that_is_not_finite_drops_its_micro_batch():
    variable = keras.Variable(0.0)
    optimizer = GradientAccumulateOptimizer(
        keras.optimizers.SGD(1.0), 2, non_finite="drop_micro_batch"
    )
    for weight in (np.nan, 2.0):
        optimizer.apply([tf.constant(3.0)], [variable], weight=tf.constant(weight))
    assert (float(variable), int(optimizer.dropped_micro_steps)) == (-3.0, 1)


@pytest.mark.fast
def test_sums_that_overflow_though_their_parts_are_finite_drop_the_cycle():
    variable = keras.Variable(0.0)
    for policy, dropped in (("drop_micro_batch", 1), ("drop_cycle", 1)):
        optimizer = GradientAccumulateOptimizer(
            keras.optimizers.SGD(1.0), 2, non_finite=policy, reduction="sum"
        )
        for _ in range(2):
            optimizer.apply([tf.constant(3e38)], [variable])
        assert (float(variable), int(optimizer.dropped_cycles)) == (0.0, dropped)


@pytest.mark.parametrize("policy", DROPPING)
def test_with_one_micro_batch_per_update(policy):
    x, y = _data([3])
    model = GradientAccumulateModel(model=dense_model(), accum_steps=1, non_finite=policy)
    model.compile(_sgd(), "mse")
    model.fit(x, y, batch_size=MICRO, shuffle=False, verbose=0)
    large = dense_model()
    large.compile(_sgd(), "mse")
    large.fit(x[MICRO:], y[MICRO:], batch_size=MICRO, shuffle=False, verbose=0)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6
    assert int(model.dropped_cycles) == 1


def test_denominators_go_with_what_is_dropped(mode):
    # Three denominators: examples (a regulariser), summed weights, and a sum without any.
    def make_model():
        inputs = keras.Input((5,))
        keras.utils.set_random_seed(1)
        hidden = keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.1))(inputs)
        return keras.Model(inputs, {n: keras.layers.Dense(1, name=n)(hidden) for n in "ab"})

    losses = {
        "a": keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        "b": keras.losses.MeanAbsoluteError(reduction="sum"),
    }
    x, y, weights = regression_data(EFFECTIVE)
    y[5] = np.inf
    model, batch_size = _model(mode, "drop_micro_batch", make_model, loss=losses)
    data = (x, {"a": y, "b": y}, {"a": weights, "b": weights})
    history = model.fit(
        *data[:2], batch_size, sample_weight=data[2], shuffle=False, verbose=0
    ).history
    large = make_model()
    large.compile(_sgd(), loss=losses)
    kept = [i for i in range(EFFECTIVE) if not MICRO <= i < 2 * MICRO]
    data = tf.nest.map_structure(lambda v: v[kept], data)
    expected = large.fit(*data[:2], EFFECTIVE, sample_weight=data[2], verbose=0).history
    assert difference(model.get_weights(), large.get_weights()) < 1e-6
    if mode == "micro_batch_size":
        for name, values in expected.items():
            assert history[name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize("policy", DROPPING)
def test_on_replicas_a_micro_batch_is_that_of_one_replica(way, policy):
    # Each has one half of a batch of fit. Cycle 2 has nothing finite.
    bad = [3, 13, 24, 26, 28, 30, 32, 34]
    with mirrored().scope():
        model, batch_size = _model(way, policy, replicas=2)
    x, y = _data(bad)
    history = model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0).history
    large, _ = _large(x, y, _kept(policy, bad, (2,) * 6))
    assert difference(model.get_weights(), large.get_weights()) < 1e-6
    for variable in model.trainable_variables:
        first, second = (v.numpy() for v in variable.value.values)
        assert np.array_equal(first, second)
    owner = model.optimizer if way == "optimizer" else model
    expected = {"drop_micro_batch": (8, 1), "drop_cycle": (0, 3)}[policy]
    counts = int(owner.dropped_micro_steps.numpy()), int(owner.dropped_cycles.numpy())
    assert counts == expected
    if way != "optimizer":
        assert (history["dropped_micro_steps"], history["dropped_cycles"]) == (
            [expected[0]],
            [expected[1]],
        )
        assert np.isfinite(history["loss"]).all()


def test_no_policy_makes_replicas_talk_more_often(way, monkeypatch):
    x, y = _data([])
    calls = []
    all_reduce = tf.distribute.ReplicaContext.all_reduce

    def counted(self, op, value, *args, **kwargs):
        calls.append(len(tf.nest.flatten(value)))
        return all_reduce(self, op, value, *args, **kwargs)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", counted)
    reductions = []
    for policy in ("propagate", "drop_micro_batch"):
        calls.clear()
        with mirrored().scope():
            model, batch_size = _model(way, policy)
        model.fit(x[:EFFECTIVE], y[:EFFECTIVE], batch_size=batch_size, verbose=0)
        reductions.append(len(calls))
    assert len(set(reductions)) == 1
    assert reductions[0] > 0


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


def _scaled():
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), 256.0, 3)


@pytest.mark.usefixtures("mixed_float16")
@pytest.mark.parametrize(
    "policy, replicas", [*((policy, 1) for policy in DROPPING), ("drop_micro_batch", 2)]
)
def test_the_loss_scale_moves_once_per_update(mode, policy, replicas):
    x, y = _data(BAD, 1e9)
    strategy = mirrored() if replicas == 2 else tf.distribute.get_strategy()
    with strategy.scope():
        model, batch_size = _model(mode, policy, optimizer=_scaled)
    shares = [MICRO // replicas] * 3 * replicas
    if replicas == 2 and mode == "micro_batch_size":
        shares = [4, 2, 4, 2]  # each replica cuts its half of the batch in two
    scales, updates = [], []
    for start in range(0, len(x), EFFECTIVE):
        end = start + EFFECTIVE
        model.fit(x[start:end], y[start:end], batch_size=batch_size, shuffle=False, verbose=0)
        scales.append(float(model.optimizer.dynamic_scale.numpy()))
        updates.append(updates_of(model.optimizer))
    # Halved after each of the cycles 0, 1 and 2; the fourth, without a fault, counts for growth.
    assert scales == [128.0, 64.0, 32.0, 32.0]
    assert int(model.optimizer.step_counter.numpy()) == 1
    kept = _kept(policy, BAD, shares)
    assert updates == np.cumsum([len(k) > 0 for k in kept]).tolist()
    lost = 0 if policy == "drop_cycle" else {3: 6, 4: 6, 6: 7}[len(shares)]
    assert int(model.dropped_micro_steps.numpy()) == lost
    assert int(model.dropped_cycles.numpy()) == [len(k) for k in kept].count(0)
    large, _ = _large(x, y, kept, optimizer=_scaled)
    assert difference(model.get_weights(), large.get_weights()) < 5e-3
    assert difference(model.get_weights(), dense_model().get_weights()) > 1e-2


@pytest.mark.usefixtures("mixed_float16")
def test_the_loss_scale_grows_as_without_a_policy(mode):
    x, y = _data([])
    scales = []
    for policy in ("propagate", *DROPPING):
        model, batch_size = _model(mode, policy, optimizer=_scaled)
        model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
        scales.append(float(model.optimizer.dynamic_scale))
    assert scales == [512.0] * 3


@pytest.mark.fast
def test_slices_are_dropped_and_their_rows_stay():
    table = keras.Variable(np.zeros((6, 2)))
    optimizer = GradientAccumulateOptimizer(
        keras.optimizers.SGD(1.0), 3, non_finite="drop_micro_batch"
    )
    for rows, value in (([1, 1], 3.0), ([1, 4], np.inf), ([2, 1], 6.0)):
        slices = tf.IndexedSlices(tf.fill((2, 2), value), tf.constant(rows), tf.constant([6, 2]))
        optimizer.apply([slices], [table])
    assert table.numpy()[:, 0].tolist() == [0, -6, -3, 0, 0, 0]


def test_statistics_of_batch_normalisation_leave_out_what_is_not_finite(mode):
    def make_model():
        norm = AccumBatchNorm(momentum=0.5)
        return keras.Sequential([keras.Input((5,)), norm, keras.layers.Dense(1)])

    x, y, _ = regression_data(2 * EFFECTIVE)
    x[5, 2] = np.nan  # of a micro-batch of cycle 0
    x[EFFECTIVE::MICRO, 0] = np.inf  # and of all of cycle 1
    model, batch_size = _model(mode, "drop_micro_batch", make_model)
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
    kept = np.concatenate([x[:MICRO], x[2 * MICRO : EFFECTIVE]])
    expected = [kept.mean(0) / 2, (kept.var(0) + 1) / 2]
    layer = model.layers[0]
    assert difference(state_of([layer.moving_mean, layer.moving_variance]), expected) < 1e-6
    assert (int(model.dropped_micro_steps), int(model.dropped_cycles)) == (1 + 3, 1)


def test_a_partial_cycle_of_nothing_finite_is_no_update():
    variable = keras.Variable(1.0)
    optimizer = GradientAccumulateOptimizer("sgd", 3, non_finite="drop_micro_batch")
    optimizer.apply([tf.constant(np.nan)], [variable])
    optimizer.flush()
    assert (float(variable), int(optimizer.iterations), int(optimizer.micro_step)) == (1.0, 0, 0)
    assert (int(optimizer.dropped_micro_steps), int(optimizer.dropped_cycles)) == (1, 1)


@pytest.mark.parametrize(
    "how, replicas", [("keras", 1), ("weights", 1), ("weights", 2), ("checkpoint", 2)]
)
def test_counts_are_saved_in_mid_cycle_too(how, replicas, tmp_path):
    strategy = mirrored() if replicas == 2 else tf.distribute.get_strategy()
    x, y = _data([1, 3, 13])

    def make():
        with strategy.scope():
            model, _ = _model("accum_steps", "drop_micro_batch")
            model.optimizer.build(model.trainable_variables)
        return model

    def train(model, first, last):
        model.make_train_function()
        for start in range(first * MICRO, last * MICRO, MICRO):
            batch = tf.data.Dataset.from_tensors((x[start:][:MICRO], y[start:][:MICRO]))
            batch = strategy.experimental_distribute_dataset(batch)
            model.train_function(iter(batch))

    model = make()
    train(model, 0, 4)  # one micro-step into the second cycle
    if how == "keras":
        model.save(tmp_path / "model.keras")
        resumed = keras.models.load_model(tmp_path / "model.keras")
    elif how == "weights":
        model.save_weights(tmp_path / "model.weights.h5")
        resumed = make()
        resumed.load_weights(tmp_path / "model.weights.h5")
    else:
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "c")
        resumed = make()
        restored = tf.train.Checkpoint(model=resumed, optimizer=resumed.optimizer).restore(path)
        restored.assert_consumed()
    for trained in (model, resumed):
        assert trained.non_finite == "drop_micro_batch"
        before = int(trained.dropped_micro_steps.numpy())
        assert before == (1 if replicas == 1 else 2)
        train(trained, 4, 6)
        assert int(trained.dropped_micro_steps.numpy()) == before + 1
    # On replicas each resumes with a part of the sum.
    assert difference(model.get_weights(), resumed.get_weights()) <= (replicas - 1) * 1e-6


def test_a_file_in_which_nothing_was_dropped_is_the_inner_optimizers_own(tmp_path):
    x, y = _data([])
    model, batch_size = _model("accum_steps", "drop_cycle")
    model.fit(x, y, batch_size=batch_size, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    plain = dense_model()
    plain.compile(_sgd(), "mse")
    plain.optimizer.build(plain.trainable_variables)
    plain.load_weights(tmp_path / "model.weights.h5")  # raises if it cannot load all
    assert updates_of(plain.optimizer) == CYCLES


@pytest.mark.parametrize("value", ["ignore", None, True])
def test_another_policy_is_refused(value):
    message = rf'"propagate" or "drop_micro_batch" or "drop_cycle".*non_finite={value!r}'
    with pytest.raises(ValueError, match=message):
        GradientAccumulateOptimizer("sgd", 2, non_finite=value)
    with pytest.raises(ValueError, match=message):
        GradientAccumulateModel(model=dense_model(), accum_steps=2, non_finite=value)


def test_the_models_optimizer_has_the_models_policy():
    model = GradientAccumulateModel(model=dense_model(), accum_steps=2, non_finite="drop_cycle")
    with pytest.raises(ValueError, match=r"non_finite='propagate'\) for .*non_finite='drop_cycle'"):
        model.compile(GradientAccumulateOptimizer("sgd", 2), "mse")
    model.compile(GradientAccumulateOptimizer("sgd", 2, non_finite="drop_cycle"), "mse")
    clone = GradientAccumulateModel.from_config(model.get_config())
    assert clone.non_finite == model.optimizer.non_finite == "drop_cycle"
    assert model.optimizer.get_config()["non_finite"] == "drop_cycle"
