"""Trainings that are really killed, at random moments, end as if they had not been."""

import contextlib
import io
import sys

import keras
import pytest
import tensorflow as tf

from examples import resume
from tests.oracle import ACROSS_STEPS, difference, in_way, regression_data

# Of 60 images 9 are held out: 7 micro-batches of 8 in an epoch, so that the optimizer's cycles of
# 3 are open at most epochs' ends. Ten kills and two ways to save are 20 for each wrapper.
SMALL = "--examples 60 --batch-size 24 --micro-batch-size 8 --epochs 20 --save-every 2 --kills 10"


@pytest.fixture(scope="module")
def killed():
    """What the example returns and prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        results = resume.main(SMALL.split())
    return results, printed.getvalue()


@pytest.mark.parametrize("saved_with", resume.SAVED_WITH)
@pytest.mark.parametrize("way", resume.WAYS)
def test_killed_trainings_end_with_the_weights_of_undisturbed_ones(killed, way, saved_with):
    (result,) = [r for r in killed[0] if r["way"] == way and r["saved_with"] == saved_with]
    assert result["kills"] == 10
    assert result["weight_difference"] == 0.0
    # Otherwise nothing could be lost.
    assert result["weight_movement"] > 1e-2
    assert result["resumed_after_updates"] > 3
    in_mid_cycle = result["resumed_in_mid_cycle"]
    if way == resume.WAYS[2] or (way, saved_with) == (resume.WAYS[1], resume.SAVED_WITH[0]):
        assert in_mid_cycle == 0  # all cycles are complete where they save
    else:
        assert in_mid_cycle > 2


def test_the_example_prints_its_table(killed):
    results, printed = killed
    assert resume.table(results) in printed
    assert len(results) == 6
    assert "resumed after (updates, micro-steps): (" in printed


def test_the_example_says_when_a_training_fails(monkeypatch):
    args = resume.parse(SMALL.split())
    args.batch_size = 0
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(RuntimeError, match="failed after 0 batches"):
        resume.live(resume.WAYS[0], resume.SAVED_WITH[1], None, args)


def test_the_example_refuses_sizes_that_do_not_fit(capsys):
    with pytest.raises(SystemExit):
        resume.parse(["--batch-size", "100", "--micro-batch-size", "32"])
    assert "multiple of --micro-batch-size. Received: 100 and 32." in capsys.readouterr().err


class Interrupted(keras.callbacks.Callback):
    """Stands for the kill where no process is needed to see what a file holds."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.after:
            raise KeyboardInterrupt


@pytest.mark.fast
@pytest.mark.parametrize("way", ACROSS_STEPS)
def test_random_layers_go_on_with_their_numbers(way, tmp_path):
    x, y, _ = regression_data(80)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)

    def train(folder, after=None):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [keras.Input((5,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
        )
        model, optimizer, _ = in_way(way, model, keras.optimizers.Adam(0.01))
        model.compile(optimizer, "mse")
        with contextlib.suppress(KeyboardInterrupt):
            resume.loop_with_checkpoints(model, dataset, 1, folder, 2, Interrupted(after))
        return model.get_weights()

    undisturbed = train(None)
    assert difference(train(str(tmp_path), after=13), undisturbed) > 1e-3
    assert difference(train(str(tmp_path)), undisturbed) == 0.0
