"""Raises on import where Keras or TensorFlow is missing, too old, or on another backend."""

import os

# The supported versions. The suite runs on the oldest and the newest. setup.cfg has the bounds too.
# Newer versions are not refused here, so that they can be tried.
OLDEST_TENSORFLOW, NEWEST_TENSORFLOW = (2, 16), (2, 21)
OLDEST_KERAS, NEWEST_KERAS = (3, 8), (3, 15)


def version_tuple(version):
    """Tuple of the ints (major, minor) of a version string."""
    return tuple(int(part) for part in version.split(".")[:2])


def _dotted(version):
    return ".".join(map(str, version))


def check_installation():
    """Raises ImportError unless Keras 3 runs on TensorFlow, both in supported versions."""
    keras_bound, tensorflow_bound = _dotted(OLDEST_KERAS), _dotted(OLDEST_TENSORFLOW)
    remedy = (
        f'Install them with: pip install "tensorflow>={tensorflow_bound}" "keras>={keras_bound}"'
    )
    # Importing Keras imports its backend, and an error about a missing jax would hide the reason.
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend == "tensorflow":
        import keras

        if keras.__version__.startswith("2."):
            raise ImportError(
                f"gradient_accumulator_tf needs Keras 3 ({keras_bound} or newer). "
                f"Received: keras {keras.__version__}. {remedy}"
            )
        backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ImportError(
            "gradient_accumulator_tf accumulates in TensorFlow variables and needs Keras to run "
            f"on the TensorFlow backend. Received: the {backend} backend. Install tensorflow and "
            "set the environment variable KERAS_BACKEND=tensorflow (or `backend` in "
            "~/.keras/keras.json) before Keras is imported."
        )
    import tensorflow as tf

    for name, version, oldest in (
        ("tensorflow", tf.__version__, OLDEST_TENSORFLOW),
        ("keras", keras.__version__, OLDEST_KERAS),
    ):
        if version_tuple(version) < oldest:
            raise ImportError(
                f"gradient_accumulator_tf needs {name} {_dotted(oldest)} or newer. "
                f"Received: {name} {version}. {remedy}"
            )
