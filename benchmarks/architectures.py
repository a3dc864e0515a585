"""Common architectures with small sizes and random weights, which `cuts.py` cuts."""

# ruff: noqa: E501
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, rnn

ROWS = 4
CLASSES = 5


@dataclass(frozen=True)
class Architecture:
    """A model, an example batch, and the module after which it is cut."""

    name: str
    at: str | tuple[str, str]
    make: Callable[[], tuple[nn.Module, Any]]
    untie: bool = False


def architectures() -> Iterator[Architecture]:
    """All architectures."""
    yield from (Architecture(name, at, lambda of=of, x=x: (of(), x())) for name, at, of, x in _PLAIN)
    yield from hugging_face()


# Examples


def vectors() -> Tensor:
    """[R, 8]"""
    return torch.randn(ROWS, 8)


def series() -> Tensor:
    """[R, 12, 6]"""
    return torch.randn(ROWS, 12, 6)


def signals() -> Tensor:
    """[R, 3, 32]"""
    return torch.randn(ROWS, 3, 32)


def pictures() -> Tensor:
    """[R, 3, 16, 16]"""
    return torch.randn(ROWS, 3, 16, 16)


def volumes() -> Tensor:
    """[R, 1, 8, 8, 8]"""
    return torch.randn(ROWS, 1, 8, 8, 8)


def tokens() -> Tensor:
    """[R, 12], padded with 0."""
    ids = torch.randint(1, 32, (ROWS, 12))
    ids[1, 9:] = 0
    return ids


def masked_tokens() -> dict[str, Tensor]:
    """Token ids and their mask, as from a tokenizer."""
    ids = tokens()
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def graphs() -> tuple[Tensor, Tensor]:
    """Nodes [R, 10, 6] and dense adjacency [R, 10, 10]."""
    return torch.randn(ROWS, 10, 6), (torch.rand(ROWS, 10, 10) < 0.4).float()


def packed() -> dict[str, Tensor]:
    """Series [R, 12, 6] and their lengths."""
    return {"x": torch.randn(ROWS, 12, 6), "lengths": torch.tensor([12, 9, 7, 3])}


# Blocks


class Residual(nn.Module):
    """x + inner(x)"""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.inner(x)


