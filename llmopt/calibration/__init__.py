"""Calibration: token windows from text, and the walk that streams them through a module layer by layer."""
