"""From an imported program to canonical form.

Canonical form: one static ``main`` of Relax operators in one dataflow block, constants bound, convolutions as
``conv2d`` in NHWC with OHWI weights, dense layers as ``matmul(x, constant (in, out))``, nonlinear layers as one
operator each, BatchNorm folded.
"""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_qfp8.relay_passes.broadcast_products import BroadcastProducts
from tvm_qfp8.relay_passes.canonicalize import Canonicalize
from tvm_qfp8.relay_passes.choose_layout import ChooseLayout
from tvm_qfp8.relay_passes.compare_booleans import CompareBooleans
from tvm_qfp8.relay_passes.constants_right import ConstantsRight
from tvm_qfp8.relay_passes.drop_taps import DropTaps
from tvm_qfp8.relay_passes.drop_unread import DropUnread
from tvm_qfp8.relay_passes.einsum_products import EinsumProducts
from tvm_qfp8.relay_passes.flatten_columns import FlattenColumns
from tvm_qfp8.relay_passes.fold_batchnorm import FoldBatchnorm
from tvm_qfp8.relay_passes.fold_constants import FoldConstants
from tvm_qfp8.relay_passes.fold_layer_norm import FoldLayerNorm
from tvm_qfp8.relay_passes.fold_lookups import FoldLookups
from tvm_qfp8.relay_passes.fold_padding import FoldPadding
from tvm_qfp8.relay_passes.hoist_scales import HoistScales
from tvm_qfp8.relay_passes.join_branches import JoinBranches
from tvm_qfp8.relay_passes.join_transpositions import JoinTranspositions
from tvm_qfp8.relay_passes.lift_clip import LiftClip
from tvm_qfp8.relay_passes.matmul_broadcasts import MatmulBroadcasts
from tvm_qfp8.relay_passes.normalize_rows import NormalizeRows
from tvm_qfp8.relay_passes.one_hot_lookups import OneHotLookups
from tvm_qfp8.relay_passes.recognize import Recognize
from tvm_qfp8.relay_passes.recognize_group_norm import RecognizeGroupNorm
from tvm_qfp8.relay_passes.recognize_l2 import RecognizeL2
from tvm_qfp8.relay_passes.recognize_norms import RecognizeNorms
from tvm_qfp8.relay_passes.recognize_padding import RecognizePadding
from tvm_qfp8.relay_passes.recognize_softmax import RecognizeSoftmax
from tvm_qfp8.relay_passes.scale_channels import ScaleChannels
from tvm_qfp8.relay_passes.simplify_views import SimplifyViews
from tvm_qfp8.relay_passes.sink_reshapes import SinkReshapes
from tvm_qfp8.relay_passes.split_dense import SplitDense
from tvm_qfp8.relay_passes.trained import ClaimTrained
from tvm_qfp8.relay_passes.volumes_as_frames import VolumesAsFrames


def prepare_passes() -> list:
    """The passes, in order."""
    return [
        # -- BatchNorm becomes arithmetic with constants; what importers compute from constants becomes constant
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        EinsumProducts(),
        MatmulBroadcasts(),
        FoldConstants(),
        # -- what quantization-aware training decided becomes a mark on each layer
        ClaimTrained(),
        # -- what TVM generates no code for
        CompareBooleans(),
        # -- bounds in one form, nothing that does nothing
        LiftClip(),
        Canonicalize(),
        ConstantsRight(),
        BroadcastProducts(),
        FoldPadding(),
        OneHotLookups(),
        # -- nonlinear layers that the file holds as many small operators
        RecognizeNorms(),
        Recognize(),
        RecognizeGroupNorm(),
        NormalizeRows(images=False),
        FoldLayerNorm(),
        RecognizeSoftmax(),
        RecognizeL2(),
        RecognizePadding(),
        FoldLookups(),
        # -- 3-D convolutions become 2-D ones
        VolumesAsFrames(),
        # -- channels last, without transpositions that cancel
        ChooseLayout(),
        # -- windows that reach into padding only
        DropTaps(),
        NormalizeRows(),
        FlattenColumns(),
        # -- reshapes that files hold around dense layers, out of the way of fusion
        JoinTranspositions(),
        SinkReshapes(),
        SimplifyViews(),
        # -- what is taken apart behind a dense layer becomes layers
        SplitDense(),
        SimplifyViews(),
        # -- what no later operator reads
        DropUnread(),
        # -- scales and shifts of channels, BatchNorm above all, into the linear layer before them
        HoistScales(),
        FoldBatchnorm(),
        JoinTranspositions(),
        JoinBranches(),
        ScaleChannels(),
        FoldConstants(),
        relax.transform.CanonicalizeBindings(),
        relax.transform.DeadCodeElimination(),
    ]


def prepare(mod: tvm.IRModule) -> tvm.IRModule:
    """The canonical form of an imported program."""
    return tvm.transform.Sequential(prepare_passes())(mod)
