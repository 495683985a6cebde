"""AtomicBackupAndRestore: a training that is stopped anywhere goes on, bit for bit."""

import contextlib
import json
import os
import pathlib

import keras
import pytest

from gradient_accumulator_tf import AtomicBackupAndRestore
from tests.oracle import EFFECTIVE, MICRO, WAYS, dense_model, difference, in_way, regression_data

# What stops a training here is not a kill, which says nothing of the cycle that it leaves open.
pytestmark = pytest.mark.filterwarnings("ignore:`fit` broke off in mid-cycle:UserWarning")

STEPS = EFFECTIVE // MICRO
EPOCHS = 4


class Stop(BaseException):
    """Stands for the kill."""


class StopsAt(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise Stop


def train(folder=None, way="optimizer", stop=None, **backup):
    """Weights after `EPOCHS`, and the epochs run; of 5 micro-batches each, so in mid-cycle."""
    model, optimizer, batch_size = in_way(way, dense_model(), keras.optimizers.Adam(0.01))
    model.compile(optimizer, "mse")
    x, y, _ = regression_data(5 * MICRO)
    callbacks = [AtomicBackupAndRestore(folder, **backup)] if folder else []
    callbacks += [StopsAt(stop)] if stop else []
    fit = {"batch_size": batch_size, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    epochs = []
    with contextlib.suppress(Stop):
        epochs = model.fit(x, y, callbacks=callbacks, **fit).epoch
    return model.get_weights(), epochs


@pytest.mark.fast
@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_a_stopped_training_goes_on(way, tmp_path):
    folder = tmp_path / "backup"
    expected, _ = train(way=way)
    stopped, _ = train(folder, way, stop=2)
    assert difference(stopped, expected) > 1e-3
    assert sorted(os.listdir(folder)) == ["backup-1", "backup-2", "partial"]
    weights, epochs = train(folder, way)
    assert epochs == [2, 3]
    assert difference(weights, expected) == 0.0
    assert not folder.exists()


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_a_file(original, self, filepath, *args, **kwargs):
    """Writes weights as Keras does, and is stopped at half of them."""
    original(self, filepath, *args, **kwargs)
    halve(pathlib.Path(filepath))
    raise Stop


def stopped(*args, **kwargs):
    raise Stop


@pytest.mark.parametrize("where", ["weights", "between", "rename", "sync"])
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_kill_while_a_backup_is_written(where, when, tmp_path, monkeypatch):
    expected, _ = train()
    if when == "later":
        train(tmp_path, stop=2)
    with monkeypatch.context() as context:
        if where == "weights":
            save = keras.Model.save_weights
            context.setattr(keras.Model, "save_weights", lambda *a, **k: half_a_file(save, *a, **k))
        elif where == "between":
            context.setattr(json, "dumps", stopped)
        else:
            context.setattr(os, {"rename": "rename", "sync": "fsync"}[where], stopped)
        train(tmp_path)
    weights, epochs = train(tmp_path)
    assert epochs == ([2, 3] if when == "later" else [0, 1, 2, 3])
    assert difference(weights, expected) == 0.0


def spoil(folder, name):
    halve(folder / ("latest.weights.h5" if name == "weights" else "training_metadata.json"))


@pytest.mark.parametrize("what", ["weights", "epoch"])
def test_what_cannot_be_read_gives_way_to_the_one_before(what, tmp_path):
    expected, _ = train()
    train(tmp_path, stop=3)
    assert sorted(os.listdir(tmp_path)) == ["backup-2", "backup-3", "partial"]
    spoil(tmp_path / "backup-3", what)
    with pytest.warns(UserWarning, match=r"cannot be read .* from 'backup-2'"):
        weights, epochs = train(tmp_path, delete_checkpoint=False)
    assert epochs == [2, 3]
    assert difference(weights, expected) == 0.0
    # The spoiled one is not kept in place of a good one.
    assert sorted(os.listdir(tmp_path)) == ["backup-4", "backup-5"]


def test_nothing_is_begun_anew_in_silence(tmp_path):
    train(tmp_path, stop=2)
    for name in ("backup-1", "backup-2"):
        spoil(tmp_path / name, "epoch")
    with pytest.raises(json.JSONDecodeError):
        train(tmp_path)
    for name in ("backup-1", "backup-2"):
        (tmp_path / name / "training_metadata.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"must hold two files.*backup-2.*Delete .* to train"
    ):
        train(tmp_path)


def test_a_kill_while_backups_are_deleted(tmp_path, monkeypatch):
    expected, _ = train()
    with monkeypatch.context() as context:
        context.setattr(keras.callbacks.BackupAndRestore, "on_train_end", stopped)
        weights, _ = train(tmp_path)
    assert difference(weights, expected) == 0.0
    # A training that is over is not taken for one to go on with, from an older backup at that.
    assert train(tmp_path)[1] == [0, 1, 2, 3]


def test_a_backup_of_keras_is_read(tmp_path):
    expected, _ = train(way="plain")
    model = dense_model()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y, _ = regression_data(5 * MICRO)
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    fit = {"batch_size": EFFECTIVE, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    with contextlib.suppress(Stop):
        model.fit(x, y, callbacks=[backup, StopsAt(2)], **fit)
    weights, epochs = train(tmp_path, way="plain")
    assert epochs == [2, 3]
    assert difference(weights, expected) == 0.0


def test_a_backup_within_an_epoch_names_it(tmp_path):
    train(tmp_path, stop=2, save_freq=2)
    train(tmp_path, stop=3, save_freq=2)
    assert train(tmp_path, save_freq=2)[1] == [2, 3]


@pytest.mark.parametrize("folder", ["gs://bucket/backup", ""])
def test_folders_that_cannot_be_renamed_are_refused(folder):
    with pytest.raises(ValueError, match="backup_dir"):
        AtomicBackupAndRestore(folder)
