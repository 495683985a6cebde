"""A model's twin: the same layers and attributes, with the training methods of another model."""

import types

import keras

from gradient_accumulator_tf import _keras


class _Unannounced:
    """Keeps a class's `__init_subclass__` from what it does with classes that a user writes."""

    def __init_subclass__(cls):
        """Does nothing."""


def make_twin(model, trainer):
    """`model` as an object of its class whose training methods end in `trainer`'s.

    What the model's class does in its own `fit` runs, and the `super().fit` in it is
    `trainer.fit`, as if the class had been derived from `trainer`'s class in place of
    `keras.Model`. What `compile` sets (`optimizer`, `stop_training`) is `trainer`'s as well.
    Everything else is the model's own: both objects have the same attributes.

    Args:
        model: A `keras.Model` of any class.
        trainer: Another one, whose class has no part in the model's.
    """
    cls = type(model)
    end = type("Trainer", (keras.Model,), _ends_in(trainer))

    def fill(namespace):
        namespace["__module__"], namespace["__doc__"] = cls.__module__, cls.__doc__
        # Files and configs name the model's class, and `from_config` in a method makes one of it.
        namespace["__class__"] = property(lambda self: cls)
        namespace["__new__"] = lambda _, *args, **kwargs: cls(*args, **kwargs)
        for name in _keras.TRAINER_ATTRIBUTES:
            namespace[name] = _attribute_of(trainer, name)

    # Python puts `end` right before `keras.Model` in the order in which `super` looks.
    bases = (_Unannounced, end) if cls is keras.Model else (_Unannounced, cls, end)
    twin = object.__new__(types.new_class(cls.__name__, bases, exec_body=fill))
    object.__setattr__(twin, "__dict__", vars(model))
    return twin


def _ends_in(trainer):
    """Dict of all training methods, as those of `trainer`'s class with `trainer` as self.

    Not the attributes of `trainer` itself, which may be the twin's own.
    """

    def method(name):
        def call(self, *args, **kwargs):
            return getattr(type(trainer), name)(trainer, *args, **kwargs)

        return call

    return {name: method(name) for name in _keras.trainer_methods()}


def _attribute_of(trainer, name):
    return property(
        lambda self: getattr(trainer, name),
        lambda self, value: setattr(trainer, name, value),
        lambda self: delattr(trainer, name),
    )
