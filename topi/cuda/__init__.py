"""Kernels for NVIDIA GPUs, sm_80 and newer.

A QFP8 code *is* a float16 number times a power of two: shifting its exponent and mantissa to where float16 keeps them
gives ``G * 2**-k`` with one ``k`` for all codes of a layout, the smallest ones as float16's subnormal numbers
(``device.py``). So decoding is a shift and a mask, and tensor cores take the result as it is.

Sums are exact: the reduction is cut into blocks in which no sum can leave float32's 24 bits, given the actual weights
(``exact_sums.py``), and blocks are added in int32. The results are the CPU kernels' bits.
"""
