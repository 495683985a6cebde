"""The protocol of a barrier: what later computation needs of all examples of an effective batch.

Micro-batches cannot run to the end one by one where an example's output depends on the other
examples. They can run up to that place, all of them. There each micro-batch contributes something,
the contributions are finished to statistics of the effective batch, and then each micro-batch goes
on with these. The way back is the same in reverse. For a barrier `y_k = f(x_k, s)` with the
statistics `s = g(sum_k c(x_k))` of micro-batches k, the derivative of a loss with respect to x_k is

    f_x(x_k, s) y_bar_k  +  c_x(x_k) g_sum s_bar     with     s_bar = sum_k f_s(x_k, s) y_bar_k.

The tape of the engine computes the first term and `s_bar`. The barrier computes the second term,
which is what the examples send to each other: `pull_back` once per effective batch (`g_sum s_bar`,
the message), and `send_back` for each micro-batch.

| method | runs | in batch norm |
|---|---|---|
| `contribute` | forward, per micro-batch | number of elements, sums of values and of squares |
| `finish` | forward, once | mean and variance |
| `apply` | forward and backward, per micro-batch | the normalised inputs |
| `pull_back` | backward, once | derivatives with respect to mean and variance, per element |
| `send_back` | backward, per micro-batch | the derivative through mean and variance |
| `end` | once, after the last gradient | moving statistics |

A loss over the outputs of all examples is a barrier that gathers (`models/coupled_loss.py`). It
stands behind the model's outputs. `finish` computes the loss and its derivatives with respect to
the outputs, no stage applies it, and the message is these derivatives.

Each method runs on each replica. A barrier that spans replicas adds up over them in `finish` and
in `pull_back`, which run outside of loops and conditionals.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from gradient_accumulator_tf import _keras


class Finished(NamedTuple):
    """What the contributions of an effective batch were finished to.

    Attributes:
        statistics: Nested structure of tensors of floats. `apply` reads them, and the loss is
            differentiated with respect to them.
        notes: Nested structure of tensors that only `pull_back` and `end` read.
    """

    statistics: Any
    notes: Any = ()


class Barrier(abc.ABC):
    """One place in a graph where all examples of an effective batch meet.

    `inputs` and `outputs` are lists of tensors of one micro-batch, in the order of the node in the
    graph, and have its dtypes. A barrier has no state of one effective batch: the engine keeps what
    the methods return.

    Attributes:
        cheap_to_apply: Whether `apply` costs so little that a later stage runs it again rather than
            reading what was kept of its outputs.
        gathers: Whether the examples themselves have to meet, where no sum over them is enough: a
            loss that compares examples, attention over the batch. Then `finish` also gets the
            inputs of all examples, which are kept for that, and the message has one row for each
            example.
    """

    cheap_to_apply = False
    gathers = False

    @abc.abstractmethod
    def contribute(self, inputs):
        """What a micro-batch adds to the sum over the effective batch.

        Args:
            inputs: List of tensors.

        Returns:
            Nested structure of tensors, whose static shapes and dtypes are the same for every
            micro-batch. Zeros for a micro-batch without examples.
        """

    @abc.abstractmethod
    def finish(self, total, gathered):
        """The statistics of the effective batch.

        Args:
            total: The sum of what this replica's micro-batches contributed.
            gathered: If the barrier gathers, list of its inputs for all examples of this replica's
                effective batch, in their order; otherwise None.

        Returns:
            `Finished`.
        """

    @abc.abstractmethod
    def apply(self, inputs, statistics):
        """The outputs of a micro-batch, recorded by the tape of the caller.

        It runs within the training call of a layer, and may use the variables of the node's layer.

        Args:
            inputs: List of tensors.
            statistics: As returned by `finish`.

        Returns:
            List of the node's outputs.
        """

    @abc.abstractmethod
    def pull_back(self, finished, cotangents):
        """What all micro-batches have to know for `send_back`.

        Args:
            finished: What `finish` returned.
            cotangents: Float64 tensors nested like the statistics: the loss's derivatives with
                respect to them, summed over this replica's micro-batches.

        Returns:
            Nested structure of tensors, the message. If the barrier gathers, each has one row for
            each example of this replica's effective batch.
        """

    @abc.abstractmethod
    def send_back(self, inputs, message):
        """The derivative of the loss that reaches a micro-batch's inputs through the statistics.

        Args:
            inputs: List of tensors.
            message: What `pull_back` returned; if the barrier gathers, the micro-batch's rows of
                it.

        Returns:
            List with a tensor, of the input's shape and dtype, or None for each input.
        """

    def end(self, finished, finite_only):
        """Assigns what the effective batch leaves behind, such as moving statistics.

        Args:
            finished: What `finish` returned.
            finite_only: Whether to leave out what is not finite.
        """
        del finished, finite_only  # most leave nothing


class Refused(NamedTuple):
    """In place of a barrier: why a layer that needs one cannot have it.

    Attributes:
        why: How the sentence "Received: 'path/of/layer', which ..." goes on.
    """

    why: str


@dataclasses.dataclass(frozen=True)
class BarrierKind:
    """Which layers of a model make barriers, and how errors name them.

    Attributes:
        find: Function of a layer that returns its new `Barrier`, None if it needs none, or
            `Refused`. It does not look into layers within the layer.
        argument: The argument by which the user asks for such barriers: 'batch_norm="exact"'.
        layers: What the errors call the layers: "trainable batch norm".
        instead: Sentence with what to do where the graph cannot be cut.
        otherwise: The argument to pass instead: 'batch_norm="micro_batch"'.
    """

    find: Callable
    argument: str
    layers: str
    instead: str
    otherwise: str

    def is_in(self, layer):
        """Whether a layer, or one in it, makes a barrier or is refused one."""
        return any(self.find(inner) is not None for inner in _keras.all_layers(layer))
