"""What a file says of a cycle, in each format, loaded for another number of micro-batches."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from gradient_accumulator_tf.optimizers.cycle import cycle_of
from tests.oracle import difference, mirrored, state_of, updates_of

# One weight, of which the gradient is the input: `add_loss` of weight times input.
GRADIENTS = [3.0, 6.0, 0.0, 12.0, 4.0, 2.0, 8.0, 5.0, 1.0, 7.0]


class Weight(keras.layers.Layer):
    def build(self, shape):
        self.weight = self.add_weight(shape=(), initializer="zeros")

    def call(self, x):
        return self.weight * x


def _loss(y, prediction):
    return prediction


def _model(accum_steps, momentum=0.5, scaled=False, **kwargs):
    optimizer = keras.optimizers.SGD(1.0, momentum=momentum)
    optimizer = GradientAccumulateOptimizer(optimizer, accum_steps, **kwargs)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0)
    model = keras.Sequential([keras.Input((1,)), Weight()])
    model.compile(optimizer, _loss)
    return model


def _micro_steps(model, gradients):
    for gradient in gradients:
        model.train_on_batch(np.array([[gradient]]), np.zeros((1, 1)))


def _weight(model):
    return float(model.get_weights()[0])


def _by_hand(cycles, momentum=0.5):
    """The weight after an update with the mean of each of `cycles`."""
    weight = velocity = 0.0
    for cycle in cycles:
        velocity = momentum * velocity - np.mean(cycle)
        weight += velocity
    return weight


def _into(new, built):
    if built:
        new.optimizer.build(new.trainable_variables)
    return new


def keras_file(model, new, folder, built):
    del new, built
    model.save(folder / "model.keras")
    objects = {"Weight": Weight, "_loss": _loss}
    return keras.models.load_model(folder / "model.keras", custom_objects=objects)


def weights_file(model, new, folder, built):
    model.save_weights(folder / "model.weights.h5")
    _into(new, built).load_weights(folder / "model.weights.h5")
    return new


def checkpoint(model, new, folder, built):
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(folder / "ckpt")
    restored = tf.train.Checkpoint(model=_into(new, built), optimizer=new.optimizer).restore(path)
    if built and cycle_of(model.optimizer).accumulates:
        restored.assert_consumed()
    return new


def backup(model, new, folder, built):
    """Of BackupAndRestore, what it does at an epoch's end and at the next fit's begin."""
    writer = keras.callbacks.BackupAndRestore(str(folder))
    writer.set_model(model)
    writer.on_train_begin()
    writer.on_epoch_end(0)
    reader = keras.callbacks.BackupAndRestore(str(folder))
    reader.set_model(_into(new, built))
    reader.on_train_begin()
    return new


FORMATS = [keras_file, weights_file, checkpoint, backup]
# A `.keras` file makes its own, which is built.
OTHERS = [(form, built) for form in FORMATS[1:] for built in (True, False)]


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss_scale"])
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("form, built", OTHERS)
def test_an_open_cycle_goes_on_and_the_next_has_the_scripts_length(
    form, built, steps, scaled, tmp_path
):
    model = _model(3, scaled=scaled)
    _micro_steps(model, GRADIENTS[:5])
    loaded = form(model, _model(steps, scaled=scaled), tmp_path, built)
    assert loaded.optimizer.accum_steps == steps
    _into(loaded, True)
    assert int(loaded.optimizer.micro_step) == 2 and int(loaded.optimizer.steps_in_cycle) == 3
    _micro_steps(loaded, GRADIENTS[5:])
    cycles = [GRADIENTS[:3], GRADIENTS[3:6]]
    rest = GRADIENTS[6 : 6 + 4 // steps * steps]
    cycles += np.reshape(rest, (-1, steps)).tolist()
    assert _weight(loaded) == pytest.approx(_by_hand(cycles), abs=1e-5)
    assert updates_of(loaded.optimizer) == len(cycles)
    assert int(loaded.optimizer.micro_step) == 4 % steps
    assert _weight(model) != pytest.approx(_weight(loaded))


@pytest.mark.parametrize("form, built", [(keras_file, True), *OTHERS])
def test_set_to_one_in_mid_cycle_the_cycle_is_not_lost(form, built, tmp_path):
    model = _model(3, momentum=0.0)
    _micro_steps(model, GRADIENTS[:2])
    model.optimizer.accum_steps = 1
    loaded = form(model, _model(3, momentum=0.0), tmp_path, built)
    assert loaded.optimizer.accum_steps == 1  # set by hand, so it is saved
    _micro_steps(loaded, [0.0])
    assert _weight(loaded) == pytest.approx(-3.0)
    _micro_steps(loaded, [1.0])
    assert _weight(loaded) == pytest.approx(-4.0)
    loaded.optimizer.accum_steps = 3
    _micro_steps(loaded, GRADIENTS[:3])
    assert _weight(loaded) == pytest.approx(-7.0)


@pytest.mark.filterwarnings("ignore:The loss .* reduces to one number:UserWarning")  # a mean
@pytest.mark.fast
@pytest.mark.parametrize("form", [keras_file, checkpoint])
def test_of_a_model_wrapper_too(form, tmp_path):
    def make(accum_steps):
        net = keras.Sequential([keras.Input((1,)), Weight()])
        model = GradientAccumulateModel(model=net, accum_steps=accum_steps)
        model.compile(keras.optimizers.SGD(1.0), _loss)
        return model

    model = make(3)
    _micro_steps(model, GRADIENTS[:2])
    model.accum_steps = 1
    loaded = form(model, make(1), tmp_path, True)
    assert loaded.accum_steps == 1
    _micro_steps(loaded, [0.0, 1.0])
    assert _weight(loaded) == pytest.approx(-4.0)
    loaded.accum_steps = 3
    _micro_steps(loaded, GRADIENTS[:3])
    assert _weight(loaded) == pytest.approx(-7.0)


@pytest.mark.parametrize("form, built", [(keras_file, True), *OTHERS])
@pytest.mark.parametrize("constructed, by_hand", [(1, 3), (3, 1), (3, 5)])
def test_what_was_set_by_hand_is_saved_between_cycles_too(
    form, built, constructed, by_hand, tmp_path
):
    model = _model(constructed)
    _micro_steps(model, GRADIENTS[:constructed])
    model.optimizer.accum_steps = by_hand
    loaded = form(model, _model(constructed), tmp_path, built)
    assert loaded.optimizer.accum_steps == by_hand
    _micro_steps(loaded, GRADIENTS[:by_hand])
    expected = _by_hand([GRADIENTS[:constructed], GRADIENTS[:by_hand]])
    assert _weight(loaded) == pytest.approx(expected, abs=1e-5)
    again = form(loaded, _model(constructed), tmp_path, built)
    assert again.optimizer.accum_steps == by_hand


@pytest.mark.parametrize("form, built", [(keras_file, True), *OTHERS])
def test_without_sums_none_are_loaded(form, built, tmp_path):
    model = _model(1)
    _micro_steps(model, GRADIENTS[:2])
    loaded = form(model, _model(1), tmp_path, built)
    _micro_steps(loaded, GRADIENTS[2:4])
    assert loaded.optimizer.variables == loaded.optimizer.inner_optimizer.variables
    assert _weight(loaded) == pytest.approx(_by_hand([[g] for g in GRADIENTS[:4]]), abs=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("form", FORMATS[1:])
def test_a_file_without_a_cycle_ends_the_one_at_hand(form, tmp_path):
    model = _model(1, momentum=0.0)
    _micro_steps(model, [2.0])
    new = _model(3, momentum=0.0)
    _micro_steps(new, [100.0])
    loaded = form(model, new, tmp_path, True)
    assert int(loaded.optimizer.micro_step) == 0
    _micro_steps(loaded, GRADIENTS[:3])
    assert _weight(loaded) == pytest.approx(-2 - 3)


def test_a_schedule_at_hand_holds(tmp_path):
    for form in (weights_file, checkpoint):
        model = _model(3)
        model.optimizer.accum_steps = 2
        _micro_steps(model, GRADIENTS[:3])
        loaded = form(model, _model({0: 1, 2: 3}), tmp_path, True)
        assert loaded.optimizer.accum_steps.steps == {0: 1, 2: 3}
        assert int(loaded.optimizer.micro_step) == 1


def test_a_checkpoint_of_several_denominators_is_flushed_whole(tmp_path):
    # Its second group of sums comes with the first micro-batch that needs it.
    def make():
        inputs = keras.Input((1,))
        outputs = {"a": Weight(name="a")(inputs), "b": Weight(name="b")(inputs)}
        model = GradientAccumulateModel(inputs, outputs, accum_steps=3)
        weighted = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
        model.compile(keras.optimizers.SGD(0.1), {"a": weighted, "b": "mse"})
        return model

    x, y = np.ones((2, 1)), {"a": np.ones((2, 1)), "b": np.ones((2, 1))}
    weights = {"a": np.array([0.5, 2.0]), "b": np.ones(2)}
    model = make()
    for _ in range(2):
        model.train_on_batch(x, y, sample_weight=weights)
    path = tf.train.Checkpoint(model).save(tmp_path / "ckpt")
    new = make()
    new.optimizer.build(new.trainable_variables)
    tf.train.Checkpoint(new).restore(path).assert_consumed()
    for m in (model, new):
        m.flush()
    assert min(abs(w) for w in state_of(model.weights)) > 0.1
    assert difference(state_of(new.weights), state_of(model.weights)) == 0.0


def test_a_checkpoint_cannot_be_restored_under_a_function_without_sums(tmp_path):
    model = _model(3)
    _micro_steps(model, GRADIENTS[:2])
    path = tf.train.Checkpoint(optimizer=model.optimizer).save(tmp_path / "ckpt")
    variable = keras.Variable(0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0, momentum=0.5), 1)
    optimizer.build([variable])
    tf.function(lambda g: optimizer.apply([g], [variable]))(tf.constant(1.0))
    with pytest.raises(ValueError, match="of your own calls"):
        tf.train.Checkpoint(optimizer=optimizer).restore(path)


def test_a_loss_scale_shares_files_with_that_of_a_plain_optimizer(tmp_path):
    plain = keras.Sequential([keras.Input((1,)), Weight()])
    inner = keras.optimizers.SGD(1.0, momentum=0.5)
    plain.compile(keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0), _loss)
    _micro_steps(plain, [3.0])
    model = weights_file(plain, _model(3, scaled=True), tmp_path, True)
    assert float(model.optimizer.dynamic_scale) == 2.0 and updates_of(model.optimizer) == 1
    _micro_steps(model, GRADIENTS[:3])
    plain.optimizer.dynamic_scale.assign(1.0)
    weights_file(model, plain, tmp_path, False)
    expected = state_of(model.optimizer.inner_optimizer.inner_optimizer.variables)
    assert difference(state_of(plain.optimizer.inner_optimizer.variables), expected) == 0.0
    assert float(plain.optimizer.dynamic_scale) == 2.0


def test_a_loss_scale_that_is_not_built_keeps_what_is_loaded(tmp_path):
    model = _model(3, scaled=True)
    _micro_steps(model, GRADIENTS[:2])
    model.optimizer.dynamic_scale.assign(16.0)
    loaded = weights_file(model, _model(1, scaled=True), tmp_path, False)
    loaded.optimizer.build(loaded.trainable_variables)
    assert float(loaded.optimizer.dynamic_scale) == 16.0


@pytest.mark.parametrize("replicas", [1, 2])
def test_on_replicas(replicas, tmp_path):
    def micro_steps(model, gradients):
        for gradient in gradients:
            model.train_on_batch(np.full((2, 1), gradient), np.zeros((2, 1)))

    with mirrored(replicas).scope():
        model, new = _model(3), _into(_model(2), True)
    micro_steps(model, GRADIENTS[:2])
    loaded = checkpoint(model, new, tmp_path, False)
    assert int(tf.convert_to_tensor(loaded.optimizer.micro_step)) == 2
    for m in (model, loaded):
        micro_steps(m, GRADIENTS[2:3])
    assert _weight(loaded) == _weight(model) < -1
    assert int(tf.convert_to_tensor(loaded.optimizer.micro_step)) == 0
    micro_steps(loaded, GRADIENTS[:2])
    assert updates_of(loaded.optimizer) == 2


@pytest.mark.fast
def test_an_asynchronous_checkpoint(tmp_path):
    model = _model(3, momentum=0.0)
    _micro_steps(model, GRADIENTS[:2])
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    options = tf.train.CheckpointOptions(enable_async=True)
    path = saved.save(tmp_path / "ckpt", options=options)
    saved.sync()
    new = _into(_model(1, momentum=0.0), True)
    tf.train.Checkpoint(model=new, optimizer=new.optimizer).restore(path).assert_consumed()
    _micro_steps(new, [0.0])
    assert _weight(new) == pytest.approx(-3.0)


@pytest.mark.fast
def test_backups_within_fits(tmp_path):
    # The whole of it: a fit that is interrupted in an epoch, and one that goes on with another 5.
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.epoch == 1:
                raise KeyboardInterrupt

        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

    def fit(model, *callbacks):
        callbacks = [keras.callbacks.BackupAndRestore(str(tmp_path)), *callbacks]
        x = np.array(GRADIENTS[:4])[:, np.newaxis]
        fit = {"batch_size": 1, "epochs": 2, "shuffle": False, "verbose": 0}
        model.fit(x, np.zeros((4, 1)), callbacks=callbacks, **fit)

    with contextlib.suppress(KeyboardInterrupt), pytest.warns(UserWarning, match="broke off"):
        fit(_model(3), Interrupt())
    model = _model(5)
    fit(model)
    cycles = [GRADIENTS[:3], [GRADIENTS[3], *GRADIENTS[:2]], GRADIENTS[2:4]]
    assert _weight(model) == pytest.approx(_by_hand(cycles), abs=1e-5)
