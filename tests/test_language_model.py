"""The language model example: the mask reaches the loss, and only the mean of means is off."""

import keras
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from examples import language_model as example
from gradient_accumulator_tf import GradientAccumulateModel

SMALL = ["--epochs", "2", "--paragraphs", "150", "--batch-size", "32", "--micro-batch-size", "8"]


def test_only_the_mean_of_means_leaves_the_large_batch(tmp_path, capfd):
    plot = tmp_path / "language_model.png"
    results = example.main([*SMALL, "--plot", str(plot)])

    assert [r["way"] for r in results] == list(example.WAYS)
    large, accumulated, mean_of_means = results
    assert large["weight_difference"] == [0, 0]
    assert max(accumulated["weight_difference"]) < 1e-4
    for ours, theirs in zip(
        accumulated["weight_difference"], mean_of_means["weight_difference"], strict=True
    ):
        assert theirs > 100 * ours
    for name in ("perplexity", "validation_perplexity"):
        assert large[name][-1] < example.VOCABULARY / 2
        np.testing.assert_allclose(accumulated[name], large[name], rtol=1e-4)
    moved = example.largest_difference(large["weights"][-1], large["weights"][0])
    assert moved > 0.01

    printed = capfd.readouterr().out
    assert printed.count("Epoch 2/2") == 3
    assert example.table(results) in printed
    image = matplotlib.image.imread(plot)
    assert image.shape[0] > 300 and image.shape[1] > 600
    assert image.std() > 0


@pytest.mark.parametrize("wrapped", [False, True])
def test_padding_changes_neither_loss_nor_perplexity(wrapped):
    lines, _ = example.load_data(paragraphs=60, batch_size=16)
    # The shortest lines of an effective batch, so that more padding fits.
    [(x, y)] = example.padded_batches(lines[:8], 8)
    x, y = x.numpy(), y.numpy()
    net = example.build_net()
    model = GradientAccumulateModel(model=net, accum_steps=2) if wrapped else net
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss=loss, metrics=[example.Perplexity()])

    log_probabilities = keras.ops.log_softmax(net(x)).numpy()
    by_token = -np.take_along_axis(log_probabilities, y[..., None], -1)[..., 0]
    valid = y != example.PADDING
    assert 0 < valid.sum() < valid.size
    expected = by_token[valid].mean()
    for more in (0, 20):
        wide = [np.pad(a, [(0, 0), (0, more)]) for a in (x, y)]
        logs = model.test_on_batch(*wide, return_dict=True)
        np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(logs["perplexity"], np.exp(expected), rtol=1e-5)


def test_data_is_whole_effective_batches_sorted_within():
    lines, validation = example.load_data(paragraphs=150, batch_size=32)
    assert (len(lines), len(validation)) == (128, 22)
    lengths = [len(line) for line in lines]
    for start in range(0, 128, 32):
        batch = lengths[start : start + 32]
        assert batch == sorted(batch)
        assert batch[-1] > 2 * batch[0]
    assert max(lengths) <= example.LENGTH + 1
    tokens = np.concatenate([*lines, *validation])
    assert tokens.min() > example.PADDING and tokens.max() < example.VOCABULARY

    shapes = [x.shape for x, _ in example.padded_batches(lines, 8)]
    assert len(shapes) == 16 and len(set(shapes)) > 4
    counts = example.token_counts(lines, 8)
    assert sum(counts) == sum(lengths) - 128
    assert counts == [int(np.sum(y != 0)) for _, y in example.padded_batches(lines, 8)]


def result_of(way, **changes):
    perplexity = {"perplexity": [80.0, 40.0], "validation_perplexity": [90.0, 50.5]}
    return {"way": way, **perplexity, "weight_difference": [0.0, 0.0], **changes}


def test_table_is_aligned():
    results = [result_of("short"), result_of("a longer way", weight_difference=[0.1, 1.5e-6])]
    lines = example.table(results).splitlines()
    assert len(lines) == 6
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split() == ["epoch", "2", "50.50", "50.50"]
    assert lines[-1].split() == ["weight", "difference", "0", "1.5e-06"]


def test_plot_where_all_ways_are_equal(tmp_path):
    figure = Figure()
    example.draw([result_of(way) for way in example.WAYS], [30, 900], figure)
    figure.savefig(tmp_path / "language_model.png")
    assert "30 to 900 tokens" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--batch-size", "20", "--micro-batch-size", "8"],
            "multiple of --micro-batch-size. Received: 20 and 8. Pass for example --batch-size 16.",
        ),
        (["--paragraphs", "40", "--batch-size", "64"], "paragraphs, here 36. Received: 64."),
        (["--epochs", "0"], "argument --epochs: must be a whole number of 1 or more. Received: 0"),
        (["--plot", "no/such/folder/curves.png"], "Received: no/such/folder/curves.png"),
    ],
)
def test_refuses_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        example.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
