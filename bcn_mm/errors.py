"""Exceptions that stand for a mistake in what the user gave."""


class InputError(Exception):
    """Something that the user gave is wrong; the message says what to do."""


class DialectError(InputError, RuntimeError):
    """Weights were trained with another standardization than the model has."""
