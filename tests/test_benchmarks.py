"""Benchmarks measure what they say they do, at a small size; times are not asserted."""

import functools
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import (
    _common,
    _meters,
    _rivals,
    batch_norm,
    compile_time,
    coupled_loss,
    memory,
    overhead,
)
from benchmarks._rivals import BUILT_IN, LARGE, LOOP, OPTIMIZER, PLAIN

TINY = {
    "dense": _rivals.dense_case(_rivals.SGD, 4, 5, 6),
    "convolutional": _rivals.convolutional_case(_rivals.SGD, 4, 4, (2,)),
    "transformer": _rivals.transformer_case(_rivals.SGD, 4, 3, 8, 1),
    "embedding": _rivals.embedding_case(
        _rivals.ADAM, 4, rows=20, columns=3, length=2, reference=LOOP
    ),
}


@pytest.fixture
def in_this_process(monkeypatch):
    """A process for each measurement takes minutes to start them all."""
    monkeypatch.setattr(_common, "in_own_process", lambda function, *args: function(*args))


@pytest.fixture
def tiny_cases(monkeypatch, in_this_process):
    monkeypatch.setattr(_rivals, "CASES", TINY)


def rows_of(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_prints_a_ratio_for_each_rival_and_case(tiny_cases, capsys):
    results = overhead.main(
        "--jit off --micro-batch-size 2 --accum-steps 2 --repeats 3 --steps 3".split()
    )
    printed = capsys.readouterr().out
    header, _, *rows = rows_of(printed)
    assert header == ["", *TINY]
    rivals = [PLAIN, LARGE, BUILT_IN, LOOP, _rivals.TENSOR_LOOP, OPTIMIZER]
    rivals += [_rivals.ACROSS_STEPS, _rivals.WITHIN_STEP]
    assert [row[0] for row in rows] == [*rivals, f"seconds of {PLAIN}"]
    assert all(cell.startswith("1.00 (") for cell in rows[0][1:])
    assert "Warning" not in printed
    assert f"{OPTIMIZER} <= {PLAIN}? dense " in printed
    assert f"{OPTIMIZER} <= {BUILT_IN}? dense " in printed
    for case in TINY:
        assert {
            name: len(times) for name, times in results["jit off, accum_steps 2"][case].items()
        } == (dict.fromkeys(rivals, 3))


def test_writes_what_it_is_asked_for(tiny_cases, tmp_path):
    table, drawing = tmp_path / "times.json", tmp_path / "times.png"
    options = "--cases dense --jit on --accum-steps 2 --repeats 1".split()
    results = overhead.main([*options, "--json", str(table), "--plot", str(drawing)])
    assert json.loads(table.read_text())["seconds"] == results
    assert drawing.stat().st_size > 0


def test_a_table_for_each_number_of_micro_batches(tiny_cases, capsys):
    options = "--cases dense --jit off --accum-steps 2 3 --repeats 1 --steps 3".split()
    results = overhead.main(options)
    names = ["jit off, accum_steps 2", "jit off, accum_steps 3"]
    assert list(results) == names
    printed = capsys.readouterr().out
    assert [line[4:] for line in printed.splitlines() if line.startswith("### ")] == names
    assert printed.count(f"| {PLAIN} | 1.00 (") == 2


@pytest.mark.parametrize("case", [*_rivals.CASES.values(), *TINY.values()])
def test_a_case_can_go_to_a_process_of_its_own(case):
    rng = np.random.default_rng(0)
    assert pickle.loads(pickle.dumps(case)).inputs(rng, 2).shape[0] == 2


def test_says_what_was_measured_on(monkeypatch):
    on_cpu = _common.machine()
    assert re.search(r"TensorFlow 2\.\d+.*, Keras 3\..*, \d+ CPU cores, ", on_cpu)
    names = {"a": "Model X", "b": "Model X", "c": "Model Y"}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list(names))
    monkeypatch.setattr(
        tf.config.experimental, "get_device_details", lambda gpu: {"device_name": names[gpu]}
    )
    assert _common.machine().endswith(" CPU cores, 2 GPU (Model X), 1 GPU (Model Y)")


