"""What a model says of losses that couple the examples of a batch."""

import warnings

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import GradientAccumulateModel
from tests.oracle import dense_model, in_way, regression_data

X, Y, _ = regression_data(12)


def mean_of_all(y_true, y_pred):
    return keras.ops.mean((y_true - y_pred) ** 2)


def mean_of_each(y_true, y_pred):
    return keras.ops.mean((y_true - y_pred) ** 2, axis=-1)


class Summed(keras.losses.Loss):
    def __init__(self):
        super().__init__(name="summed", reduction="sum")

    def call(self, y_true, y_pred):
        return keras.ops.sum((y_true - y_pred) ** 2)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, inputs):
        return self.dense(inputs)


class Weighed(GradientAccumulateModel):
    """Says itself what its loss was divided by."""

    def micro_batch_weight(self, x, y, sample_weight):
        return keras.ops.shape(y)[0]


def warned(model, loss):
    """Texts of the warnings of couplings from `compile`, and from two trainings."""
    texts = []
    for do in (
        lambda: model.compile("sgd", loss),
        lambda: [model.fit(X, Y, batch_size=12, verbose=0) for _ in range(2)],
    ):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            do()
        texts.append([str(w.message) for w in found if "coupled_loss" in str(w.message)])
    return texts


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        ("dice", "divides one sum over all examples"),
        (keras.losses.Tversky(), "divides one sum over all examples"),
        (keras.losses.Circle(), "compares each example with all others"),
        (mean_of_all, "reduces to one number for a whole batch"),
    ],
)
def test_compile_warns_once_of_a_loss_that_couples(loss, says, mode):
    if isinstance(loss, keras.losses.Circle):
        model = in_way(mode, keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)]))[0]
        with pytest.warns(UserWarning, match=says):
            model.compile("sgd", loss)
        return
    (text,), later = warned(in_way(mode, dense_model())[0], loss)
    assert says in text and "coupled_loss=True" in text
    assert f"Received: a model with {mode}=" in text
    assert later == []


@pytest.mark.parametrize("loss", ["mse", keras.losses.Dice(axis=-1), mean_of_each, Summed()])
def test_a_loss_of_each_example_is_no_coupling(loss, mode):
    assert warned(in_way(mode, dense_model())[0], loss) == [[], []]


def test_where_the_loss_sees_all_examples_nothing_is_said():
    coupled = GradientAccumulateModel(model=dense_model(), micro_batch_size=4, coupled_loss=True)
    alone = GradientAccumulateModel(model=dense_model(), accum_steps=1)
    assert warned(coupled, "dice") == warned(alone, "dice") == [[], []]


def test_a_subclassed_model_warns_in_its_first_step(mode):
    at_compile, (text,) = warned(in_way(mode, Subclassed())[0], mean_of_all)
    assert at_compile == [] and "'mean_of_all' reduces to one number" in text


def test_a_weight_of_its_own_is_an_answer(mode):
    inputs = keras.Input((5,))
    ends = {"inputs": inputs, "outputs": keras.layers.Dense(1)(inputs)}
    size = {"accum_steps": 3} if mode == "accum_steps" else {"micro_batch_size": 4}
    assert warned(Weighed(**ends, **size), mean_of_all) == [[], []]
    assert len(warned(Weighed(**ends, **size), "dice")[0]) == 1


def test_each_of_several_losses_is_named(mode):
    inputs = keras.Input((5,))
    outputs = {name: keras.layers.Dense(1, name=name)(inputs) for name in ("a", "b")}
    model = in_way(mode, keras.Model(inputs, outputs))[0]
    with pytest.warns(UserWarning) as found:
        model.compile("sgd", {"a": "dice", "b": mean_of_all})
    texts = [str(w.message) for w in found]
    assert len(texts) == 2 and "'dice'" in texts[0] and "'mean_of_all'" in texts[1]
    model.fit(X, {"a": np.abs(Y), "b": Y}, batch_size=12, verbose=0)
