"""Benchmarks. Run them from the root of the repository, as in `python -m benchmarks.overhead`."""

import os

# TensorFlow reads it when it is imported. Its start-up notices would stand between the tables.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
