"""Trainings drawn at random equal the large batch; a failure is shrunk and printed as a script.

`make test` draws the same few each time. `make fuzz` draws as many new ones as FUZZ_EXAMPLES says.
"""

import os
import runpy

import keras
import pytest
from hypothesis import HealthCheck, given, note, settings

from tests.random_cases import cases, script

FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))


# Keras warns where data of unknown length end before it expects it.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@settings(
    max_examples=FUZZ_EXAMPLES or 15,
    derandomize=not FUZZ_EXAMPLES,
    database=None,  # no file outside of a temporary folder
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    print_blob=False,
)
@given(case=cases())
def test_a_random_training_equals_the_large_batch(case, float64, tmp_path):
    note(script(case))
    # A file, as TensorFlow looks up the source of the functions that it traces.
    path = tmp_path / "case.py"
    path.write_text(script(case))
    found = runpy.run_path(str(path))
    keras.backend.clear_session()
    assert found["movement"] > 1e-6
    # Optimizers divide by small numbers, so rounding may grow; the reordered batch's does as well.
    allowed = max(1e-10, 30 * found["control"])
    assert found["difference"] <= allowed
    assert found["loss_difference"] <= 10 * allowed
