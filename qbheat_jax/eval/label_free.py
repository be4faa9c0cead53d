"""A method's own loss and figures over a split, without augmentation. They need no labels."""

import numpy as np

from qbheat_jax.eval.evaluate import Metric
from qbheat_jax.train import state


class LabelFree(Metric):
    """The mean of a method's figures over the examples that count; batches weigh by their examples."""

    name, headline = "the loss", "loss"
    inputs = ("image", "quarter", "label", "mask")

    def __init__(self, objective):
        """Measure `objective`, of `methods.build`."""
        self._objective = objective

    def sums(self, variables, batch):
        """Return {"n": examples that count, "loss" and other figures: float32 means over them}."""
        figures = state.evaluate(self._objective, variables, batch)
        return {"n": figures.pop("count"), **figures}

    def add(self, total, sums):
        """Add figures times examples, in float64. A batch without examples adds nothing, even NaN."""
        n = sums["n"]
        weighted = {name: value if name == "n" else np.float64(value) * n if n else 0.0 for name, value in sums.items()}
        return super().add(total, weighted)

    def figures(self, total):
        return {name: float(value / total["n"]) for name, value in total.items() if name != "n"}, {}
