"""Run a PyTorch model in one of three ways: eager, channels-last or compiled.

Each way gives a function without arguments to time. On a GPU it only sends its work, and `Peer.wait` waits for it.
"""

import copy
import gc
import sys

import torch
import torch.nn.functional as F

from qbheat_jax.errors import RUN_FAILED, UserError


def check(device):
    """Raise UserError if PyTorch cannot use jax's device. `device` is "cpu" or "cuda"."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "jax uses a GPU, but this PyTorch finds none: set JAX_PLATFORMS=cpu, or pass --peers none",
            exit_code=RUN_FAILED,
        )


class Peer:
    """A PyTorch model that runs in one way on jax's device.

    Args:
      model: Module of `peers.build`; the peer copies it.
      way: One of `options.PEERS`. "compile" is also channels-last.
      threads: Number of CPU threads.
      dtype: "float32" or "bfloat16". Parameters are float32; with bfloat16, PyTorch's autocast chooses the operations.
      device: "cpu" or "cuda".
    """

    def __init__(self, model, way, threads, dtype, device):
        torch.set_num_threads(threads)
        if device == "cuda":  # matches jax's default matmul precision on GPUs
            torch.set_float32_matmul_precision("high")
        self._device, self._dtype = device, getattr(torch, dtype)
        self._layout = torch.contiguous_format if way == "eager" else torch.channels_last
        self.model = copy.deepcopy(model).to(device, memory_format=self._layout)
        self.way, self._compiled = way, way == "compile"

    def forward(self, images):
        """Return a function that computes the features [B, h, w, C] of `images`, a float32 array [B, H, W, 3]."""
        self.model.eval()
        maps = torch.compile(self.model.maps) if self._compiled else self.model.maps
        placed = self._place(images)

        def call():
            with torch.inference_mode(), self._autocast():
                return maps(placed).permute(0, 2, 3, 1)

        return call

    def step(self, batch, pixels, rate, decay, betas):
        """Return a function that takes one AdamW step on the cross-entropy and returns the loss.

        Args:
          batch: {"image": uint8 [B, H, W, 3], "label": int32 [B]} of numpy arrays. Images are normalised in the step, as in
            this package.
          pixels: Entry of `images.PIXELS`.
          rate: Learning rate.
          decay: Weight decay of parameters with more than one dimension.
          betas: (b1, b2) of AdamW.
        """
        self.model.train()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
        images, labels = self._place(batch["image"]), torch.from_numpy(batch["label"]).long().to(self._device)
        mean, std = (torch.tensor(x, device=self._device).view(1, 3, 1, 1) for x in (pixels.mean, pixels.std))

        def objective(images, labels):
            return F.cross_entropy(self.model((images.float() / 255.0 - mean) / std), labels)

        compute = torch.compile(objective) if self._compiled else objective

        def call():
            optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                loss = compute(images, labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return call

    def _place(self, images):
        """Return [B, H, W, 3] images as [B, 3, H, W] on the device, in the memory format of the weights."""
        placed = torch.from_numpy(images).permute(0, 3, 1, 2).to(self._device)
        return placed.contiguous(memory_format=self._layout)

    def _autocast(self):
        return torch.autocast(self._device, torch.bfloat16, enabled=self._dtype is torch.bfloat16)

    def wait(self, _):
        """Wait for all work on the device. The argument is ignored."""
        if self._device == "cuda":
            torch.cuda.synchronize()


def free():
    """Free the GPU memory that compiled models and deleted tensors still hold."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
