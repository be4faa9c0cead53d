"""Arithmetic that knows of no model: quarters, the heat operator, resampling, colour, boxes."""
