"""Calibration samples that are read more than once, kept in temporary files as a generator cannot be run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from tvm_qfp8.calibration.evaluate import TensorSpec
from tvm_qfp8.calibration.samples import Batches, samples_of
from tvm_qfp8.calibration.spill import Spill
from tvm_qfp8.errors import CalibrationError

_FLOW = "samples"


class StoredSamples:
    """Samples in the shapes of a module's inputs, to be iterated over as often as needed.

    Use it in a ``with`` statement, which deletes the files.

    Parameters
    ----------
    batches : iterable of {input name: array}, or one such dict, or path of an .npz file
        Consumed once.
    inputs : dict of str to TensorSpec
        What each sample must hold.
    folder : str
        Where the temporary folder is made (default: the system's).

    Raises
    ------
    CalibrationError
        There is no sample, or one does not fit the inputs.
    """

    def __init__(self, batches: Batches, inputs: Mapping[str, TensorSpec], folder: str | None = None) -> None:
        self._names, self._count, self._spill = list(inputs), 0, Spill(folder)
        try:
            for name, spec in inputs.items():
                self._spill.create(name, _FLOW, spec)
            for sample in samples_of(batches, inputs):
                for name in self._names:
                    self._spill.write(name, _FLOW, self._count, sample[name])
                self._count += 1
            if not self._count:
                raise CalibrationError("found no calibration samples; give at least one")
        except BaseException:
            self._spill.close()
            raise

    def __enter__(self) -> StoredSamples:
        return self

    def __exit__(self, *_error: object) -> None:
        self._spill.close()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for sample in range(self._count):
            yield {name: self._spill.read(name, _FLOW, sample) for name in self._names}
