"""SciKeras's estimators around functions that return accumulating models."""

import keras
import numpy as np
import pytest

from tests.clients import client
from tests.oracle import ACROSS_STEPS, EFFECTIVE, MICRO, difference, in_way

scikeras_wrappers = client("scikeras.wrappers")

pytestmark = pytest.mark.filterwarnings("default")


def build(way="plain"):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3, "softmax")]
    )
    model, optimizer, _ = in_way(way, model, keras.optimizers.Adam(0.01))
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2 * EFFECTIVE, 4)).astype("float32")
    return x, np.array(["red", "green", "blue"])[x[:, :3].argmax(1)]


def fitted(way):
    batch_size = MICRO if way in ACROSS_STEPS else EFFECTIVE
    estimator = scikeras_wrappers.KerasClassifier(
        build, way=way, batch_size=batch_size, epochs=3, shuffle=False, verbose=0
    )
    x, y = data()
    return estimator.fit(x, y, shuffle=False)


def test_a_classifier_trains_as_on_the_large_batch(way):
    x, y = data()
    plain, estimator = fitted("plain"), fitted(way)
    assert difference(estimator.model_.get_weights(), plain.model_.get_weights()) < 1e-5
    np.testing.assert_allclose(estimator.predict_proba(x), plain.predict_proba(x), 1e-4, 1e-5)
    assert set(estimator.predict(x)) <= set(y) and estimator.score(x, y) == plain.score(x, y)
