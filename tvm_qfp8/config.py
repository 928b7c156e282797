"""Options of ``compile``; every default is meant to need no thought."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """How a model is lowered.

    Attributes
    ----------
    max_error : float
        Bound on the error of every interpolated nonlinear layer (DESIGN: absolute up to 1, relative above).
    skip : tuple of str
        Names or shell patterns (``fnmatch``) of linear layers to leave in float32.
    activations : str
        ``auto``: the layout of least error per tensor; or one layout's name for all; or ``float32``, to quantize
        weights only. Without calibration data these are what dense layers, most convolutions and attention read, with a
        scale for each row or sample that is found at run time: ``auto`` is E3M4 or E2M5 for what the network computes
        itself, or a layout without a sign after a ReLU, of one scale after ReLU6, a sigmoid or gates; the module's own
        inputs, whose columns may have any units, stay float32, but for images of three colours; E1M6 is the fastest on
        CPUs with int8 dot products, and less accurate.
    method : str
        How the scale of an activation is found: ``mse`` (least squared error), ``max``, ``percentile`` (99.99 %) or
        ``entropy`` (least Kullback-Leibler divergence). All stream over the samples in bounded memory.
    byte_loss_db : float or None
        How many decibels of the outputs' signal to error faster layouts than the best may cost, estimated: linear ones,
        whose bytes are multiplied twice as fast, those of two exponent bits instead of three, and weights in bytes. 0:
        none, 6: the fastest module that is of use. None: 1.5, or 3 where each decibel saves 6 % of the multiply-adds'
        estimated time, and another 1.5 for weights in bytes where these save 15 % of a call's; but 0 for outputs whose
        estimated signal to error is below 12 dB, and as if they had 45 dB for those that have more.
        Unless it is none, another 0.3 may go for sums of large images that are kept as codes.
    recalibrate_batchnorm : bool
        Estimate BatchNorm's statistics anew on the calibration data before folding, layer by layer where that serves
        (see ``recalibrate_batchnorm``); for networks whose weights were rounded, pruned or changed without training.
    check_finite : bool
        ``run`` refuses inputs with NaN or infinity, naming input and index, where any layer is quantized.
    winograd : bool
        3x3 convolutions may transform their filters at the first call, for as little as a third of the time a
        convolution takes. The file is as small as without, but each 8-bit weight of such a layer takes 3.6 or 8 bytes
        more of memory; the report says how many in all.
    threads : int or None
        Threads that kernels are written for; None takes the target's cores.
    """

    max_error: float = 1e-3
    skip: tuple[str, ...] = ()
    activations: str = "auto"
    method: str = "mse"
    byte_loss_db: float | None = None
    recalibrate_batchnorm: bool = False
    check_finite: bool = True
    winograd: bool = True
    threads: int | None = None
