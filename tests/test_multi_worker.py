"""Workers in processes of their own, on the loopback: the large batch of one device."""

import json
import signal
import sys

import keras
import numpy as np
import pytest

from benchmarks.communication import run_workers, started_workers
from tests import multi_worker_job as job
from tests.oracle import KERAS, dense_model, difference, regression_data, state_of


def _command(directory, *what):
    return [sys.executable, "-m", "tests.multi_worker_job", str(directory), *what]


def _arrays_of(directory, index):
    """Dict of lists of the arrays that a worker saved."""
    parts = {}
    with np.load(directory / f"worker_{index}.npz") as arrays:
        for name in arrays.files:
            parts.setdefault(name.rsplit("/", 1)[0], []).append(arrays[name])
    return parts


def _results_of(number, directory):
    """Runs the job on `number` workers; a dict of lists of arrays, and the errors, for each."""
    run_workers(_command(directory), number, 300)
    return [
        (
            _arrays_of(directory, index),
            json.loads((directory / f"worker_{index}.json").read_text()),
        )
        for index in range(number)
    ]


@pytest.fixture(scope="module", params=[2, 3], ids=["two_workers", "three_workers"])
def workers(request, tmp_path_factory):
    return _results_of(request.param, tmp_path_factory.mktemp("workers"))


def test_keras_alone_still_fails(workers):
    # When one of these is mended, `mend_fit_on_several_workers` can lose that half.
    for _, (building, reducing) in workers:
        assert "unsupported type" in building
        assert "Invalid reduction dimension 0" in reducing


@pytest.mark.parametrize("way", job.WAYS)
def test_fit_equals_the_large_batch_of_one_device(workers, way):
    x, y, weights = regression_data(job.EXAMPLES)
    if way == "optimizer":
        x, y, weights = x[: 2 * job.LARGE], y[: 2 * job.LARGE], np.ones(2 * job.LARGE)
    large = dense_model()
    large.compile(job.make_optimizer(), job.make_loss(), weighted_metrics=["mae"])
    arguments = {"sample_weight": weights, "batch_size": job.LARGE, "verbose": 0}
    history = large.fit(x, y, epochs=job.EPOCHS, shuffle=False, **arguments).history
    logs = large.evaluate(x, y, **arguments)
    for results, _ in workers:
        assert difference(results[f"{way}/weights"], large.get_weights()) < 1e-6
        if KERAS < (3, 10):
            continue  # its metrics are each replica's own
        # Across steps a micro-batch's loss counts for its weights, as does its gradient.
        if way != "accum_steps":
            np.testing.assert_allclose(results[f"{way}/loss"], history["loss"], rtol=2e-6)
        # Keras's own evaluation counts the loss of each replica for its examples.
        np.testing.assert_allclose(results[f"{way}/evaluate"][1], logs[1], rtol=2e-6)


@pytest.mark.skipif("micro_batch_size" not in job.WAYS, reason="as for the ways of the job")
def test_a_loss_over_all_workers_is_that_of_one_device(workers):
    x, y, _ = regression_data(job.EXAMPLES)
    large = dense_model()
    large.compile(job.make_scaled(), job.concordance)
    arguments = {"batch_size": job.LARGE, "epochs": job.EPOCHS, "shuffle": False, "verbose": 0}
    history = large.fit(x, y, **arguments).history
    for results, _ in workers:
        assert difference(results["coupled/weights"], large.get_weights()) < 1e-6
        np.testing.assert_allclose(results["coupled/loss"], history["loss"], rtol=2e-6)


def test_a_custom_loop_equals_the_large_batch_of_one_device(workers):
    x, y, _ = regression_data(job.EXAMPLES)
    large = dense_model()
    large.compile(job.make_optimizer(), "mse")
    large.fit(x, y, batch_size=job.LARGE, epochs=job.EPOCHS, shuffle=False, verbose=0)
    for results, _ in workers:
        assert difference(results["custom_loop/weights"], large.get_weights()) < 1e-6
        assert results["custom_loop/iterations"] == [6]


@pytest.mark.parametrize("way", job.WAYS)
def test_an_overflow_on_the_last_worker_drops_the_update_on_all(workers, way):
    keras.config.set_dtype_policy("mixed_float16")
    large = dense_model()
    large.compile(job.make_scaled(), "mse")
    keras.config.set_dtype_policy("float32")
    large.optimizer.initial_scale = 256.0
    large.fit(*job.overflowing_data(), batch_size=job.LARGE, shuffle=False, verbose=0)
    assert float(large.optimizer.dynamic_scale) == 128.0
    for results, _ in workers:
        assert results[f"mixed_{way}/scale"] == [128.0]
        assert results[f"mixed_{way}/updates"] == [2]
        assert difference(results[f"mixed_{way}/weights"], large.get_weights()) < 1e-3


def test_all_workers_resume_in_mid_cycle_from_what_the_chief_saved(workers):
    x, y, _ = regression_data(4 * job.LARGE)
    large = dense_model()
    large.compile(keras.optimizers.Adam(0.02), "mse")
    large.fit(x, y, batch_size=job.LARGE, shuffle=False, verbose=0)
    for results, _ in workers:
        assert results["saved/micro_step"] == [2]
        assert difference(results["saved/weights"], large.get_weights()) > 1e-3
        assert difference(results["resumed/weights"], large.get_weights()) < 1e-6
        assert difference(results["resumed/state"], state_of(large.optimizer.variables)) < 1e-6


def test_a_killed_worker_fails_the_others_and_a_restart_ends_as_if_undisturbed(tmp_path):
    with started_workers(_command(tmp_path, "is_killed"), 2) as (processes, outputs):
        assert processes[1].wait(timeout=120) == -signal.SIGKILL
        # TensorFlow misses the heartbeats of the killed one, and gives up.
        assert processes[0].wait(timeout=120) > 0
        outputs[0].seek(0)
        assert "UnavailableError" in outputs[0].read()
    assert not (tmp_path / "worker_0.npz").exists()

    run_workers(_command(tmp_path, "is_restarted"), 2, 120)
    x, y, _ = regression_data(4 * job.LARGE)
    large = dense_model()
    large.compile(keras.optimizers.Adam(0.02), "mse")
    large.fit(x, y, batch_size=job.LARGE, shuffle=False, verbose=0)
    for index in range(2):
        results = _arrays_of(tmp_path, index)
        weights = results["restarted/weights"]
        # A cycle's sum is restored in equal shares, so it is rounded in another order.
        assert difference(weights, results["undisturbed/weights"]) < 1e-7
        assert difference(weights, large.get_weights()) < 1e-6
