"""The encoders once more in PyTorch, plainly, by the names of their releases: what one would use without this package.

Written to compare with: nothing else here computes with them. Only this file may be imported without torch.
"""

import sys

import numpy as np

from qbheat_jax import pytree
from qbheat_jax.errors import UserError
from qbheat_jax.models.mobile_former import MobileFormer
from qbheat_jax.models.mobilenet import VARIANTS
from qbheat_jax.models.resnet import ResNet
from qbheat_jax.models.vit import ViT
from qbheat_jax.port import names, tables


def need():
    """The module torch. UserError where it is missing."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"the peers are in PyTorch, which is missing ({error}): pip install 'qbheat_jax[torch]', or pass --peers none"
        ) from None
    # PyTorch's optimizers and compiler load triton where it is installed, and that crashes the process once tensorflow is
    # loaded (each brings an LLVM). Only compiling for a GPU cannot do without it, and then says so.
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        sys.modules["triton"] = None
    return torch


def build(encoder, classes=1000):
    """The torch module of an encoder of `models.registry` with its own stride, and a linear classifier.

    forward: normalised images [B, 3, H, W] -> logits [B, classes]; `maps`: -> the encoder's features [B, C, h, w].
    """
    need()
    from qbheat_jax.tools.bench.peers import efficientnet_lite0, mobile_former, mobilenet_v2, resnet, vit

    if isinstance(encoder, MobileFormer):
        return mobile_former.MobileFormer(encoder.variant, classes)
    if isinstance(encoder, ResNet):
        return resnet.ResNet(resnet.Bottleneck if encoder.bottleneck else resnet.Basic, encoder.blocks, classes)
    if isinstance(encoder, ViT):
        return vit.ViT(encoder.width, encoder.heads, encoder.depth, encoder.patch, encoder.grid, classes)
    lite = encoder.variant == VARIANTS["efficientnet_lite0"]
    return (efficientnet_lite0.EfficientNetLite0 if lite else mobilenet_v2.MobileNetV2)(classes)


def load(model, name, variables):
    """Gives a module of `build` the variables {"params": {"encoder", "head"}, ...} of encoder `name`; all must fit."""
    torch = need()
    leaves = {path: np.asarray(leaf) for path, leaf in pytree.names(variables)}
    named = tables.of(name).torch_names(leaves)
    state = {named[path]: torch.tensor(names.to_torch(path, leaf).copy()) for path, leaf in leaves.items()}
    wrong = model.load_state_dict(state, strict=False)
    missing = [name for name in wrong.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or wrong.unexpected_keys:
        raise LookupError(f"{name} in PyTorch has other names: {[*missing, *wrong.unexpected_keys][0]}")
    return model
