"""Examples of one's own train_step: each right way is the large batch, its neighbour is not."""

import numpy as np
import pytest
import tensorflow as tf

from examples import custom_train_step, gan

# Of 150 images 22 are held out, so 128 are left: two updates per epoch.
SMALL = ["--epochs", "2", "--examples", "150", "--batch-size", "64", "--micro-batch-size", "8"]


def test_only_the_weighted_mean_is_the_large_batch(capfd):
    results = custom_train_step.main([*SMALL, "--labelled", "15"])
    large, weighted, mean_of_means = results
    assert [r["way"] for r in results] == list(custom_train_step.WAYS)
    assert [r["updates"] for r in results] == [4] * 3
    assert large["weight_difference"] == 0
    assert large["weight_movement"] > 1e-3
    assert weighted["weight_difference"] < 1e-3
    np.testing.assert_allclose(weighted["loss"], large["loss"], rtol=1e-5)
    assert mean_of_means["weight_difference"] > 0.1

    printed = capfd.readouterr().out
    assert custom_train_step.table(results) in printed
    # Some micro-batches without any label: there the mean would be 0 / 0.
    assert "micro-batches of 8, of which 0 to " in printed


def test_the_loss_is_the_mean_over_the_labelled():
    model = custom_train_step.LabelledModel(custom_train_step.build_net())
    logits = tf.constant(np.random.default_rng(0).normal(size=(4, 10)), "float32")
    loss, has_label, labelled = model.loss_of(tf.constant([3, -1, 7, -1]), logits)
    probabilities = tf.nn.log_softmax(logits).numpy()
    np.testing.assert_allclose(loss, -(probabilities[0, 3] + probabilities[2, 7]) / 2, rtol=1e-6)
    assert has_label.numpy().tolist() == [1, 0, 1, 0]
    assert labelled == 2
    loss, _, labelled = model.loss_of(tf.constant([-1] * 4), logits)
    assert (loss, labelled) == (0, 0)


def test_both_nets_at_once_are_the_large_batch_one_after_the_other_are_not(capfd):
    results = gan.main(SMALL)
    at_once, accumulated, in_turn, accumulated_in_turn = results
    assert [r["way"] for r in results] == list(gan.WAYS)
    assert [r["updates"] for r in results] == [[4, 4]] * 4
    assert at_once["weight_difference"] == in_turn["weight_difference"] == 0
    assert at_once["weight_movement"] > 1e-3
    assert accumulated["weight_difference"] < 1e-3
    for loss in ("generator_loss", "discriminator_loss"):
        np.testing.assert_allclose(accumulated[loss], at_once[loss], rtol=1e-5)
    assert accumulated_in_turn["weight_difference"] > 10 * accumulated["weight_difference"]
    assert accumulated_in_turn["weight_difference"] > 1e-2
    assert gan.table(results) in capfd.readouterr().out


def test_every_way_sees_the_same_noise_and_nets():
    args = gan.parse(SMALL)
    for first, second in (
        (gan.load_data(args), gan.load_data(args)),
        (gan.build_nets()[0].get_weights(), gan.build_nets()[0].get_weights()),
    ):
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("example", [custom_train_step, gan])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "100", "--micro-batch-size", "8"], "Pass for example --batch-size 96."),
        (["--batch-size", "1600", "--micro-batch-size", "8"], "here 1540. Received: 1600."),
        (["--epochs", "0"], "--epochs: must be a whole number of 1 or more. Received: 0"),
    ],
)
def test_refuses_arguments(example, arguments, message, capsys):
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("received", ["0", "101", "half"])
def test_refuses_what_is_no_percentage(received, capsys):
    with pytest.raises(SystemExit):
        custom_train_step.main(["--labelled", received])
    assert f"percent, from 1 to 100. Received: {received}" in capsys.readouterr().err
