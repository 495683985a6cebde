"""The examples run, and come out as they say."""

import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from examples import digits

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--epochs", "2", "--examples", "150", "--batch-size", "64", "--micro-batch-size", "16"]


def test_digits_come_out_the_same_in_all_three_ways(tmp_path, capfd):
    plot = tmp_path / "digits.png"
    results = digits.main([*SMALL, "--plot", str(plot)])

    large, *accumulated = results
    assert [r["way"] for r in results] == list(digits.WAYS)
    # Of 150 images 22 are held out, so 128 are left: two updates per epoch.
    assert [r["updates"] for r in results] == [4, 4, 4]
    assert [(r["effective_batch"], r["micro_batch"]) for r in results] == [
        (64, 64),
        (64, 16),
        (64, 16),
    ]
    assert large["weight_difference"] == 0
    assert large["weight_movement"] > 0.01
    for result in accumulated:
        assert result["weight_difference"] < 1e-4 * large["weight_movement"]
        assert result["validation_accuracy"] == large["validation_accuracy"]
        np.testing.assert_allclose(result["loss"], large["loss"], rtol=1e-5)

    printed = capfd.readouterr().out
    assert printed.count("Epoch 2/2") == 3
    assert digits.table(results) in printed
    image = matplotlib.image.imread(plot)
    assert image.shape[0] > 300 and image.shape[1] > 600
    assert image.std() > 0


def result_of(way, **changes):
    return {
        "way": way,
        "effective_batch": 64,
        "micro_batch": 16,
        "updates": 4,
        "validation_accuracy": 0.5,
        "weight_difference": 0.0,
        "memory": 12.4e6,
        "loss": [2.0, 1.0],
        **changes,
    }


def test_digits_table_is_aligned():
    changes = {"weight_difference": 1.5e-6, "memory": math.nan}
    lines = digits.table([result_of("short"), result_of("a longer way", **changes)]).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split() == ["short", "64", "16", "4", "0.5000", "0", "12", "MB"]
    assert lines[4].split()[-2:] == ["1.5e-06", "unknown"]


def test_digits_plot_where_memory_is_not_known(tmp_path):
    figure = Figure()
    digits.draw([result_of(way, memory=math.nan) for way in digits.WAYS], figure)
    figure.savefig(tmp_path / "digits.png")
    labels = [text.get_text() for text in figure.axes[1].texts]
    assert labels == ["unknown"] * 3


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--batch-size", "100", "--micro-batch-size", "32"],
            "multiple of --micro-batch-size. Received: 100 and 32. Pass for example "
            "--batch-size 96.",
        ),
        (
            ["--batch-size", "16", "--micro-batch-size", "32"],
            "Received: 16 and 32. Pass for example --batch-size 32.",
        ),
        (["--batch-size", "1600"], "training images, here 1540. Received: 1600."),
        ([*SMALL, "--examples", "70"], "training images, here 60. Received: 64."),
        (["--epochs", "0"], "argument --epochs: must be a whole number of 1 or more. Received: 0"),
        (
            ["--micro-batch-size", "many"],
            "argument --micro-batch-size: must be a whole number of 1 or more. Received: many",
        ),
        (["--plot", "no/such/folder/digits.png"], "Received: no/such/folder/digits.png"),
    ],
)
def test_digits_refuses_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        digits.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_digits_refuses_to_plot_without_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import then fails
    with pytest.raises(SystemExit):
        digits.main(["--plot", str(tmp_path / "digits.png")])
    assert "--plot needs matplotlib. Install it, or leave out --plot." in capsys.readouterr().err


@pytest.mark.fast
def test_rules_of_a_table():
    rows = [("way", "loss"), ("a", "1.5"), ("b", "12.5")]
    assert digits.aligned(rows, rules=(1, 2)).splitlines() == [
        "way  loss",
        "---  ----",
        "a     1.5",
        "---  ----",
        "b    12.5",
    ]


RUN_ALL = """
import runpy, sys
folder, *scripts = sys.argv[1:]
sys.path[0] = folder
for script in scripts:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0
"""


def test_every_example_is_a_script(tmp_path, monkeypatch):
    """It finds what it shares from any folder, and says what it takes."""
    scripts = sorted(path for path in EXAMPLES.glob("*.py") if path.stem[0] != "_")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it could hold the repository's root
    command = [sys.executable, "-c", RUN_ALL, EXAMPLES, *scripts]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("usage: ") == len(scripts) == 9
