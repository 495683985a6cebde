"""The contrastive example: only a loss over the effective batch trains as the large batch."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from examples import contrastive

# Of 150 images 22 are held out, so 128 are left: two updates per epoch.
SMALL = ["--epochs", "2", "--examples", "150", "--batch-size", "64", "--micro-batch-size", "8"]


def test_only_the_coupled_loss_is_the_large_batch(tmp_path, capfd):
    plot = tmp_path / "contrastive.png"
    results = contrastive.main([*SMALL, "--plot", str(plot)])
    large, coupled, ordinary, small = results
    assert [r["way"] for r in results] == list(contrastive.WAYS)
    assert [r["updates"] for r in results] == [4, 4, 4, 32]
    assert [r["compared"] for r in results] == [64, 64, 8, 8]
    assert large["weight_difference"] == 0
    assert large["weight_movement"] > 1e-2
    assert coupled["weight_difference"] < 1e-3
    assert coupled["accuracy"] == large["accuracy"]
    np.testing.assert_allclose(coupled["loss"], large["loss"], rtol=1e-5)
    assert ordinary["weight_difference"] > 0.1 and small["weight_difference"] > 0.1
    assert contrastive.table(results) in capfd.readouterr().out
    assert plot.stat().st_size > 0


def test_an_image_is_compared_with_those_of_its_digit():
    embeddings = np.array([[1, 0], [0, 1], [0.6, 0.8]], "float32")
    losses = contrastive.contrastive_loss(np.array([[4], [7], [4]]), embeddings, temperature=0.5)
    logits = embeddings @ embeddings.T / 0.5
    first = -logits[0, 2] + np.log(np.exp(logits[0, 1]) + np.exp(logits[0, 2]))
    last = -logits[2, 0] + np.log(np.exp(logits[2, 0]) + np.exp(logits[2, 1]))
    # The second image is alone with its digit.
    np.testing.assert_allclose(losses, [first, 0, last], rtol=1e-5)


def test_the_picture_names_each_way():
    results = [
        {"way": way, "accuracy": [0.5, 0.7], "weight_difference": 10.0**-i, "updates": 4}
        for i, way in enumerate(contrastive.WAYS)
    ]
    figure = Figure()
    contrastive.draw(results, figure)
    curves, bars = figure.axes
    labels = [text.get_text() for text in curves.get_legend().get_texts()]
    assert labels == [f"{way} (4 updates)" for way in contrastive.WAYS]
    assert [text.get_text() for text in bars.texts] == ["1.0e-01", "1.0e-02", "1.0e-03"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "100", "--micro-batch-size", "8"], "Pass for example --batch-size 96."),
        (["--batch-size", "1600"], "here 1540. Received: 1600."),
        (["--plot", "no/such/folder/a.png"], "Received: no/such/folder/a.png"),
    ],
)
def test_refuses_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        contrastive.main(arguments)
    assert message in capsys.readouterr().err
