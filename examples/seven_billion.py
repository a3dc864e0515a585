"""A decoder of Llama-2-7B's shape in plain torch with 6.7 billion parameters.

It is made for `cutlayer plan`, which builds it on torch's meta device, where it takes no memory:

    cutlayer plan --model examples/seven_billion.py:model --cut blocks.1 --input 2048 --input-type int64 \\
        --precision bfloat16 --clients 1000000 --samples-per-client 100 --batch 1 \\
        --client-device jetson-orin-nano --link lte --server-device h100

The plan uses the server's rate in bfloat16, 989 TFLOP/s. An epoch of SGLR takes 94.6 days, and the server computes for
99.95% of them. For the clients' device, no rate in bfloat16 is known, so its float32 rate is used, which a note states.

Shape legend: R rows of the batch, n tokens of a row, d width, h heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HIDDEN, HEADS, BLOCKS, VOCABULARY = 4096, 11008, 32, 32, 32000


class Attention(nn.Module):
    """Causal self-attention with rotary positions: [R, n, d] -> [R, n, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[R, n, d] -> [R, n, d]."""
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # [R, h, n, d / h]
        mixed = functional.scaled_dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a gated feed-forward layer (SwiGLU), each added to its input: [R, n, d] -> [R, n, d]."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=1e-5)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[R, n, d] -> [R, n, d]."""
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Token ids [R, n] -> scores of the next token [R, vocabulary]."""

    def __init__(self, width: int, hidden: int, heads: int, blocks: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(blocks))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[R, n] -> [R, vocabulary]."""
        x = self.embedding(tokens)  # [R, n, d]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -1]))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: rotates pairs of numbers of [R, h, n, d / h] by angles that grow with the position."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)  # [d / 2h]
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * rates  # [n, d / 2h]
    sine, cosine = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def model() -> nn.Module:
    """The 7B shape: 6,738,415,616 parameters."""
    return Decoder(WIDTH, HIDDEN, HEADS, BLOCKS, VOCABULARY)
