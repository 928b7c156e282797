"""What calibration decides: one record for each linear operator, read by the passes that quantize."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tvm_qfp8.calibration.fake_quantize import fake_quantize, fake_quantize_rows
from tvm_qfp8.distribution import Distribution
from tvm_qfp8.quantize import QTensor
from tvm_qfp8.topi.rotation import restored, rotated


@dataclass(frozen=True)
class ActivationQuantization:
    """How an activation is rounded before the linear layers that read it.

    Attributes
    ----------
    layout : str
    scale : float or None
        float32 scale of the whole tensor; None: every row (token) or sample gets its own when it is there, its
        largest magnitude on the largest grid value.
    factors : float32 array ``(channels,)`` or None
        What channels are multiplied by before they are rounded; the weights that meet them are divided by it. With a
        scale for each row outliers move from activations to weights (Xiao et al., "SmoothQuant", ICML 2023). With one
        scale they are powers of two, and make a scale for each channel; all that reads the tensor is depthwise.
    rotation : int
        The order of the matrix by which rows are rotated after that (``topi/rotation.py``), and the weights that meet
        them against it; 1: they are not. Only with a scale for each row.
    by_samples : bool
        Of scales found at run time: one for each sample of the batch instead of each row.
    """

    layout: str
    scale: float | None
    factors: np.ndarray | None = None
    by_samples: bool = False
    rotation: int = 1

    @property
    def by_rows(self) -> bool:
        """Whether every row has its own scale."""
        return self.scale is None and not self.by_samples

    @property
    def has_one_scale(self) -> bool:
        """Whether the scale is the whole tensor's, and known."""
        return self.scale is not None and self.factors is None

    @property
    def described(self) -> str:
        """The layout, and what has scales of its own."""
        if self.scale is None:
            rotated = ", rotated" if self.rotation > 1 else ""
            return f"{self.layout} by {'sample' if self.by_samples else 'row'}{rotated}"
        return self.layout if self.factors is None else f"{self.layout} by channel"

    @property
    def changes_weights(self) -> bool:
        """Whether weights that meet it are others than those that meet the exact activation."""
        return self.factors is not None or self.rotation > 1

    def prepared(self, x: np.ndarray) -> np.ndarray:
        """``x (..., channels)`` as it is rounded: by factors, and rotated."""
        x = x if self.factors is None else x * self.factors
        return x if self.rotation == 1 else rotated(x, self.rotation)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """What a layer reads for ``x (..., channels)``: values on the grid, prepared."""
        return self.on_grid(self.prepared(x))

    def on_grid(self, prepared: np.ndarray) -> np.ndarray:
        """What is prepared, rounded."""
        if self.scale is None:
            rows = prepared.reshape(len(prepared), -1) if self.by_samples else prepared
            return fake_quantize_rows(rows, self.layout).reshape(prepared.shape)
        return fake_quantize(prepared, self.layout, self.scale)

    def met_by(self, weight: np.ndarray, axis: int) -> np.ndarray:
        """A weight that meets this activation as it is prepared, float32; its input channels are on ``axis``."""
        if self.factors is not None:
            weight = weight / self.factors.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        if self.rotation > 1:
            weight = np.moveaxis(restored(np.moveaxis(weight, axis, -1), self.rotation), -1, axis)
        return weight


@dataclass(frozen=True)
class LinearQuantization:
    """How one linear operator (convolution, transposed convolution, matmul) is quantized.

    Attributes
    ----------
    weight : QTensor
        Codes in the operator's own weight shape, one scale per output channel; divided by the activation's factors.
    activation : ActivationQuantization
        Of the operator's input tensor; None when only the weight is quantized.
    bias_correction : float32 array ``(out_channels,)``
        Mean of (quantized - float32) output before the bias; to be taken off the bias. None without data.
    sqnr_db : float
        Signal to error of the operator's corrected output against float32, in dB, with every
        earlier layer quantized. None without data.
    note : str
        Why something differs from the usual, for the report; else empty.
    received : Distribution
        How the calibration data's activations lie on their grid, for the report. None without data.
    """

    weight: QTensor
    activation: ActivationQuantization | None = None
    bias_correction: np.ndarray | None = None
    sqnr_db: float | None = None
    note: str = ""
    received: Distribution | None = None


@dataclass
class QuantizationPlan:
    """Decisions for a whole module, keyed by the name of the variable that a linear call is bound to.

    Attributes
    ----------
    linear : dict of str to LinearQuantization
        In the order of the module's bindings.
    products : dict of str to (ActivationQuantization, ActivationQuantization)
        Matmuls of two activations (attention), with what becomes of either; the right one has no scales of rows.
    skipped : dict of str to str
        Linear calls and products that stay float32, with the reason.
    codes : dict of str to ActivationQuantization
        Tensors that everything reads as codes of one scale: sums of a residual network, which would be finer otherwise.
    embeddings : dict of str to QTensor
        Tables that a ``take`` reads rows of, one scale per row.
    samples : int
        Number of calibration samples seen; with 0 there are no scales of whole tensors and no corrections.
    trained : bool
        All decisions come from quantization-aware training.
    """

    linear: dict[str, LinearQuantization] = field(default_factory=dict)
    products: dict[str, tuple[ActivationQuantization, ActivationQuantization]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    codes: dict[str, ActivationQuantization] = field(default_factory=dict)
    embeddings: dict[str, QTensor] = field(default_factory=dict)
    samples: int = 0
    trained: bool = False
