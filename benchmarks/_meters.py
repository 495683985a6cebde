"""Meters of memory: of the tensors on a device, or of all that a process holds."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

# With these the C library asks the system for each large block, and gives it back once freed.
GIVES_BACK = {"TF_ENABLE_ONEDNN_OPTS": "0", "MALLOC_MMAP_THRESHOLD_": "1000000"}


class Meter(NamedTuple):
    """A meter of memory.

    Attributes:
        now: Function that returns the bytes that are held now.
        peak: Function that returns the most bytes held since `restart`.
        restart: Function that forgets the peak so far.
    """

    now: Callable
    peak: Callable
    restart: Callable


def device_meter(device):
    """The `Meter` of the tensors on a device."""
    memory = tf.config.experimental
    return Meter(
        lambda: memory.get_memory_info(device)["current"],
        lambda: memory.get_memory_info(device)["peak"],
        lambda: memory.reset_memory_stats(device),
    )


def process_meter():
    """The `Meter` of all that this process holds."""

    def held(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def restart():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    return Meter(lambda: held("VmRSS:"), lambda: held("VmHWM:"), restart)


def find_meter():
    """The meter of the first GPU, or of this process if there is none."""
    gpus = tf.config.list_logical_devices("GPU")
    return device_meter(gpus[0].name.removeprefix("/device:")) if gpus else process_meter()


def check_meter(parser):
    """Ends with the parser's error where memory cannot be measured."""
    if not tf.config.list_physical_devices("GPU") and not Path("/proc/self/clear_refs").exists():
        parser.error("without a GPU memory can be measured on Linux only")
