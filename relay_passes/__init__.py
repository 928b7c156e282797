"""Passes over Relax and TIR modules, from the canonical float program to scheduled kernels."""
