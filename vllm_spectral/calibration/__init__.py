"""Calibration: from what a model's attention sees to a profile."""
