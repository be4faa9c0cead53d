"""The ways in which PyTorch runs a model: eager, channels-last, compiled. Each gives a function of nothing to time.

On a GPU that function only sends its work, and `Peer.wait` waits for it.
"""

import copy
import gc
import sys

import torch
import torch.nn.functional as F

from qbheat_jax.errors import RUN_FAILED, UserError


def check(device):
    """Raise UserError where PyTorch cannot use the device that jax computes on."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("jax computes on a GPU and this PyTorch has none: set JAX_PLATFORMS=cpu", exit_code=RUN_FAILED)


class Peer:
    """One model run in one way, its images on the device that jax computes on.

    `way`: one of options.PEERS; compiled models are channels-last too. `threads`: of the CPU. `dtype`: as of the
    encoder: parameters are float32, and with bfloat16 PyTorch's autocast chooses what is computed in it.
    """

    def __init__(self, model, way, threads, dtype, device):
        torch.set_num_threads(threads)
        if device == "cuda":  # as jax multiplies by default there
            torch.set_float32_matmul_precision("high")
        self._device, self._dtype = device, getattr(torch, dtype)
        self._layout = torch.contiguous_format if way == "eager" else torch.channels_last
        self.model = copy.deepcopy(model).to(device, memory_format=self._layout)
        self.way, self._compiled = way, way == "compile"

    def forward(self, images):
        """Return a function that returns the features [B, h, w, C] of images float32 [B, H, W, 3]."""
        self.model.eval()
        maps = torch.compile(self.model.maps) if self._compiled else self.model.maps
        placed = self._place(images)

        def call():
            with torch.inference_mode(), self._autocast():
                return maps(placed).permute(0, 2, 3, 1)

        return call

    def step(self, batch, pixels, rate, decay, betas):
        """Batch of numpy arrays -> function that takes one step of AdamW on the cross-entropy and returns the loss.

        The batch's images stay uint8 and are normalised in the step, by `pixels` as of images.PIXELS, as they are here.
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
        """[B, H, W, 3] -> [B, 3, H, W] on the device, laid out as the model's weights are."""
        placed = torch.from_numpy(images).permute(0, 3, 1, 2).to(self._device)
        return placed.contiguous(memory_format=self._layout)

    def _autocast(self):
        return torch.autocast(self._device, torch.bfloat16, enabled=self._dtype is torch.bfloat16)

    def wait(self, _):
        """Return once all work sent to the device is done, whatever result is given."""
        if self._device == "cuda":
            torch.cuda.synchronize()


def free():
    """Give back what compiled models and freed tensors still hold of the GPU's memory."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
