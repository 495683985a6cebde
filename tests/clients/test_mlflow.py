"""MLflow's autolog records a training with accumulation as one without."""

import keras
import pytest

from tests.clients import client
from tests.oracle import dense_model, in_way, regression_data

mlflow = client("mlflow")

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def autolog(tmp_path, monkeypatch):
    """Records into a folder, and stops after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'runs.db'}")
    mlflow.set_experiment("accumulation")
    mlflow.tensorflow.autolog(log_models=False, log_datasets=False)
    yield
    mlflow.tensorflow.autolog(disable=True)


def test_autolog_records_each_epoch(way, autolog):
    x, y, _ = regression_data(24)
    model, optimizer, batch_size = in_way(way, dense_model(), keras.optimizers.SGD(0.01))
    model.compile(optimizer, "mse")
    with mlflow.start_run() as run:
        history = model.fit(x, y, batch_size=batch_size, epochs=3, verbose=0).history
    logged = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    values = [metric.value for metric in sorted(logged, key=lambda metric: metric.step)]
    assert values == pytest.approx(history["loss"])
    params = mlflow.get_run(run.info.run_id).data.params
    assert params["epochs"] == "3" and params["batch_size"] == str(batch_size)
