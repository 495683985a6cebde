"""The examples on several devices and workers: one result, also after a stop and a new start."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import keras
import pytest
import tensorflow as tf

from examples import digits, mirrored, multi_worker
from tests.oracle import KERAS

pytestmark = pytest.mark.skipif(
    KERAS < (3, 10), reason="its metrics synchronise replicas, which the loop in a step may not"
)

ROOT = Path(__file__).parent.parent
# Of 150 images 22 are held out, so 128 are left: two updates per epoch.
SMALL = ["--examples", "150", "--batch-size", "64", "--micro-batch-size", "8"]
COMMAND = [sys.executable, "examples/multi_worker.py", *SMALL]


def test_mirrored_devices_end_with_the_weights_of_one(capfd):
    results = mirrored.main([*SMALL, "--epochs", "2"])
    large, *accumulated = results
    assert [r["way"] for r in results] == list(mirrored.WAYS)
    assert large["replicas"] == 1
    assert all(r["replicas"] >= 2 for r in accumulated)
    assert [r["updates"] for r in results] == [4] * 4
    assert large["weight_difference"] == 0
    assert large["weight_movement"] > 0.01
    for result in accumulated:
        # Not 0 either: on several replicas sums are rounded in another order.
        assert 0 < result["weight_difference"] < 1e-3 * large["weight_movement"]
        assert result["validation_accuracy"] == large["validation_accuracy"]
    printed = capfd.readouterr().out
    assert ("There is no GPU here" in printed) == (not tf.config.list_physical_devices("GPU"))
    assert mirrored.table(results) in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "1600"], "training images, here 1540. Received: 1600."),
        (["--batch-size", "100"], "Received: 100, and 16 times 2. Pass for example "),
        (["--devices", "0"], "--devices: must be a whole number of 1 or more. Received: 0"),
    ],
)
def test_mirrored_refuses_arguments(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(mirrored, "find_devices", lambda count: ["CPU:0", "CPU:1"])
    with pytest.raises(SystemExit) as exit_:
        mirrored.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def run(*commands, timeout=150):
    """The outputs of commands that run at the same time, each with changes to the environment."""
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, environment in commands
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.terminate()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output for output, _ in outputs]


def run_workers(folder, epochs):
    """The chief's output of a job of two, each with a TF_CONFIG of its own."""
    command = [*COMMAND, "--checkpoint-dir", str(folder), "--epochs", str(epochs)]
    cluster = {"worker": [f"127.0.0.1:{port}" for port in multi_worker.free_ports(2)]}
    tasks = [{"cluster": cluster, "task": {"type": "worker", "index": i}} for i in range(2)]
    chief, _ = run(*[(command, {"TF_CONFIG": json.dumps(task)}) for task in tasks])
    return chief


def check_summary(output, updates):
    """The chief's last lines: the workers trained as one device does on the large batch."""
    assert re.search(r"^workers +2$", output, re.MULTILINE)
    assert re.search(rf"^updates +{updates}$", output, re.MULTILINE)
    accuracy, of_large_batch = re.search(r"accuracy +(\S+) \(large batch: (\S+)\)", output).groups()
    assert accuracy == of_large_batch
    difference, moved = re.search(r"difference +(\S+) \(weights moved by (\S+)\)", output).groups()
    assert float(moved) > 0.01
    assert float(difference) < 1e-3 * float(moved)


def test_workers_stopped_and_started_again_end_as_if_undisturbed(tmp_path):
    local = [*COMMAND, "--local-workers", "2", "--epochs", "2"]
    [output] = run(([*local, "--checkpoint-dir", str(tmp_path / "undisturbed")], {}))
    assert "Resuming" not in output
    check_summary(output, updates=4)

    check_summary(run_workers(tmp_path / "stopped", 1), updates=2)
    output = run_workers(tmp_path / "stopped", 2)
    assert "Resuming after epoch 1." in output
    assert "Epoch 2/2" in output.split("The large batch")[0]
    assert "Epoch 1/2" not in output.split("The large batch")[0]
    check_summary(output, updates=4)

    undisturbed, resumed = (
        keras.models.load_model(tmp_path / name / "model.keras")
        for name in ("undisturbed", "stopped")
    )
    assert digits.largest_difference(undisturbed.get_weights(), resumed.get_weights()) < 1e-6
    assert int(resumed.optimizer.iterations) == 4


def test_workers_find_each_other_under_slurm():
    # The resolver counts ports up from one; the next is free, as far as one can know.
    port = str(multi_worker.free_ports(1)[0])
    job = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    command = [*COMMAND, "--cluster", "slurm", "--port", port, "--wrapper", "optimizer"]
    command += ["--epochs", "1"]
    chief, other = run(*[(command, {**job, "SLURM_PROCID": rank}) for rank in "01"])
    check_summary(chief, updates=2)
    assert other == ""


