"""Every error a user can meet. One line each: what was found, what is supported, what to do next."""


class QFP8Error(Exception):
    """Base of all errors raised on purpose by this package."""


class ModelError(QFP8Error):
    """The model file or module cannot be used (missing, truncated, NaN weights, unknown shape ...)."""


class UnsupportedOperatorError(ModelError):
    """The model holds an operator that the importer does not know."""


class TargetError(QFP8Error):
    """The compilation target is unknown or cannot be built for."""


class CalibrationError(QFP8Error):
    """Calibration data are missing an input, have a wrong shape or dtype, or are not finite."""


class InputError(QFP8Error):
    """An array handed to a compiled module has a wrong name, shape or dtype, or is not finite."""


class TuningError(QFP8Error):
    """Tuning cannot start or go on (no board, no compiler, a log folder that cannot be written)."""


class TableError(QFP8Error):
    """A table with the asked error bound cannot be built."""


class MissingPackageError(QFP8Error, ImportError):
    """A part of this package needs an optional one that is not installed."""
