"""KerasTuner searches over accumulating models, and over what they accumulate."""

import keras
import pytest

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.clients import client
from tests.oracle import EFFECTIVE, dense_model, regression_data, updates_of

keras_tuner = client("keras_tuner")

pytestmark = pytest.mark.filterwarnings("default")

EXAMPLES = 2 * EFFECTIVE


def with_optimizer(hp):
    steps = hp.Choice("steps", [1, 3])
    model = dense_model()
    model.compile(GradientAccumulateOptimizer("sgd", accum_steps=steps), "mse")
    return model, EXAMPLES // (4 * steps)


def across_steps(hp):
    steps = hp.Choice("steps", [1, 3])
    model = GradientAccumulateModel(model=dense_model(), accum_steps=steps)
    model.compile("sgd", "mse")
    return model, EXAMPLES // (4 * steps)


def within_a_step(hp):
    size = hp.Choice("steps", [2, 4])
    model = GradientAccumulateModel(model=dense_model(), micro_batch_size=size)
    model.compile("sgd", "mse")
    return model, EXAMPLES // 4


@pytest.mark.parametrize("build", [with_optimizer, across_steps, within_a_step])
def test_a_search_trains_each_trial_with_its_own_accumulation(build, tmp_path):
    x, y, _ = regression_data(EXAMPLES)
    updates = []

    class Count(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            if hasattr(self.model.optimizer, "flush"):
                self.model.optimizer.flush()
            updates.append(updates_of(self.model.optimizer))

    tuner = keras_tuner.GridSearch(
        lambda hp: build(hp)[0], objective="val_loss", directory=tmp_path, max_trials=2
    )
    fit = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
    tuner.search(x, y, validation_data=(x, y), callbacks=[Count()], **fit)
    expected = []
    for trial in tuner.oracle.trials.values():
        model, updates_per_epoch = build(trial.hyperparameters)
        history = model.fit(x, y, validation_data=(x, y), **fit).history
        assert trial.score == pytest.approx(min(history["val_loss"]), rel=1e-5)
        expected.append(2 * updates_per_epoch)
    assert updates == expected and len(updates) == 2
    best = tuner.get_best_models(1)[0]
    scores = [trial.score for trial in tuner.oracle.trials.values()]
    assert best.evaluate(x, y, verbose=0) == pytest.approx(min(scores), rel=1e-5)