def slurm_environment(monkeypatch, path):
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[08-09]")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    # Set first, so that what the resolver sets is undone after the test.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(path))


NODES = {"worker": ["node08:9000", "node08:9001", "node09:9000", "node09:9001"]}


def test_slurm_without_gpus(monkeypatch, tmp_path):
    slurm_environment(monkeypatch, tmp_path)
    resolver = multi_worker.find_cluster("slurm", 9000)
    assert resolver.cluster_spec().as_dict() == NODES
    assert (resolver.task_type, resolver.task_id) == ("worker", 3)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.skipif(os.name == "nt", reason="stands in for nvidia-smi with a shell script")
def test_slurm_shares_out_a_nodes_gpus(monkeypatch, tmp_path):
    lists_four = tmp_path / "nvidia-smi"
    lists_four.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: some (UUID: $i)"; done\n')
    lists_four.chmod(0o755)
    slurm_environment(monkeypatch, tmp_path)
    # As the worker sees them from then on.
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind] * 2)
    resolver = multi_worker.find_cluster("slurm", 9000)
    assert resolver.cluster_spec().as_dict() == NODES
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert resolver.num_accelerators() == {"GPU": 2}


def pod(name, address, phase="Running"):
    return SimpleNamespace(
        metadata=SimpleNamespace(name=name),
        status=SimpleNamespace(host_ip=address, phase=phase),
    )


def test_kubernetes_waits_for_all_pods(monkeypatch):
    first, second = pod("worker-0", "10.0.0.8"), pod("worker-1", "10.0.0.9")
    answers = [[first], [first, pod("worker-1", None, "Pending")], [second, first]]
    waited = []

    class CoreV1Api:
        def list_pod_for_all_namespaces(self, label_selector):
            assert label_selector == "app=digits"
            return SimpleNamespace(items=answers[min(len(waited), 2)])

    config = SimpleNamespace(load_incluster_config=lambda: None)
    client = SimpleNamespace(CoreV1Api=CoreV1Api)
    package = SimpleNamespace(client=client, config=config)
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    monkeypatch.setattr(multi_worker.time, "sleep", waited.append)
    monkeypatch.setenv("WORKER_SELECTOR", "app=digits")
    monkeypatch.setenv("WORKERS", "2")
    monkeypatch.setenv("HOST_IP", "10.0.0.9")
    resolver = multi_worker.find_cluster("kubernetes", 9000)
    assert resolver.cluster_spec().as_dict() == {"worker": ["10.0.0.8:9000", "10.0.0.9:9000"]}
    assert (resolver.task_type, resolver.task_id) == ("worker", 1)
    assert len(waited) == 2


def test_if_a_worker_fails_the_others_are_killed(tmp_path, capfd):
    script = f"""
import json, os, pathlib, sys, time
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
started = pathlib.Path({str(tmp_path)!r}, "worker_0")
if index == 0:
    print("the chief's output", flush=True)
    started.write_text(str(os.getpid()))
    time.sleep(60)
while not started.exists():
    time.sleep(0.05)
print("the other's output", flush=True)
sys.exit(3)
"""
    assert multi_worker.run_local_workers([sys.executable, "-c", script], 2) == 1
    printed = capfd.readouterr()
    assert printed.out == "the chief's output\n"
    assert "Worker 1 failed" in printed.err
    with pytest.raises(OSError):
        os.kill(int((tmp_path / "worker_0").read_text()), signal.SIGTERM)


def test_local_workers_that_end_well():
    assert multi_worker.run_local_workers([sys.executable, "-c", ""], 2) == 0


def test_multi_worker_refuses_a_batch_larger_than_the_data(capsys):
    with pytest.raises(SystemExit) as exit_:
        multi_worker.main(["--batch-size", "1600"])
    assert exit_.value.code == 2
    assert "training images, here 1540. Received: 1600." in capsys.readouterr().err


PAGE = (ROOT / "docs" / "several_devices.md").read_text()


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_the_pages_snippets_run_on_two_devices(snippet, monkeypatch):
    strategy = mirrored.strategy_on(mirrored.find_devices(2))
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda: strategy)
    names = {"__name__": "snippet"}
    exec(compile(snippet, "snippet", "exec"), names)
    assert names["replicas"] >= 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_pages_kubernetes_script_makes_tf_config():
    script = re.search(r"( +hosts=.*?)( +exec )", PAGE, re.DOTALL).group(1)
    job = {"WORKERS": "3", "JOB_COMPLETION_INDEX": "2"}
    [output] = run((["bash", "-c", textwrap.dedent(script) + 'echo "$TF_CONFIG"'], job))
    assert json.loads(output) == {
        "cluster": {"worker": [f"digits-{i}.digits:8888" for i in range(3)]},
        "task": {"type": "worker", "index": 2},
    }
