"""Measurements, returned as data: each against a baseline of the same run."""
