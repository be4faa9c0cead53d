"""Model-independent arithmetic: quarters, the heat operator, resampling, colour, boxes."""
