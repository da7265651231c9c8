"""Measurements, gated on correctness; never run as tests."""
