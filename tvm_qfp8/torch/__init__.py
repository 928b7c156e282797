"""Torch models: activation layers whose forward and backward run compiled tables."""

from tvm_qfp8.errors import MissingPackageError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise MissingPackageError(
        f"tvm_qfp8.torch needs torch, which cannot be imported ({error}); pip install 'tvm-qfp8[torch]'"
    ) from error

from tvm_qfp8.calibration.recalibration import Recalibration
from tvm_qfp8.torch import functional
from tvm_qfp8.torch.batchnorm import recalibrate_batchnorm
from tvm_qfp8.torch.modules import (
    CELU,
    ELU,
    GELU,
    SELU,
    Hardsigmoid,
    Hardswish,
    Mish,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from tvm_qfp8.torch.prepare import QATConfig, prepare_qat
from tvm_qfp8.torch.replace import replace_activations

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "Hardsigmoid",
    "Hardswish",
    "Mish",
    "QATConfig",
    "Recalibration",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Tanh",
    "functional",
    "prepare_qat",
    "recalibrate_batchnorm",
    "replace_activations",
]
