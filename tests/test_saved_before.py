"""Files that version 0.1.0 wrote in mid-cycle load, and lead to the weights that it reached."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.data import make_saved_files as before
from tests.oracle import difference, updates_of

FOLDER = pathlib.Path(before.__file__).parent
# A file that makes its model builds the optimizer too.
FILES = [
    pytest.param(ending, make, build, id=f"{make.__name__}.{ending}-{build}")
    for ending, makes in before.MODELS.items()
    for make in makes
    for build in (("built",) if ending in ("keras", "h5") else ("built", "not_built"))
]


def recorded(make, when):
    """The weights that the version of before had when it saved and at the end."""
    with np.load(FOLDER / "weights.npz") as file:
        names = [name for name in file if name.startswith(f"{make.__name__}/{when}/")]
        return [file[name] for name in sorted(names, key=lambda name: int(name.split("/")[-1]))]


def load(make, ending, build):
    """The model in the file."""
    path = FOLDER / f"{make.__name__}.{ending}"
    if ending in ("keras", "h5"):
        return keras.models.load_model(path)
    model = make()
    if build:
        model.optimizer.build(model.trainable_variables)
    if ending == "ckpt":
        status = tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(str(path))
        if build:
            status.assert_consumed()
    else:
        model.load_weights(path)
    return model


@pytest.mark.fast
@pytest.mark.parametrize("ending, make, build", FILES)
def test_a_file_of_before_goes_on_as_then(ending, make, build):
    model = load(make, ending, build == "built")
    assert difference(model.get_weights(), recorded(make, "saved")) == 0.0
    before.train(model, before.SAVED_AFTER, before.END)
    tolerance = 2e-3 if make is before.optimizer_with_a_loss_scale else 2e-6
    assert difference(recorded(make, "saved"), recorded(make, "end")) > 20 * tolerance
    assert difference(model.get_weights(), recorded(make, "end")) < tolerance
    assert updates_of(model.optimizer) >= 3
