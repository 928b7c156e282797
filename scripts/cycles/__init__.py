"""Arm kernels judged without an Arm machine: the instructions they execute, and the cycles a CPU's model gives them."""
