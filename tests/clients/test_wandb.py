"""Weights & Biases's callback logs a training with accumulation, without a network."""

import keras
import pytest

from tests.clients import client
from tests.oracle import dense_model, in_way, regression_data

wandb = client("wandb")

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that stays on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=str(tmp_path), project="accumulation") as run:
        yield run


def test_the_callback_logs_each_epoch(way, run, monkeypatch):
    from wandb.integration.keras import WandbMetricsLogger

    logged, log = [], wandb.log
    monkeypatch.setattr(wandb, "log", lambda data: logged.append(dict(data)) or log(data))
    x, y, _ = regression_data(24)
    model, optimizer, batch_size = in_way(way, dense_model(), keras.optimizers.SGD(0.01))
    model.compile(optimizer, "mse")
    history = model.fit(
        x, y, batch_size=batch_size, epochs=3, verbose=0, callbacks=[WandbMetricsLogger()]
    ).history
    epochs = [entry for entry in logged if "epoch/loss" in entry]
    assert [entry["epoch/loss"] for entry in epochs] == history["loss"]
    assert [entry["epoch/epoch"] for entry in epochs] == [0, 1, 2]
    assert epochs[0]["epoch/learning_rate"] == pytest.approx(0.01)
