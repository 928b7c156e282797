"""Operator definitions, micro-kernels per instruction set and their schedules."""
