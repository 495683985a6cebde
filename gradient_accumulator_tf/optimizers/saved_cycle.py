"""What files and checkpoints hold of a cycle, also if they are read before there are variables."""

import numpy as np
import tensorflow as tf

from gradient_accumulator_tf.optimizers.checkpoint_notes import CheckpointNotes


class SavedCycle:
    """Writes the state of a `Cycle`, and reads it.

    What is read before the optimizer is built is kept until `load_kept`. Then there are variables.

    Args:
        optimizer: The `GradientAccumulateOptimizer`.
        cycle: Its `Cycle`.

    Attributes:
        notes: `CheckpointNotes`, which the optimizer must have as an attribute.
    """

    def __init__(self, optimizer, cycle):
        self._optimizer, self._cycle = optimizer, cycle
        self._state = self._weights = None
        self.notes = CheckpointNotes(self._write_notes, self._read_notes)

    def write(self, store):
        """Writes the sums if a cycle is open, `accum_steps` if it was set, and what was dropped.

        Args:
            store: Dict-like, of name to array.
        """
        cycle = self._cycle
        micro_step, _ = cycle.accumulator.in_cycle()
        if int(micro_step):
            for name, variable in cycle.accumulator.state.items():
                store[name] = variable.numpy()
        if cycle.length.set_by_hand is not None:
            store["accum_steps"] = np.int64(cycle.length.set_by_hand)
        dropped = cycle.drops.state
        if any(int(variable.numpy()) for variable in dropped.values()):
            for name, variable in dropped.items():
                store[name] = variable.numpy()

    def read(self, store):
        """Reads the state of the inner optimizer and of the cycle, now or at `load_kept`.

        Args:
            store: Dict-like, of name to array. The inner optimizer names its variables "0", "1",
                and so on.
        """
        state = {name: np.array(store[name]) for name in store.keys()}
        if self._optimizer.built:
            self._load(state)
            return
        self._state = state
        self._take_steps(state.get("accum_steps"))
        if _holds_open_cycle(state):
            self._cycle.groups_to_make = 1

    def keep_weights(self, weights):
        """Keeps a list of arrays, for `set_weights` of the optimizer once it is built."""
        self._weights = [np.array(weight) for weight in weights]
        if any(weight.dtype == bool for weight in self._weights):
            # Only sums have such a variable: which of them were begun.
            self._cycle.groups_to_make = 1

    def load_kept(self):
        """Loads what was read before the optimizer was built, if anything."""
        state, self._state = self._state, None
        weights, self._weights = self._weights, None
        # Once and now, also where Keras builds the optimizer in a graph.
        with tf.init_scope():
            if state is not None:
                self._load(state)
            if weights is not None:
                self._optimizer.set_weights(weights)

    def _load(self, state):
        own = {name: value for name, value in state.items() if not name.isdecimal()}
        inner = {name: value for name, value in state.items() if name not in own}
        self._optimizer.inner_optimizer.load_own_variables(inner)
        self._take_steps(own.get("accum_steps"))
        cycle = self._cycle
        if _holds_open_cycle(own):
            cycle.begin_to_accumulate()
        for name, variable in cycle.drops.state.items():
            variable.assign(own.get(name, 0))
        if cycle.accumulator.keeps_sums:
            cycle.accumulator.load(own)

    def _take_steps(self, steps):
        """Takes the number of a file, or None, unless the constructor was given a schedule."""
        if steps is not None and not self._cycle.length.is_schedule:
            self._cycle.set_steps(int(steps))

    def _write_notes(self):
        groups = self._cycle.accumulator.number_of_groups
        return {"accum_steps": self._cycle.length.set_by_hand, "groups": groups}

    def _read_notes(self, notes):
        """Makes ready for the variables of a checkpoint."""
        cycle, groups = self._cycle, notes["groups"]
        self._take_steps(notes["accum_steps"])
        cycle.groups_to_make = groups
        if not self._optimizer.built:
            return
        if groups:
            cycle.begin_to_accumulate()
            cycle.accumulator.make_groups(groups)
        else:
            cycle.accumulator.drop()


def _holds_open_cycle(state):
    """Whether a dict of what was saved has the sums of a cycle in it."""
    return "micro_step" in state
