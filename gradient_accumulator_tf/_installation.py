"""Raises on import where Keras or TensorFlow is missing, too old, or on another backend."""

import os

OLDEST_TENSORFLOW = (2, 16)

OLDEST_KERAS = (3, 8)


def version_tuple(version):
    """Tuple of the ints (major, minor) of a version string."""
    return tuple(int(part) for part in version.split(".")[:2])


def check_installation():
    """Raises ImportError unless Keras 3 runs on TensorFlow, both recent enough."""
    remedy = 'Install them with: pip install "tensorflow>=2.16" "keras>=3.8"'
    # Keras imports its backend at once, so a missing jax or torch would hide the reason.
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend == "tensorflow":
        import keras

        if keras.__version__.startswith("2."):
            raise ImportError(
                "gradient_accumulator_tf needs Keras 3 (3.8 or newer). "
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
                f"gradient_accumulator_tf needs {name} {'.'.join(map(str, oldest))} or newer. "
                f"Received: {name} {version}. {remedy}"
            )
