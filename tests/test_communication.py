"""On two worker processes an update sends what the large batch's does, however it accumulates."""

import json
import os
import sys

import pytest
import tensorflow as tf

from benchmarks import communication
from benchmarks.communication import EVERY_STEP, IDLE, LARGE, OURS

reads_loopback = pytest.mark.skipif(
    not communication.INTERFACES.exists(), reason="only Linux counts the bytes of an interface"
)
# The first worker fails or not. The other tells its process id and waits, as for a stuck peer; it
# takes that back if nobody stops it.
WORKER = """
import json, os, sys, time
if json.loads(os.environ["TF_CONFIG"])["task"]["index"]:
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
    os.remove(sys.argv[1])
elif sys.argv[2] == "fails":
    while not (os.path.exists(sys.argv[1]) and os.path.getsize(sys.argv[1])):
        time.sleep(0.01)
    sys.exit("out of luck")
"""


@reads_loopback
def test_an_update_sends_what_the_large_batch_sends(tmp_path, capsys):
    file, drawing = tmp_path / "bytes.json", tmp_path / "bytes.png"
    sizes = "--units 256 --accum-steps 4 --micro-batch-size 2 --updates 3 --repeats 3"
    results = communication.main([*sizes.split(), "--json", str(file), "--plot", str(drawing)])
    assert drawing.stat().st_size > 0
    assert json.loads(file.read_text())["bytes"] == results
    measured = results["accum_steps 4"]
    assert list(measured) == [LARGE, EVERY_STEP, *OURS, IDLE]
    assert communication.per_update(measured[LARGE]) > 1.5e6  # 0.8 MB of gradients, both ways
    assert communication.ratio(measured, EVERY_STEP) == pytest.approx(4, rel=0.05)
    printed = capsys.readouterr().out
    for name in OURS:
        assert communication.ratio(measured, name) == pytest.approx(1, abs=0.05), name
        assert f"{name} within 5 % of the large batch? accum_steps 4 yes (1.0" in printed
    assert f"| {EVERY_STEP} | " in printed


@pytest.mark.parametrize(
    "first, timeout, message",
    [("fails", 60, "worker 0, exit status 1:\nout of luck"), ("ends", 5, "not done in 5 s")],
)
def test_no_worker_outlives_a_failure(first, timeout, message, tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path / "pid"), first]
    with pytest.raises(RuntimeError, match=message):
        communication.run_workers(command, 2, timeout)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    "gpus, taken", [([], []), (["a"], ["a"] * 3), (["a", "b"], ["a", "b", "a"])]
)
def test_each_worker_takes_one_gpu_if_there_are_any(gpus, taken, monkeypatch):
    seen, growing = [], []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda own, kind: seen.append(own))
    monkeypatch.setattr(
        tf.config.experimental, "set_memory_growth", lambda own, on: growing.append(own)
    )
    for task in range(3):
        communication.take_a_gpu(task)
    assert seen == growing == taken


def test_refuses_what_cannot_be_measured(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        communication.main(["--workers", "1"])
    assert "--workers at least 2" in capsys.readouterr().err
    monkeypatch.setattr(communication, "INTERFACES", tmp_path / "dev")
    with pytest.raises(SystemExit):
        communication.main([])
    assert "not Linux?" in capsys.readouterr().err
