"""The fine-tuning example: frozen batch norms accumulate to the large batch, others do not."""

import keras
import numpy as np
import pytest

from examples import fine_tuning

SMALL = "--epochs 2 --pretraining-epochs 2 --examples 150 --batch-size 32 --micro-batch-size 8"


@pytest.fixture
def shallow(monkeypatch):
    """The first blocks only: the whole net takes minutes to trace in all ways."""
    whole = fine_tuning.build_base

    def first_blocks(*args, **kwargs):
        base = whole(*args, **kwargs)
        x = keras.layers.GlobalAveragePooling2D()(base.get_layer("conv_pw_2_relu").output)
        return keras.Model(base.input, x)

    monkeypatch.setattr(fine_tuning, "build_base", first_blocks)


def test_only_frozen_batch_norms_are_the_large_batch(shallow, capfd):
    results = fine_tuning.main(SMALL.split())
    large, micro, accum, large_frozen, frozen = results
    assert [r["way"] for r in results] == list(fine_tuning.WAYS)
    assert [r["micro_batch"] for r in results] == [32, 8, 8, 32, 8]
    assert len({r["updates"] for r in results}) == 1
    assert large["weight_difference"] == large_frozen["weight_difference"] == 0
    assert large["weight_movement"] > 1e-3
    assert frozen["weight_difference"] < 1e-10
    assert frozen["validation_accuracy"] == large_frozen["validation_accuracy"]
    # AccumBatchNorm trains by the micro-batch too: only its moving statistics are others.
    assert accum["weight_difference"] == pytest.approx(micro["weight_difference"], rel=1e-6)
    assert micro["weight_difference"] > 1e-2

    assert fine_tuning.table(results) in capfd.readouterr().out
    assert keras.config.floatx() == "float32"


def test_the_base_keeps_the_weights_it_was_pretrained_with(shallow):
    weights = [w + 1 for w in fine_tuning.build_base().get_weights()]
    for way in fine_tuning.WAYS.values():
        model = fine_tuning.prepare(way, weights, 4)
        (first,) = [v for v in model.variables if v.path.endswith("conv1/kernel")]
        np.testing.assert_array_equal(first, weights[0])


def test_weights_of_imagenet_are_asked_for_instead_of_pretraining(monkeypatch):
    asked_for, make = [], keras.applications.MobileNet

    def without_download(weights, **kwargs):
        asked_for.append(weights)
        return make(weights=None, **kwargs)

    monkeypatch.setattr(keras.applications, "MobileNet", without_download)
    weights = fine_tuning.pretrained(fine_tuning.parse(["--weights", "imagenet"]))
    assert asked_for == ["imagenet"]
    assert len(weights) == len(fine_tuning.build_base().get_weights())


def test_known_and_other_digits_are_apart():
    for known in (True, False):
        for x, y in fine_tuning.load_data(known, 150):
            assert x.shape[1:] == (32, 32, 3) and x.dtype == "float32"
            assert (x.min(), x.max()) == (-1, 1)
            assert set(y) <= set(range(5))
    sizes = [len(fine_tuning.load_data(known, 150)[0][1]) for known in (True, False)]
    assert sum(sizes) == 128


def test_batch_norms_of_the_whole_net_follow_a_short_training():
    base = fine_tuning.build_base()
    norms = [v for v in base.layers if isinstance(v, keras.layers.BatchNormalization)]
    assert len(norms) == 27
    assert {norm.momentum for norm in norms} == {0.9}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "100", "--micro-batch-size", "8"], "Pass for example --batch-size 96."),
        (["--examples", "70"], "Received: --batch-size 64, --examples 70. Pass a smaller batch"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_refuses_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        fine_tuning.main(arguments)
    assert message in capsys.readouterr().err
