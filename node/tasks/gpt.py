"""A small byte-level GPT for the `text` task: pre-norm transformer decoder, learned positions, GELU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import fedpara


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and a residual connection. (B, T, C) -> (B, T, C).

    `gamma`: see `fedpara`; None: plain layers."""

    def __init__(self, width: int, heads: int, gamma: float | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = fedpara.linear(width, 3 * width, gamma)
        self.proj = fedpara.linear(width, width, gamma)
        self.norm2 = nn.LayerNorm(width)
        self.up = fedpara.linear(width, 4 * width, gamma)
        self.down = fedpara.linear(4 * width, width, gamma)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C)."""
        b, t, c = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads)
        q_BHTD, k_BHTD, v_BHTD = qkv.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        mlp: Tensor = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + mlp


class ByteGPT(nn.Module):
    """Next-byte logits: (B, T) int64 in 0..255 -> (B, T, 256) float32; T at most `context`."""

    def __init__(self, layers: int, width: int, heads: int, context: int, gamma: float | None = None) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, gamma) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        positions_T = torch.arange(bytes_BT.shape[1], device=bytes_BT.device)
        x = self.token(bytes_BT) + self.position(positions_T)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
