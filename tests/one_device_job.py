"""Trains under `MirroredStrategy()` where there is one device; prints what it finds as JSON."""

import json
import pathlib
import re

import tensorflow as tf

from tests.oracle import WAYS, difference
from tests.test_one_device import _data, everything_per_update, trained

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "several_devices.md"


def replicas_of(snippet):
    """Runs a snippet, which asserts what it promises."""
    names = {"__name__": "snippet"}
    exec(compile(snippet, "snippet", "exec"), names)
    return names["replicas"]


def main():
    data = _data("float32")
    large = trained("plain", tf.distribute.get_strategy(), everything_per_update, data)
    differences = {}
    for way in WAYS:
        model = trained(way, tf.distribute.MirroredStrategy(), everything_per_update, data)
        differences[way] = difference(model.get_weights(), large.get_weights())
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found = {
        "devices": len(tf.config.list_logical_devices()),
        "replicas_in_snippets": [replicas_of(snippet) for snippet in snippets],
        "differences": differences,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