class DenseBlock(nn.Module):
    """Each layer receives the outputs of all earlier ones."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels + i * growth),
                nn.ReLU(),
                nn.Conv2d(channels + i * growth, growth, 3, padding=1, bias=False),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """All outputs, concatenated."""
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


class Inception(nn.Module):
    """Parallel branches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, 4, 1)
        self.b = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.c = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(channels, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of the branches, concatenated."""
        return torch.cat([self.a(x), self.b(x), self.c(x)], 1)


class SqueezeExcite(nn.Module):
    """Scales channels by features of the whole picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(), nn.Linear(2, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """The scaled picture."""
        return x * self.gate(x.mean((2, 3)))[:, :, None, None]


class Unet(nn.Module):
    """A U-Net. If it is cut in the middle, the skip connections cross, too."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.up2 = nn.Sequential(nn.Conv2d(16, 4, 3, padding=1), nn.ReLU())
        self.up1 = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[R, 2, h, w]"""
        a = self.down1(x)
        b = self.down2(functional.max_pool2d(a, 2))
        c = functional.interpolate(self.middle(functional.max_pool2d(b, 2)), size=b.shape[2:])
        d = functional.interpolate(self.up2(torch.cat([b, c], 1)), size=a.shape[2:])
        return self.head(self.up1(torch.cat([a, d], 1)))


class Recurrent(nn.Module):
    """Recurrent layers, followed by a linear layer on the last step."""

    def __init__(
        self, kind: type[nn.RNNBase], bidirectional: bool = False, layers: int = 1, dropout: float = 0
    ) -> None:
        super().__init__()
        self.encoder = kind(6, 8, num_layers=layers, batch_first=True, bidirectional=bidirectional, dropout=dropout)
        self.head = nn.Linear(16 if bidirectional else 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[R, CLASSES]"""
        out, _ = self.encoder(x)
        return self.head(torch.tanh(out[:, -1]))


class TwoRecurrent(nn.Module):
    """An encoder whose last state is the first state of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(6, 8, batch_first=True)
        self.decoder = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[R, CLASSES]"""
        out, state = self.encoder(x)
        return self.head(self.decoder(out.flip(1), state)[0][:, -1])


class Cells(nn.Module):
    """A recurrent cell in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.cell = nn.GRUCell(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[R, CLASSES]"""
        h = x.new_zeros(len(x), 8)
        for step in self.inner(x).unbind(1):
            h = self.cell(step, h)
        return self.head(h)


class Packed(nn.Module):
    """Series of different lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.encoder = nn.GRU(8, 8, batch_first=True)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """[R, CLASSES]"""
        run = rnn.pack_padded_sequence(self.inner(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, last = self.encoder(run)
        return self.head(torch.relu(self.middle(last[0])))


class GraphLayer(nn.Module):
    """The weighted mean of neighbours."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(inner, outer), nn.Linear(inner, outer)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """[R, n, outer]"""
        degree = edges.sum(-1, keepdim=True).clamp(min=1)
        return torch.relu(self.own(nodes) + self.others(edges @ nodes / degree))


class Graph(nn.Module):
    """A graph per row. Later layers use the adjacency, which is an input, so the first part sends a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphLayer(6, 8), GraphLayer(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, nodes: Tensor, mask_edges: Tensor) -> Tensor:
        """[R, CLASSES]"""
        return self.head(self.second(self.first(nodes, mask_edges), mask_edges).mean(1))


class Experts(nn.Module):
    """A mixture of experts. All experts run, and a gate weights their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """[R, 8]"""
        weights = self.gate(x).softmax(-1)
        return sum(weights[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class TopExperts(nn.Module):
    """A mixture of experts. Each expert runs only for the rows that are sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """[R, 8]"""
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = torch.where(chosen == i)[0]
            y = y.index_add(0, mine, weight[mine, None] * expert(x[mine]))
        return y


class Attention(nn.Module):
    """Self-attention and a feed-forward layer in plain torch."""

    def __init__(self, width: int, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.causal, self.dropout = causal, dropout

    def forward(self, x: Tensor) -> Tensor:
        """[R, t, width]"""
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        dropout = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))


class Decoder(nn.Module):
    """A small GPT. With `tied`, the output layer has the input's weights."""

    def __init__(self, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(32, 8), nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(Attention(8, True, dropout) for _ in range(2))
        self.head = nn.Linear(8, 32, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """[R, t, 32]"""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Rotary(nn.Module):
    """Rotations that depend only on the position."""

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, [1, t, 4]"""
        angle = torch.arange(length)[:, None] * 10.0 ** -torch.arange(4)
        return angle.cos()[None], angle.sin()[None]


class RotaryLayer(nn.Module):
    """A layer that uses the rotations."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, h: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """[R, t, 8]"""
        cos, sin = turns
        p, q = self.inner(h).chunk(2, -1)
        return h + torch.cat([p * cos - q * sin, p * sin + q * cos], -1)


class RotaryDecoder(nn.Module):
    """Positions are computed once and used by every layer. A branch prevents tracing by torch.fx."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rotary = nn.Embedding(32, 8), Rotary()
        self.first, self.second, self.head = RotaryLayer(), RotaryLayer(), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """[R, CLASSES]"""
        h, turns = self.embed(ids), self.rotary(ids.shape[1])
        if ids.min() < 0:
            return h.mean((1, 2))
        return self.head(self.second(self.first(h, turns), turns).mean(1))


class Encoder(nn.Module):
    """torch's encoder layers with a padding mask made from the ids."""

    def __init__(self, padding: bool, norm_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)
        self.padding = padding

    def forward(self, ids: Tensor) -> Tensor:
        """[R, CLASSES]"""
        mask = ids == 0 if self.padding else None
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=mask)[:, 0])


class Translator(nn.Module):
    """torch's encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        self.head = nn.Linear(8, 32)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """[R, t, 32]"""
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.transformer(self.embed(source), self.embed(target), tgt_mask=mask))


class Perceiver(nn.Module):
    """A few latent vectors attend to many inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, 8))
        self.embed = nn.Linear(6, 8)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = Attention(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[R, CLASSES]"""
        y = self.embed(x)
        latents, _ = self.cross(self.latents.expand(len(x), -1, -1), y, y, need_weights=False)
        return self.head(self.block(latents).mean(1))


class Mixer(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12))
        self.channels = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))

    def forward(self, x: Tensor) -> Tensor:
        """[R, 12, 6]"""
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return x + self.channels(x)


class Variational(nn.Module):
    """An autoencoder that draws random numbers and returns three tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.mean, self.spread, self.decoder = nn.Linear(8, 2), nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(copy, mean, logarithm of the variance)"""
        h = self.encoder(x)
        mean, spread = self.mean(h), self.spread(h)
        return self.decoder(mean + torch.randn_like(mean) * (0.5 * spread).exp()), mean, spread


class Standardised(nn.Module):
    """Keeps a running mean in a buffer and assigns its new values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        """[R, CLASSES]"""
        h = self.first(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.second(torch.relu(h - self.mean))


class Outputs(nn.Module):
    """Returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.size = nn.Linear(8, 8), nn.Linear(8, CLASSES), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs of two heads, by name."""
        h = torch.relu(self.first(x))
        return {"logits": self.head(h), "size": self.size(h)}


class Wide(nn.Module):
    """Two named inputs, each with its own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.deep = nn.EmbeddingBag(32, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.joint, self.head = nn.Linear(16, 8), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """[R, CLASSES]"""
        joint = self.joint(torch.cat([self.embed(ids), self.deep(numbers)], 1))
        return self.head(torch.relu(joint))


class Siamese(nn.Module):
    """One encoder, used for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[R, CLASSES]"""
        return self.head((self.encoder(a) - self.encoder(b)).abs())


class Causal(nn.Module):
    """A dilated convolution that sees only the past."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv = parametrizations.weight_norm(nn.Conv1d(channels, channels, 3, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        """[R, channels, t]"""
        return x + torch.relu(self.conv(functional.pad(x, (self.pad, 0))))


def _head(features: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, CLASSES)]


def _picture(*layers: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), *_head(4 * channels))


def _mlp(*norms: nn.Module, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), *norms, activation(), nn.Linear(8, 8), activation(), nn.Linear(8, CLASSES))


def _old_weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, CLASSES))


def _spectral() -> nn.Module:
    layers = [parametrizations.spectral_norm(nn.Linear(8, 8)) for _ in range(2)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Linear(8, CLASSES))


def _orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, CLASSES))


def _lazy() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(CLASSES)
    )


def _compiled() -> nn.Module:
    return torch.compile(_mlp())


def _depthwise() -> nn.Module:
    block = [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1)]
    return _picture(nn.Conv2d(3, 8, 1), Residual(*block), nn.Hardswish(), channels=8)


def _shuffle() -> nn.Module:
    return _picture(nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 8, 3, groups=2), nn.PReLU(8), channels=8)


_Plain = tuple[str, str | tuple[str, str], Callable[[], nn.Module], Callable[[], Any]]
_PLAIN: list[_Plain] = [
    ("MLP", "0", _mlp, vectors),
    ("MLP, batch norm", "1", lambda: _mlp(nn.BatchNorm1d(8)), vectors),
    ("MLP, layer norm, dropout", "2", lambda: _mlp(nn.LayerNorm(8), nn.Dropout(0.2)), vectors),
    ("MLP, alpha dropout", "2", lambda: _mlp(nn.SELU(), nn.AlphaDropout(0.1)), vectors),
    ("MLP, PReLU", "1", lambda: _mlp(activation=nn.PReLU), vectors),
    ("MLP, weight norm", "0", lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), *_mlp()), vectors),
    ("MLP, weight norm (old)", "0", _old_weight_norm, vectors),
    ("MLP, spectral norm", "0", _spectral, vectors),
    ("MLP, orthogonal", "0", _orthogonal, vectors),
    ("MLP, compiled", "1", _compiled, vectors),
    ("MLP, residual", "1", lambda: nn.Sequential(nn.Linear(8, 8), Residual(nn.Linear(8, 8)), nn.Linear(8, 5)), vectors),
    ("MLP, bilinear gate", "0", lambda: nn.Sequential(nn.Linear(8, 8), nn.GLU(), nn.Linear(4, 5)), vectors),
    ("MLP, two outputs by name", "first", Outputs, vectors),
    ("MLP, buffer reassigned", "first", Standardised, vectors),
    ("Wide and deep, two inputs by name", "joint", Wide, lambda: {"ids": tokens(), "numbers": vectors()}),
    ("Siamese", "encoder", Siamese, lambda: (vectors(), vectors())),
    ("Autoencoder", "1", lambda: nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8)), vectors),
    ("Variational autoencoder", "encoder", Variational, vectors),
    ("RNN", "encoder", lambda: Recurrent(nn.RNN), series),
    ("LSTM", "encoder", lambda: Recurrent(nn.LSTM), series),
    ("LSTM, two ways", "encoder", lambda: Recurrent(nn.LSTM, True), series),
    ("LSTM, layers with dropout", "encoder", lambda: Recurrent(nn.LSTM, layers=2, dropout=0.2), series),
    ("GRU", "encoder", lambda: Recurrent(nn.GRU), series),
    ("GRU, two ways", "encoder", lambda: Recurrent(nn.GRU, True), series),
    ("LSTM to LSTM", "encoder", TwoRecurrent, series),
    ("GRU cells in a loop", "inner", Cells, series),
    ("GRU, packed sequences", "inner", Packed, packed),
    ("CNN 1d", "0", lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), *_head(120)), signals),
    ("CNN 2d", "1", lambda: _picture(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), channels=4), pictures),
    ("CNN 3d", "1", lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.AvgPool3d(2), *_head(54)), volumes),
    ("CNN, in place", "0", lambda: _picture(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), channels=4), pictures),
    ("CNN, batch norm", "1", lambda: _picture(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), channels=4), pictures),
    ("CNN, group norm", "1", lambda: _picture(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), channels=4), pictures),
    ("CNN, instance norm", "1", lambda: _picture(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), channels=4), pictures),
    ("CNN, local response norm", "1", lambda: _picture(nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(3), nn.ReLU(), channels=4), pictures),
    ("CNN, channel dropout", "1", lambda: _picture(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.2), nn.ReLU(), channels=4), pictures),
    ("CNN, lazy", "1", _lazy, pictures),
    ("CNN, depthwise", "1", _depthwise, pictures),
    ("CNN, channel shuffle", "1", _shuffle, pictures),
    ("CNN, transposed", "0", lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3, 2)), pictures),
    ("CNN, dilated", "0", lambda: _picture(nn.Conv2d(3, 4, 3, dilation=2), nn.ELU(), channels=4), pictures),
    ("ResNet-like", "1", lambda: _picture(nn.Conv2d(3, 4, 3), Residual(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), nn.ReLU(), channels=4), pictures),
    ("DenseNet-like", "1", lambda: _picture(nn.Conv2d(3, 4, 3), DenseBlock(4, 2, 2), DenseBlock(8, 2, 2), channels=12), pictures),
    ("DenseNet-like, inside a block", "1.layers.0", lambda: _picture(nn.Conv2d(3, 4, 3), DenseBlock(4, 2, 3), channels=10), pictures),
    ("Inception-like", "0", lambda: _picture(Inception(3), Inception(12), channels=12), pictures),
    ("Squeeze and excite", "1", lambda: _picture(nn.Conv2d(3, 4, 3), SqueezeExcite(4), SqueezeExcite(4), channels=4), pictures),
    ("U-Net", "down1", Unet, pictures),
    ("U-Net, in the middle", "middle", Unet, pictures),
    ("TCN", "1", lambda: nn.Sequential(nn.Conv1d(3, 4, 1), Causal(4, 1), Causal(4, 2), *_head(128)), signals),
    ("MLP-Mixer", "0", lambda: nn.Sequential(Mixer(), Mixer(), *_head(72)), series),
    ("Graph, dense adjacency", "first", Graph, lambda: dict(zip(("nodes", "mask_edges"), graphs(), strict=True))),
    ("Mixture of experts", "1", lambda: nn.Sequential(nn.Linear(8, 8), Experts(), nn.Linear(8, 5)), vectors),
    ("Mixture of experts, routed", "0", lambda: nn.Sequential(Experts(), TopExperts(), nn.Linear(8, 5)), vectors),
    ("Attention by hand", "blocks.0", Decoder, tokens),
    ("Attention by hand, U-shaped, tied", ("blocks.0", "blocks.1"), lambda: Decoder(tied=True), tokens),
    ("Attention by hand, dropout", "blocks.0", lambda: Decoder(dropout=0.2), tokens),
    ("Rotary decoder by hand", "first", RotaryDecoder, tokens),
    ("Perceiver-like", "cross", Perceiver, series),
    ("nn.TransformerEncoder", "encoder.layers.0", lambda: Encoder(False), tokens),
    ("nn.TransformerEncoder, norm first", "encoder.layers.0", lambda: Encoder(False, True), tokens),
    ("nn.TransformerEncoder, padding mask", "encoder.layers.0", lambda: Encoder(True), tokens),
    ("nn.Transformer", "transformer.encoder", Translator, lambda: (tokens(), tokens())),
]  # fmt: skip


# Hugging Face


_TEXT: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "num_labels": CLASSES,
    "pad_token_id": 0,
}
_IMAGE: dict[str, Any] = {**_TEXT, "image_size": 16, "patch_size": 4, "num_channels": 3}
_ROTARY: dict[str, Any] = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8}
_GPT2: dict[str, Any] = {
    "vocab_size": 32,
    "n_positions": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "pad_token_id": 0,
}
_SEQUENCE: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}

_CLASSIFY = "ForSequenceClassification"
# name, class, cut, options of the configuration, example
_HUGGING_FACE: list[tuple[str, str, str | tuple[str, str], dict[str, Any], Callable[[], Any]]] = [
    ("Llama", "LlamaForCausalLM", "model.layers.0", {**_ROTARY, "tie_word_embeddings": False}, tokens),
    ("Llama, mask", "LlamaForCausalLM", "model.layers.0", {**_ROTARY, "tie_word_embeddings": False}, masked_tokens),
    ("Mistral", "MistralForCausalLM", "model.layers.0", {**_ROTARY, "tie_word_embeddings": False}, masked_tokens),
    ("Mixtral", "MixtralForCausalLM", "model.layers.0", {**_ROTARY, "num_local_experts": 2, "tie_word_embeddings": False}, tokens),
    ("Qwen2", "Qwen2ForCausalLM", "model.layers.0", {**_ROTARY, "tie_word_embeddings": False}, masked_tokens),
    ("Qwen3", "Qwen3ForCausalLM", "model.layers.0", {**_ROTARY, "tie_word_embeddings": False}, masked_tokens),
    ("Gemma", "GemmaForCausalLM", "model.layers.0", {**_ROTARY, "tie_word_embeddings": False}, masked_tokens),
    ("Gemma 2", "Gemma2ForCausalLM", "model.layers.0", {**_ROTARY, "tie_word_embeddings": False}, tokens),
    ("Phi", "PhiForCausalLM", "model.layers.0", {**_TEXT, "tie_word_embeddings": False}, tokens),
    ("GPT-NeoX", "GPTNeoXForCausalLM", "gpt_neox.layers.0", {**_TEXT, "tie_word_embeddings": False}, masked_tokens),
    ("OPT", "OPTForCausalLM", "model.decoder.layers.0", {**_TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16, "tie_word_embeddings": False}, masked_tokens),
    ("GPT-2", "GPT2LMHeadModel", "transformer.h.0", {**_GPT2, "tie_word_embeddings": False}, tokens),
    ("GPT-2, untied", "GPT2LMHeadModel", "transformer.h.0", _GPT2, masked_tokens),
    ("GPT-2, U-shaped, tied", "GPT2LMHeadModel", ("transformer.h.0", "transformer.ln_f"), _GPT2, masked_tokens),
    ("GPT-2, mask", "GPT2LMHeadModel", "transformer.h.0", {**_GPT2, "tie_word_embeddings": False}, masked_tokens),
    ("GPT-2, classifier", "GPT2ForSequenceClassification", "transformer.h.0", {**_GPT2, "num_labels": CLASSES}, tokens),
    ("GPT-J", "GPTJForCausalLM", "transformer.h.0", {**_GPT2, "rotary_dim": 4, "tie_word_embeddings": False}, tokens),
    ("GPT-Neo", "GPTNeoForCausalLM", "transformer.h.0", {**_TEXT, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "tie_word_embeddings": False}, tokens),
    ("BLOOM", "BloomForCausalLM", "transformer.h.0", {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False}, masked_tokens),
    ("Falcon", "FalconForCausalLM", "transformer.h.0", {**_TEXT, "tie_word_embeddings": False}, tokens),
    ("StableLM", "StableLmForCausalLM", "model.layers.0", {**_TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False}, tokens),
    ("BERT", "Bert" + _CLASSIFY, "bert.encoder.layer.0", _TEXT, tokens),
    ("BERT, mask", "Bert" + _CLASSIFY, "bert.encoder.layer.0", _TEXT, masked_tokens),
    ("BERT, masked language model, U-shaped, tied", "BertForMaskedLM", ("bert.encoder.layer.0", "bert.encoder.layer.1"), _TEXT, masked_tokens),
    ("Llama, U-shaped, tied", "LlamaForCausalLM", ("model.layers.0", "model.layers.1"), {**_ROTARY, "tie_word_embeddings": True}, masked_tokens),
    ("BERT, masked language model", "BertForMaskedLM", "bert.encoder.layer.0", {**_TEXT, "tie_word_embeddings": False}, masked_tokens),
    ("RoBERTa", "Roberta" + _CLASSIFY, "roberta.encoder.layer.0", _TEXT, masked_tokens),
    ("DistilBERT", "DistilBert" + _CLASSIFY, "distilbert.transformer.layer.0", {**_TEXT, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}, masked_tokens),
    ("ALBERT", "Albert" + _CLASSIFY, "albert.encoder.embedding_hidden_mapping_in", {**_TEXT, "embedding_size": 8}, masked_tokens),
    ("DeBERTa", "Deberta" + _CLASSIFY, "deberta.encoder.layer.0", {**_TEXT, "pos_att_type": ["c2p", "p2c"], "relative_attention": True}, masked_tokens),
    ("DeBERTa 2", "DebertaV2" + _CLASSIFY, "deberta.encoder.layer.0", {**_TEXT, "pos_att_type": ["c2p", "p2c"], "relative_attention": True}, masked_tokens),
    ("ELECTRA", "Electra" + _CLASSIFY, "electra.encoder.layer.0", {**_TEXT, "embedding_size": 16}, masked_tokens),
    ("MobileBERT", "MobileBert" + _CLASSIFY, "mobilebert.encoder.layer.0", {**_TEXT, "embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1}, masked_tokens),
    ("MPNet", "MPNet" + _CLASSIFY, "mpnet.encoder.layer.0", _TEXT, masked_tokens),
    ("XLNet", "XLNet" + _CLASSIFY, "transformer.layer.0", {"vocab_size": 32, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "num_labels": CLASSES}, tokens),
    ("T5", "T5ForConditionalGeneration", "decoder.block.0", {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}, lambda: {"input_ids": tokens(), "decoder_input_ids": tokens()}),
    ("BART", "BartForConditionalGeneration", "model.decoder.layers.0", {**_SEQUENCE, "eos_token_id": 31}, lambda: {"input_ids": tokens(), "decoder_input_ids": tokens()}),
    ("ViT", "ViTForImageClassification", "vit.layers.0", _IMAGE, pictures),
    ("DeiT", "DeiTForImageClassification", "deit.layers.0", _IMAGE, pictures),
    ("BEiT", "BeitForImageClassification", "beit.layers.0", _IMAGE, pictures),
    ("DINOv2", "Dinov2ForImageClassification", "dinov2.encoder.layer.0", _IMAGE, pictures),
    ("Swin", "SwinForImageClassification", "swin.encoder.layers.0", {"image_size": 16, "num_channels": 3, "num_labels": CLASSES, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 2}, pictures),
    ("Swin 2", "Swinv2ForImageClassification", "swinv2.encoder.layers.0", {"image_size": 16, "num_channels": 3, "num_labels": CLASSES, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 2}, pictures),
    ("ConvNeXt", "ConvNextForImageClassification", "convnext.encoder.stages.0", {"num_channels": 3, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_labels": CLASSES, "patch_size": 2}, pictures),
    ("ResNet", "ResNetForImageClassification", "resnet.encoder.stages.0", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": CLASSES}, pictures),
    ("RegNet", "RegNetForImageClassification", "regnet.encoder.stages.0", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4, "num_labels": CLASSES}, pictures),
    ("MobileNetV1", "MobileNetV1ForImageClassification", "mobilenet_v1.layer.3", {"depth_multiplier": 0.25, "num_labels": CLASSES, "image_size": 32}, lambda: torch.randn(ROWS, 3, 32, 32)),
    ("MobileNetV2", "MobileNetV2ForImageClassification", "mobilenet_v2.layer.2", {"depth_multiplier": 0.25, "num_labels": CLASSES, "image_size": 32}, lambda: torch.randn(ROWS, 3, 32, 32)),
    ("MobileViT", "MobileViTForImageClassification", "mobilevit.encoder.layer.0", {"image_size": 32, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "num_attention_heads": 2, "num_labels": CLASSES, "patch_size": 2}, lambda: torch.randn(ROWS, 3, 64, 64)),
    ("PoolFormer", "PoolFormerForImageClassification", "poolformer.encoder.block.0.0", {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_labels": CLASSES}, lambda: torch.randn(ROWS, 3, 64, 64)),
    ("SegFormer", "SegformerForSemanticSegmentation", "segformer.stages.0.blocks.0", {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1], "decoder_hidden_size": 8, "num_labels": CLASSES}, lambda: torch.randn(ROWS, 3, 32, 32)),
    ("Wav2Vec2", "Wav2Vec2ForSequenceClassification", "wav2vec2.feature_extractor", {**_TEXT, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_prob": 0.0, "layerdrop": 0.0}, lambda: torch.randn(ROWS, 400)),
    ("Wav2Vec2, encoder layer", "Wav2Vec2ForSequenceClassification", "wav2vec2.encoder.layers.0", {**_TEXT, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_prob": 0.0, "layerdrop": 0.0}, lambda: torch.randn(ROWS, 400)),
    ("HuBERT", "HubertForSequenceClassification", "hubert.encoder.layers.0", {**_TEXT, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_prob": 0.0, "layerdrop": 0.0}, lambda: torch.randn(ROWS, 400)),
    ("Whisper", "WhisperForAudioClassification", "encoder.layers.0", {**_SEQUENCE, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "num_labels": CLASSES, "classifier_proj_size": 8}, lambda: torch.randn(ROWS, 8, 32)),
    ("Audio spectrogram transformer", "ASTForAudioClassification", "audio_spectrogram_transformer.layers.0", {**_TEXT, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "time_stride": 8, "frequency_stride": 8}, lambda: torch.randn(ROWS, 32, 16)),
    ("Time series transformer (PatchTST)", "PatchTSTForClassification", "model.encoder.layers.0", {"num_input_channels": 6, "context_length": 12, "patch_length": 4, "patch_stride": 4, "d_model": 16, "num_attention_heads": 2, "ffn_dim": 32, "num_hidden_layers": 2, "num_targets": CLASSES}, series),
    ("CLIP, vision", "CLIPForImageClassification", "vision_model.encoder.layers.0", {"vision_config": {k: v for k, v in _IMAGE.items() if k not in ("num_labels", "pad_token_id")}, "num_labels": CLASSES}, pictures),
    ("Mamba", "MambaForCausalLM", "backbone.layers.0", {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "use_cache": False, "tie_word_embeddings": False}, tokens),
    ("RWKV", "RwkvForCausalLM", "rwkv.blocks.0", {"vocab_size": 32, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 32, "use_cache": False}, tokens),
    ("Perceiver", "PerceiverForSequenceClassification", "perceiver.encoder.cross_attention", {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 2, "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": 32, "max_position_embeddings": 16, "num_labels": CLASSES}, tokens),
    ("FNet", "FNet" + _CLASSIFY, "fnet.encoder.layer.0", {**_TEXT, "use_tpu_fourier_optimizations": False}, tokens),
    ("BigBird", "BigBird" + _CLASSIFY, "bert.encoder.layer.0", {**_TEXT, "attention_type": "original_full"}, tokens),
    ("Longformer", "Longformer" + _CLASSIFY, "longformer.encoder.layer.0", {**_TEXT, "attention_window": [4, 4]}, tokens),
]  # fmt: skip


_UNTIED = ("T5", "BART", "GPT-2, untied")


def hugging_face() -> Iterator[Architecture]:
    """The models of transformers, or none if it is not installed."""
    try:
        import transformers
    except ImportError:
        return
    transformers.logging.set_verbosity_error()

    def make(name: str, options: dict[str, Any], example: Callable[[], Any]) -> tuple[nn.Module, Any]:
        kind = getattr(transformers, name)
        return kind(kind.config_class(**options)), example()

    for name, kind, at, options, example in _HUGGING_FACE:
        untie = name in _UNTIED
        yield Architecture(f"{name} (Hugging Face)", at, lambda k=kind, o=options, e=example: make(k, o, e), untie)
