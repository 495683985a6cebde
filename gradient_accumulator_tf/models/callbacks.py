"""Callbacks that act at the end of an epoch."""

from __future__ import annotations

import math
import time
from typing import Any

import keras

from gradient_accumulator_tf._checks import check_positive_int


class FlushAtEpochEnd(keras.callbacks.Callback):
    """Updates with a partial cycle after an epoch's last batch, before the validation."""

    def on_test_begin(self, logs: Any = None) -> None:
        """Updates. `fit` calls it first after an epoch's last batch, if there is a validation."""
        self.model.flush()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Updates, if there was no validation."""
        self.model.flush()


class ThroughputLogger(keras.callbacks.Callback):
    """Adds the speed of each epoch, and the size of its updates, to its logs.

    - `examples_per_second` and `updates_per_second`: the time is from the begin of the epoch to the
      end of its last batch, without the validation. In the first epoch it includes tracing and
      compiling.
    - `effective_batch`: examples per update, the mean over the epoch's updates. It is NaN in an
      epoch without an update.
    - `dropped_micro_steps`: micro-batches that were not finite and so were dropped, since the
      beginning. Optimizer and model count them under the same name.

    Put it before the callbacks that need these logs, such as a CSVLogger. Keras passes the logs
    from one callback to the next, and to History and the progress bar last.

    ```python
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(GradientAccumulateOptimizer("adam", accum_steps=4), loss="mse")
    history = model.fit(
        np.ones((256, 8)),
        np.ones((256, 1)),
        batch_size=16,
        callbacks=[ThroughputLogger(batch_size=16), keras.callbacks.CSVLogger("log.csv")],
    )
    assert history.history["effective_batch"] == [64]
    ```

    It works with either wrapper. It also works with neither, and then every batch is an update.

    An update counts in the epoch in which it is made. A GradientAccumulateOptimizer may end the
    last epoch in mid-cycle. The update with this partial cycle comes after the epoch, and counts in
    none.

    Args:
        batch_size: Examples in a batch of `fit`, over all replicas. A smaller last batch counts as
            a whole one.

    Raises:
        TypeError: If `batch_size` is not an integer.
        ValueError: If it is smaller than 1.
    """

    async_safe = True  # so Keras starts the next batch without waiting for the logs of this one

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        meaning = "examples in a batch of fit"
        instead = "Pass the batch_size that fit is given."
        self.batch_size = check_positive_int("batch_size", batch_size, meaning, instead)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the time and the counts."""
        self._batches = 0
        self._counts = _counts(self.model)
        self._begin = self._end = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Notes the time and the number of batches."""
        self._end = time.perf_counter()
        # `batch` is the first of an execution in some versions of Keras, and the last in others.
        size = self.model.steps_per_execution
        batches = (batch // size + 1) * size
        self._batches = max(self._batches, min(batches, self.params.get("steps") or batches))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds to the logs of the epoch."""
        counts = _counts(self.model)
        updates, micro_step, dropped = (
            now - before for now, before in zip(counts, self._counts, strict=True)
        )
        seconds = self._end - self._begin
        examples = self._batches * self.batch_size
        micro_batch_size = getattr(self.model, "micro_batch_size", None) or self.batch_size
        in_updates = examples - micro_step * self.batch_size - dropped * micro_batch_size
        logs.update(
            examples_per_second=examples / seconds if seconds else math.nan,
            updates_per_second=updates / seconds if seconds else math.nan,
            effective_batch=in_updates / updates if updates else math.nan,
            dropped_micro_steps=counts[-1],
        )


def _counts(model):
    """Updates so far, micro-steps in the open cycle, and micro-steps dropped so far."""
    optimizers = [model.optimizer]
    while hasattr(optimizers[-1], "inner_optimizer"):
        optimizers.append(optimizers[-1].inner_optimizer)

    def count(name):
        counts = (getattr(owner, name, None) for owner in (model, *optimizers))
        return _as_int(next((c for c in counts if c is not None), 0))

    # Keras 3.8 counts no updates in a LossScaleOptimizer.
    return _as_int(optimizers[-1].iterations), count("micro_step"), count("dropped_micro_steps")


def _as_int(count):
    return int(keras.ops.convert_to_numpy(count))
