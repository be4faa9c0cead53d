"""ViT in PyTorch, with the parameter names of timm and PyTorch's fused attention."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, width))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)


class ViT(nn.Module):
    """The network. `forward` returns logits [B, classes], `maps` the last feature map [B, C, h, w].

    A smaller image uses the top left of the position table.

    Args:
      width: Width of the tokens.
      heads: Attention heads.
      depth: Number of blocks.
      patch: Patch size in pixels.
      grid: Cells per side of the position table.
      classes: Number of classes; 0 for no classifier.
    """

    def __init__(self, width, heads, depth=12, patch=16, grid=14, classes=1000):
        super().__init__()
        self.grid, self.patch = grid, patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patch_embed = PatchEmbed(width, patch)
        self.blocks = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

    def tokens(self, x):
        x = self.patch_embed.proj(x)
        rows, columns = x.shape[2:]
        table = self.pos_embed[:, 1:].reshape(1, self.grid, self.grid, -1)[:, :rows, :columns]
        x = x.flatten(2).transpose(1, 2) + table.flatten(1, 2)
        token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.norm(self.blocks(torch.cat([token, x], 1)))

    def maps(self, x):
        rows, columns = (n // self.patch for n in x.shape[2:])
        return self.tokens(x)[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))

    def forward(self, x):
        return self.head(self.tokens(x)[:, 0])
