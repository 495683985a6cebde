"""What belongs on an epoch's end."""

import keras


class FlushAtEpochEnd(keras.callbacks.Callback):
    """Applies a partial cycle when the epoch's last batch is through, before its validation."""

    def on_test_begin(self, logs=None):
        """Validation is the first thing that `fit` does after an epoch's last batch."""
        self.model.flush()

    def on_epoch_end(self, epoch, logs=None):
        """Where there is no validation."""
        self.model.flush()
