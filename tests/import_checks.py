"""Whether a model that came in computes what it should."""

import numpy as np
from models import run_reference

from tvm_qfp8.calibration import evaluate
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare


def check(made, inputs, **options):
    """Import, prepare, evaluate, compare with ONNX's reference implementation."""
    imported = load_model(made, **options)
    got = evaluate(prepare(imported.mod), inputs)
    for ours, theirs in zip(got, run_reference(made, inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    return imported
