"""AtomicBackupAndRestore: each backup of a training is complete, or does not exist."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from typing import Any, Literal

import keras

from gradient_accumulator_tf import _keras

_PARTIAL = "partial"  # the folder of a backup that is not complete yet
_DELETED = "deleted-"  # the beginning of the names of folders that are to be deleted


class AtomicBackupAndRestore(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` for a training that may be killed at any moment.

    Keras's callback overwrites the two files of its only backup. A kill during this leaves a backup
    that cannot be read, or weights and an epoch that do not belong together. This callback writes
    each backup into a new folder, and renames the folder when both files are complete. It keeps the
    previous backup until the next one. If the newest backup cannot be read all the same, as on a
    full or broken disk, training resumes from the previous one, with a warning.

    It works with any Keras model, with either wrapper and with neither. It also reads a backup that
    Keras's callback left in the folder.

    ```python
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(GradientAccumulateOptimizer("adam", accum_steps=4), loss="mse")
    model.fit(
        np.ones((256, 8)),
        np.ones((256, 1)),
        batch_size=16,
        epochs=3,
        callbacks=[AtomicBackupAndRestore("backup")],
    )
    ```

    Args:
        backup_dir: Path of a local folder that no other training and no other process uses.
        save_freq: `"epoch"`, or the number of batches between backups. A training resumes at the
            begin of an epoch either way.
        double_checkpoint: Has no effect. The previous backup is always kept. The argument is here
            so that the callback can take the place of Keras's.
        delete_checkpoint: Whether to delete the backups at the end of `fit`.

    Raises:
        ValueError: If `backup_dir` is empty or on a remote file system, or if `save_freq` is
            neither of the two; and from `fit`, if the model is not built.
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: int | Literal["epoch"] = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
    ) -> None:
        super().__init__(backup_dir, save_freq, double_checkpoint, delete_checkpoint)
        if re.match(r"[a-z0-9]+://", str(backup_dir)):
            raise ValueError(
                "`backup_dir` must be a folder of a local file system, which renames it as a "
                f"whole. Received: backup_dir={backup_dir!r}. Pass a local one, or use "
                "keras.callbacks.BackupAndRestore."
            )
        self._last: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Restores the newest backup that can be read, if there is a backup.

        Raises:
            Exception: If no backup can be read, Keras's error for the newest one.
        """
        errors, self._last = [], None
        for folder in self._backups():
            try:
                self._read(folder, logs)
            except Exception as error:  # whatever a broken file leads to
                errors.append(error)
            else:
                self._last = folder
                break
        if errors and self._last is None:
            raise errors[0]
        if errors:
            warnings.warn(
                f"The newest backup in {str(self.backup_dir)!r} cannot be read "
                f"({type(errors[0]).__name__}: {errors[0]}). Training goes on from "
                f"{os.path.basename(self._last)!r}, which is older.",
                UserWarning,
                stacklevel=2,
            )
        elif self._last is None:
            # Keras's callback may have left a backup.
            _keras.use_backup_folder(self, self.backup_dir)
            super().on_train_begin(logs)
        for name in os.listdir(self.backup_dir) if os.path.isdir(self.backup_dir) else []:
            if name.startswith(_DELETED):
                shutil.rmtree(self._path(name))
        self._write_elsewhere()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the epoch, which a backup within it holds."""
        _keras.set_backup_epoch(self, epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Writes a backup, if `save_freq` is "epoch"."""
        super().on_epoch_end(epoch, logs)
        self._finish()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Writes a backup, if it is time for one."""
        super().on_train_batch_end(batch, logs)
        self._finish()

    def on_train_end(self, logs: Any = None) -> None:
        """Deletes the backups, if `delete_checkpoint` is true."""
        shutil.rmtree(self._path(_PARTIAL), ignore_errors=True)
        if self.delete_checkpoint:
            # The oldest first: after a kill at this point, none must be restored.
            for folder in reversed(self._backups()):
                os.rename(folder, self._path(_DELETED + os.path.basename(folder)))
        super().on_train_end(logs)
        self._last = None

    def _path(self, name):
        return os.path.join(self.backup_dir, name)

    def _backups(self):
        """List of the folders of the backups, newest first."""
        names = os.listdir(self.backup_dir) if os.path.isdir(self.backup_dir) else []
        backups = [name for name in names if re.fullmatch(r"backup-\d+", name)]
        return [self._path(name) for name in sorted(backups, key=_number, reverse=True)]

    def _read(self, folder, logs):
        if len(os.listdir(folder)) < 2:  # Keras would restore from one file alone
            raise FileNotFoundError(
                "A backup must hold two files, one of weights and one of the epoch. Received: "
                f"{folder!r} with {os.listdir(folder)}. Delete {str(self.backup_dir)!r} to train "
                "from the start."
            )
        _keras.use_backup_folder(self, folder)
        super().on_train_begin(logs)

    def _write_elsewhere(self):
        """Lets Keras write its next files into an empty folder, which is no backup yet."""
        shutil.rmtree(self._path(_PARTIAL), ignore_errors=True)
        os.makedirs(self._path(_PARTIAL))
        _keras.use_backup_folder(self, self._path(_PARTIAL))

    def _finish(self):
        """Makes the files that Keras has written the newest backup, if there are any."""
        written = [entry.path for entry in os.scandir(self._path(_PARTIAL))]
        if not written:
            return
        for path in written:
            _to_disk(path)
        old = self._backups()
        newest = self._path(f"backup-{_number(old[0]) + 1 if old else 1}")
        os.rename(self._path(_PARTIAL), newest)
        _to_disk(self.backup_dir)
        for folder in old:
            if folder != self._last:
                shutil.rmtree(folder)
        self._last = newest
        self._write_elsewhere()


def _number(folder):
    return int(os.path.basename(folder).removeprefix("backup-"))


def _to_disk(path):
    """Waits until a file, or the list of files in a folder, would survive a power failure."""
    if os.path.isdir(path) and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.path.isfile(path) else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
