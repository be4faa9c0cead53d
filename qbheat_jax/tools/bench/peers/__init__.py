"""Plain PyTorch implementations of the encoders, with the parameter names of their releases, for comparison only.

Only this file can be imported without torch.
"""

import sys

import numpy as np

from qbheat_jax import pytree
from qbheat_jax.errors import UserError
from qbheat_jax.models.convnext import ConvNeXt
from qbheat_jax.models.hcnet import HcNet
from qbheat_jax.models.mobile_former import MobileFormer
from qbheat_jax.models.mobilenet import VARIANTS
from qbheat_jax.models.resnet import ResNet
from qbheat_jax.models.vheat import VHeat
from qbheat_jax.models.vit import ViT
from qbheat_jax.port import names, tables


def need():
    """Return the module torch. Raise UserError if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"--peers needs PyTorch, which is not installed ({error}): pip install 'qbheat_jax[torch]', or pass --peers none"
        ) from None
    # PyTorch's optimizers and compiler load triton if it is installed. After tensorflow this crashes the process, because
    # each brings its own LLVM. Only compilation for a GPU needs triton, and fails with a clear message without it.
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        sys.modules["triton"] = None
    return torch


def exists(encoder):
    """Return whether an encoder of `models.registry` has a counterpart here."""
    return not isinstance(encoder, ConvNeXt) and getattr(encoder, "mlp", "gelu") == "gelu"


def build(encoder, classes=1000):
    """Return the PyTorch counterpart of an encoder, with a linear classifier.

    Args:
      encoder: Encoder of `models.registry` with its default stride, one that `exists`.
      classes: Number of classes.

    Returns:
      A `torch.nn.Module`. `forward` maps normalised images [B, 3, H, W] to logits [B, classes]; `maps` maps them to the
      encoder's features [B, C, h, w].
    """
    need()
    from qbheat_jax.tools.bench.peers import efficientnet_lite0, hcnet, mobile_former, mobilenet_v2, resnet, vheat, vit

    if isinstance(encoder, MobileFormer):
        return mobile_former.MobileFormer(encoder.variant, classes)
    if isinstance(encoder, ResNet):
        return resnet.ResNet(resnet.Bottleneck if encoder.bottleneck else resnet.Basic, encoder.blocks, classes)
    if isinstance(encoder, ViT):
        return vit.ViT(encoder.width, encoder.heads, encoder.depth, encoder.patch, encoder.grid, classes)
    if isinstance(encoder, VHeat):
        return vheat.VHeat(encoder, classes)
    if isinstance(encoder, HcNet):
        return hcnet.HcNet(encoder, classes)
    lite = encoder.variant == VARIANTS["efficientnet_lite0"]
    return (efficientnet_lite0.EfficientNetLite0 if lite else mobilenet_v2.MobileNetV2)(classes)


def load(model, name, variables):
    """Load the variables of an encoder into its PyTorch counterpart.

    Args:
      model: Module of `build`.
      name: Name of the encoder.
      variables: {"params": {"encoder": ..., "head": ...}, ...} of arrays.

    Returns:
      `model`.

    Raises:
      LookupError: The names do not match.
    """
    torch = need()
    leaves = {path: np.asarray(leaf) for path, leaf in pytree.names(variables)}
    named = tables.of(name).torch_names(leaves)
    state = {named[path]: torch.tensor(names.to_torch(path, leaf).copy()) for path, leaf in leaves.items()}
    wrong = model.load_state_dict(state, strict=False)
    missing = [name for name in wrong.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or wrong.unexpected_keys:
        raise LookupError(f"{name}: its names do not match those in PyTorch: {[*missing, *wrong.unexpected_keys][0]}")
    return model
