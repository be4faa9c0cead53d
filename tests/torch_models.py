"""The package's definitions in PyTorch, given random weights and random running averages for the tests."""

import torch
from torch import nn


def randomise(model, seed):
    """Random weights of a size that keeps activations near 1, batch norms with random gains, biases and averages."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, mean, std):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                normal(module.weight, 0, (2 / module.weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    normal(module.bias, 0, 0.1)
            elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                uniform(module.weight, 0.5, 1.2)
                normal(module.bias, 0, 0.2)
                if isinstance(module, nn.BatchNorm2d):
                    normal(module.running_mean, 0, 0.3)
                    uniform(module.running_var, 0.5, 1.5)
        for name in ("cls_token", "pos_embed"):
            if hasattr(model, name):
                normal(getattr(model, name), 0, 0.5)
    return model.eval()
