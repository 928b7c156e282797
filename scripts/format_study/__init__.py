"""Comparison of 8-bit number formats on real models, each with the same calibration effort."""
