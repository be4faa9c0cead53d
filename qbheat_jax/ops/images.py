"""Normalise uint8 images on the device, and cut images into patches and back."""

import dataclasses

import jax.numpy as jnp

# ImageNet's channel means and standard deviations on the 0..1 scale, the field's common default.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """An encoder's pixel normalisation: `mean` and `std` of each channel, in 0..1."""

    mean: tuple = MEAN
    std: tuple = STD

    def normalise(self, images):
        """Subtract the mean and divide by the standard deviation per channel; uint8 [..., 3] -> float32 [..., 3]."""
        return (images.astype(jnp.float32) / 255.0 - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def unnormalise(self, pixels):
        """Invert `normalise`, with rounding and clipping; float [..., 3] -> uint8 [..., 3]."""
        scaled = (pixels * jnp.asarray(self.std) + jnp.asarray(self.mean)) * 255.0
        return jnp.clip(jnp.round(scaled), 0, 255).astype(jnp.uint8)


# Conventions of published weights: torchvision's, MAE's and DINO's; timm's augreg ViTs'; EfficientNet-Lite's (x - 127) / 128;
# CLIP's.
PIXELS = {
    "imagenet": Pixels(),
    "half": Pixels((0.5,) * 3, (0.5,) * 3),
    "lite": Pixels((127 / 255,) * 3, (128 / 255,) * 3),
    "clip": Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def to_patches(images, size):
    """Cut images into patches; [B, H, W, C] -> [B, H / size, W / size, size * size * C], by row, column, channel."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // size, width // size, size * size * channels)


def from_patches(patches, size):
    """Invert `to_patches`; [B, h, w, size * size * C] -> [B, h * size, w * size, C]."""
    batch, height, width, _ = patches.shape
    x = patches.reshape(batch, height, width, size, size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * size, width * size, -1)


def psnr(predicted, images):
    """Return the peak signal-to-noise ratio in dB of images with values in 0..1; two of [B, H, W, C] -> float32 [B].

    It is -10 log10 of the mean squared error, and at most 100.

    >>> psnr(jnp.full((1, 2, 2, 3), 0.6), jnp.full((1, 2, 2, 3), 0.5)).round(3).tolist()
    [20.0]
    """
    return -10.0 * jnp.log10(jnp.maximum(jnp.square(predicted - images).mean((1, 2, 3)), 1e-10))
