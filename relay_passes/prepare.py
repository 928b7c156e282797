"""From an imported program to canonical form.

Canonical form: one static ``main`` of Relax operators in one dataflow block, constants bound, convolutions as
``conv2d`` in NHWC with OHWI weights, dense layers as ``matmul(x, constant (in, out))``, nonlinear layers as one
operator each, BatchNorm folded.
"""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_qfp8.relay_passes.choose_layout import ChooseLayout
from tvm_qfp8.relay_passes.fold_constants import FoldConstants
from tvm_qfp8.relay_passes.recognize import Recognize
from tvm_qfp8.relay_passes.restore_clip import RestoreClip


def prepare_passes() -> list:
    """The passes, in order."""
    return [
        # -- what the importers leave: operators on constants, clips in pieces
        FoldConstants(),
        RestoreClip(),
        # -- BatchNorm: into the convolution before it, or multiply and add
        relax.transform.FoldBatchnormToConv2D(),
        relax.transform.DecomposeOpsForInference(),
        FoldConstants(),
        # -- nonlinear layers that the file holds as many small operators
        Recognize(),
        # -- channels last
        ChooseLayout(),
        FoldConstants(),
        relax.transform.CanonicalizeBindings(),
        relax.transform.DeadCodeElimination(),
    ]


def prepare(mod: tvm.IRModule) -> tvm.IRModule:
    """The canonical form of an imported program."""
    return tvm.transform.Sequential(prepare_passes())(mod)
