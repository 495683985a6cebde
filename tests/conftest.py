import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest
import tensorflow as tf

from tests.oracle import EXECUTIONS, MODES, WAYS

# Logical devices, so that strategies can be tested where there is no GPU.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)


@pytest.fixture(params=WAYS)
def way(request):
    """Each way to accumulate, for `oracle.in_way`; what has a way of its own parametrises it."""
    return request.param


@pytest.fixture(params=MODES)
def mode(request):
    """Each mode of the model wrapper, for `oracle.in_way`."""
    return request.param


# In a graph, which is how `fit` runs if nothing else is said, each of these tests is a fast one.
@pytest.fixture(
    params=[
        pytest.param(how, marks=pytest.mark.fast if how == "graph" else ()) for how in EXECUTIONS
    ]
)
def execution(request):
    """Arguments of `compile` for each way in which Keras runs a training step."""
    return EXECUTIONS[request.param]


@pytest.fixture(params=[pytest.param("graph", marks=pytest.mark.fast), "jit"])
def graph_or_jit(request):
    """Arguments of `compile` for a case whose feature has a test in every execution."""
    return EXECUTIONS[request.param]


@pytest.fixture(autouse=True)
def _fresh_keras():
    keras.utils.set_random_seed(0)
    yield
    # Python collects garbage itself; to do so after each test was a tenth of the suite's time.
    keras.backend.clear_session(free_memory=False)


@pytest.fixture
def float64():
    """Computes in float64 within the test."""
    previous = keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(previous)
    keras.config.set_dtype_policy(previous)
