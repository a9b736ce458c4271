"""Weights as 8-bit or 4-bit integers: rounding, calibration, whole folders, and what it costs."""