def test_every_rival_comes_first_once():
    orders = [_common.in_turn("abc", repeat) for repeat in range(4)]
    assert ["".join(order) for order in orders] == ["abc", "bca", "cab", "abc"]


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_is_the_largest_difference(place):
    others = [np.zeros(2), np.zeros((2, 1)), np.zeros((0, 3))]
    assert _common.largest_difference([np.ones(2), np.full((2, 1), -3.0), others[2]], others) == 3
    others[place][0] = np.nan
    assert np.isnan(_common.largest_difference([np.ones(2), np.ones((2, 1)), others[2]], others))


def test_warns_of_rivals_that_train_something_else(tiny_cases, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "TOLERANCE", -1.0)
    overhead.main("--cases dense --jit off --accum-steps 2 --repeats 1".split())
    assert f"Warning: dense: weights of {OPTIMIZER} are off by " in capsys.readouterr().out


def test_refuses_what_cannot_be_measured(capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--accum-steps", "8", "1"])
    message = capsys.readouterr().err
    assert "--accum-steps at least 2. Received: " in message and "[8, 1]" in message


def test_batch_norm_in_all_its_parts(float64, in_this_process, tmp_path, capsys):
    drawings = tmp_path / "accuracy.png", tmp_path / "memory.png"
    results = batch_norm.main(
        "--nets U-Net --size 8 --batch-size 64 --micro-batch-size 32 --epochs 1 --seeds 1".split()
        + "--accuracy-micro-batch-size 16 --steps 1 --repeats 1 --memory-batch-sizes 4 8".split()
        + ["--ways", batch_norm.LARGE, batch_norm.EXACT, batch_norm.MICRO]
        + ["--json", str(tmp_path / "all.json")]
        + ["--plot", str(drawings[0]), "--memory-plot", str(drawings[1])]
    )
    assert list(results) == list(batch_norm.PARTS)
    large, exact, micro = results["accuracy"].values()
    assert exact == large != micro
    for far, movement in results["equality"].values():
        assert max(far[1] + far[10]) < 1e-9 and movement > 1e-2
    assert all(drawing.stat().st_size > 0 for drawing in drawings)
    tables = [row[0] for row in rows_of(capsys.readouterr().out)]
    assert f"U-Net, {batch_norm.EXACT}" in tables and "U-Net, Adam" in tables
    assert set(json.loads((tmp_path / "all.json").read_text())) == {"setting", *results}


def test_coupled_loss_in_all_its_parts(float64, in_this_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        coupled_loss, "peak", lambda way, *args: {coupled_loss.COUPLED: 4e6}.get(way, 2e6)
    )
    monkeypatch.setattr(coupled_loss, "peak_of_loss", lambda examples: examples * 1e6 / 4)
    monkeypatch.setattr(_meters, "check_meter", lambda parser: None)
    table, drawing = tmp_path / "coupled.json", tmp_path / "coupled.png"
    results = coupled_loss.main(
        "--effective-batches 4 8 --error-batches 8 --micro-batch-size 3 --size 8".split()
        + "--filters 2 --processes 1 --repeats 2".split()
        + ["--json", str(table), "--plot", str(drawing)]
    )
    assert list(results) == list(coupled_loss.PARTS)
    errors = results["error"][8]
    assert errors[coupled_loss.COUPLED] < 1e-9 and errors[coupled_loss.ORDINARY] > 1e-2
    assert all(len(steps) == 2 for steps in results["time"][4].values())
    printed = capsys.readouterr().out
    assert "itself apart? no (2.00, the loss 0.50)" in printed
    assert "itself apart? yes (2.00, the loss 1.00)" in printed
    assert set(json.loads(table.read_text())) == {"setting", *results}
    assert drawing.stat().st_size > 0


def test_compile_time_of_each_rival(tiny_cases, tmp_path, capsys):
    table, drawing = tmp_path / "start.json", tmp_path / "start.png"
    options = "--cases dense --micro-batch-size 2 --accum-steps 2 --repeats 1".split()
    results = compile_time.main([*options, "--json", str(table), "--plot", str(drawing)])
    assert json.loads(table.read_text())["seconds"] == results
    assert drawing.stat().st_size > 0
    printed = capsys.readouterr().out
    for kind in compile_time.KINDS:
        measured = results["dense"][kind]
        assert list(measured) == list(compile_time.RIVALS)
        for columns in measured.values():
            (seconds,) = columns["2"]
            assert seconds > 0
        assert f"### {kind}, dense\n" in printed
    assert rows_of(printed)[0] == ["", "accum_steps 2"]
    assert rows_of(printed)[2] == [PLAIN, "1.00 (1.00-1.00)"]
    assert printed.count(f"{OPTIMIZER}: within 1.3 times {PLAIN}? ") == len(compile_time.KINDS)


def seconds_of(rival_seconds):
    plain = {"2": [2.0, 1.0, 3.0], "64": [2.0, 1.0, 3.0]}
    return {rival: rival_seconds.get(rival, plain) for rival in compile_time.RIVALS}


def test_compile_time_says_what_is_slow_and_what_grows():
    slow, growing = {"2": [3.0], "64": [3.0]}, {"2": [2.0], "64": [2.4]}
    lines = compile_time.rules(seconds_of({OPTIMIZER: slow, _rivals.WITHIN_STEP: growing}))
    first, second, third = lines.splitlines()
    assert "plain fit? no (1.50); at accum_steps 64 no more than at 2? yes (1.00)" in first
    assert "plain fit? yes (1.00); at accum_steps 64 no more than at 2? yes (1.00)" in second
    assert "plain fit? yes (1.20); at accum_steps 64 no more than at 2? no (1.20)" in third


def test_compile_time_refuses_what_cannot_be_measured(capsys):
    with pytest.raises(SystemExit):
        compile_time.main(["--repeats", "0"])
    assert "at least 1, and --accum-steps at least 2. Received: " in capsys.readouterr().err


@pytest.mark.skipif(
    not tf.config.list_physical_devices("GPU") and not Path("/proc/self/clear_refs").exists(),
    reason="memory is measured on a GPU or on Linux",
)
def test_memory_of_a_rival():
    make_case = functools.partial(memory.dense_case, layers=1, optimizer="SGD")
    peak, parameters = memory.measure(make_case, 300, _rivals.TENSOR_LOOP, 2, 2, False)
    assert parameters == 4 * (300 * 301 + 301 * _rivals.CLASSES)
    assert peak > parameters


def test_memory_in_both_its_tables(monkeypatch, tmp_path, capsys):
    def measure_apart(make_case, width, rival, micro_batch_size, accum_steps, jit):
        bytes_of_batch = 10**6 * (accum_steps if rival == LARGE else 1)
        return bytes_of_batch + (0 if rival == PLAIN else 2 * 10**6), 10**6

    monkeypatch.setattr(memory, "measure_apart", measure_apart)
    monkeypatch.setattr(_meters, "check_meter", lambda parser: None)
    table, drawing = tmp_path / "memory.json", tmp_path / "memory.png"
    options = "--jit off --optimizers SGD --micro-batch-size 2 --effective-batches 2 8".split()
    memory.main([*options, "--json", str(table), "--plot", str(drawing)])
    saved = json.loads(table.read_text())
    assert saved["setting"] == _common.machine()
    assert list(saved["batches"]) == list(memory.RIVALS)
    assert drawing.stat().st_size > 0
    rows = {row[0]: row[1:] for row in rows_of(capsys.readouterr().out)}
    assert rows[LARGE] == ["3", "6"]
    assert rows[_rivals.TENSOR_LOOP] == ["2.00"]  # of the second table, which comes last
    assert rows[f"MB of {PLAIN}"] == ["1"]
