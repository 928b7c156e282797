"""A batch dimension that stays open: ``input_shapes={"image": ("batch", 3, 224, 224)}``.

Kernels are written for one sample, and ``run`` takes any number of them, one after the other: every sample has the bits
that it has alone, and a batch of none is none.
"""

from __future__ import annotations

from tvm_qfp8.errors import ModelError
from tvm_qfp8.importers.open_length import ShapesAtLength


def close_batch(input_shapes: ShapesAtLength) -> tuple[dict[str, tuple[int, ...]], str | None]:
    """The shapes of one sample, and the name that stands for the number of samples.

    Raises
    ------
    ModelError
        Another dimension than the first has a name, or inputs have different ones.
    """
    names: set[str] = set()
    closed = {}
    for name, shape in input_shapes.items():
        first, rest = shape[:1], shape[1:]
        if any(isinstance(extent, str) for extent in rest):
            raise ModelError(
                f"input {name!r} is given as {tuple(shape)}: only the first dimension, the batch, may stay open; "
                "for another give the lengths that the module is for: lengths_up_to(128), or a list of them"
            )
        names.update(extent for extent in first if isinstance(extent, str))
        closed[name] = tuple(1 if isinstance(extent, str) else int(extent) for extent in shape)
    if len(names) > 1:
        raise ModelError(f"inputs have different batches: {', '.join(sorted(names))}; give them one name")
    return closed, names.pop() if names else None


def check_batch(
    batch: str, input_shapes: ShapesAtLength, inputs: ShapesAtLength, outputs: ShapesAtLength
) -> None:
    """Refuse to leave a batch open that not all inputs and outputs have in front.

    Parameters
    ----------
    batch : str
    input_shapes : dict of name to shape
        As the user gave them.
    inputs, outputs : dict of name to shape
        Of one sample.

    Raises
    ------
    ModelError
    """
    for name in inputs:
        if input_shapes.get(name, ())[:1] != (batch,):
            raise ModelError(
                f"input {name!r} has no open batch {batch!r}, others have; give it for every input or for none"
            )
    for name, shape in outputs.items():
        if shape[:1] != (1,):
            raise ModelError(
                f"output {name!r} has shape {tuple(shape)} for one sample: no batch in front; give all dimensions of "
                "the inputs as numbers"
            )
