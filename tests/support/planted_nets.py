"""Random small networks, each with one kind of trouble planted that fp16 cannot get through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class PlantedNet:
    """planted: names of the modules in which the trouble is, or that read what it hands on. continuous: whether what is
    planted is a continuous function of the input."""

    net: nn.Module
    kind: str
    planted: tuple[str, ...]
    continuous: bool
    inputs: Callable[[int], torch.Tensor]


class Block(nn.Module):
    """A residual block of tokens [B, T, D], as in a transformer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(functional.gelu(self.fc1(self.norm(x))))


class Planted(Block):
    """A block whose branch goes through `trouble` between two leaves."""

    def __init__(self, width: int, hidden: int, trouble: nn.Module) -> None:
        super().__init__(width, hidden)
        self.trouble = trouble
        self.after = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.fc2(functional.gelu(self.fc1(self.norm(x))))
        return x + self.after(self.trouble(inner))


class LargeLinear(nn.Module):
    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        with torch.no_grad():
            self.fc.weight *= size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.fc(x)
        return made


class LargeConv(nn.Module):
    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        with torch.no_grad():
            self.conv.weight *= size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return made


class TinyWeights(nn.Module):
    """Weights that fp16 loses, and a factor that makes up for them."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width, bias=False)
        self.size = size
        with torch.no_grad():
            self.fc.weight /= size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.fc(x) * self.size
        return made


class Products(nn.Module):
    """Attention written out that divides by the scale after the product."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.q(x) * self.size**0.5, self.k(x) * self.size**0.5
        made: torch.Tensor = ((q @ k.transpose(1, 2)) / self.size).softmax(dim=-1) @ self.v(x)
        return made


class ElementProducts(nn.Module):
    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = (self.a(x) * self.size**0.5) * (self.b(x) * self.size**0.5)
        return product / self.size


class WrittenSoftmax(nn.Module):
    """exp without the maximum taken away before."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.logits, self.values = nn.Linear(width, width), nn.Linear(width, width)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raised = torch.exp(self.logits(x) + self.size)
        return raised / raised.sum(dim=-1, keepdim=True) * x.shape[-1] * self.values(x)


class WrittenNorm(nn.Module):
    """A norm of large values whose squares overflow."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(width))
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large = self.fc(x) * self.size
        return large * torch.rsqrt(large.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * self.gain


class ResponseSums(nn.Module):
    """Global response normalization, whose sums of squares run over all tokens."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large = self.fc(x) * self.size
        lengths = large.square().sum(dim=1, keepdim=True).sqrt()
        return large / self.size * (1 + lengths / (lengths.mean(dim=-1, keepdim=True) + 1e-6))


class Between(nn.Module):
    """A module hands on what the next one makes small again."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            self.up.weight *= size**0.5
            self.up.bias *= size
            self.down.weight /= size
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.down(self.up(x * self.size**0.5))
        return made


class ZeroByZero(nn.Module):
    """Rows that are zero, over their sum plus a number that fp16 takes for zero."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positive = functional.relu(self.fc(x) - 0.5)
        positive = positive * (torch.arange(x.shape[1], device=x.device)[:, None] % 3 != 0)
        return positive / (positive.sum(dim=-1, keepdim=True) + 1e-9) * x.shape[-1]


class Underflow(nn.Module):
    """A product of small numbers that is made large again."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = (self.a(x) / self.size**0.5) * (self.b(x) / self.size**0.5)
        return product * self.size**0.5 * self.size**0.5


class Masked(nn.Module):
    """An overflow that does no harm, beside one that does."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.gate, self.fc = nn.Linear(width, width), nn.Linear(width, width)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        harmless = torch.exp(self.gate(x) * 30).clamp(max=4.0)
        large = self.fc(x) * self.size
        return harmless * (large / self.size)


class Cancellation(nn.Module):
    """A large number is added and taken away again."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.out((self.fc(x) + self.size) - self.size)
        return made


class LargeStream(Block):
    """A branch that adds large values to the stream, as SDXL's decoder does."""

    def __init__(self, width: int, hidden: int, size: float) -> None:
        super().__init__(width, hidden)
        with torch.no_grad():
            self.fc2.weight *= size
            self.fc2.bias *= size


class Net(nn.Module):
    def __init__(self, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(12, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        made: torch.Tensor = self.head(self.norm(x))
        return made


_TROUBLES: dict[str, tuple[Callable[[int, float], nn.Module], tuple[float, float], bool]] = {
    "linear weights": (LargeLinear, (5.5, 7.0), True),
    "convolution weights": (LargeConv, (5.5, 7.0), True),
    "tiny weights": (TinyWeights, (7.0, 9.0), True),
    "products": (Products, (5.5, 7.5), True),
    "element products": (ElementProducts, (6.0, 8.0), True),
    "softmax": (WrittenSoftmax, (1.08, 1.5), True),
    "norm": (WrittenNorm, (3.0, 4.0), True),
    "response sums": (ResponseSums, (2.7, 4.0), True),
    "between modules": (Between, (6.5, 8.5), True),
    "0/0": (ZeroByZero, (0.0, 0.0), True),
    "underflow": (Underflow, (8.0, 10.0), True),
    "masked overflow": (Masked, (5.5, 7.0), True),
    "cancellation": (Cancellation, (3.5, 4.5), True),
}
KINDS = (*_TROUBLES, "stream")


def planted_net(seed: int) -> PlantedNet:
    """The network of a seed; kinds take turns."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    kind = KINDS[seed % len(KINDS)]
    width, hidden, depth = (int(rng.choice(sizes)) for sizes in ((16, 24, 32), (32, 48), (2, 3, 4, 5)))
    place = int(rng.integers(0, depth))
    blocks: list[nn.Module] = [Block(width, hidden) for _ in range(depth)]
    name = f"blocks.{place}"
    if kind == "stream":
        blocks[place] = LargeStream(width, hidden, 10 ** float(rng.uniform(5.5, 7.0)))
        readers = tuple(f"blocks.{n}.norm" for n in range(place + 1, depth))
        planted, continuous = (name, *readers, "norm"), True
    else:
        make, exponents, continuous = _TROUBLES[kind]
        trouble = make(width, 10 ** float(rng.uniform(*exponents)))
        blocks[place] = Planted(width, hidden, trouble)
        planted = (f"{name}.trouble", f"{name}.after")
    tokens = int(rng.choice((5, 9, 16)))

    def inputs(number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        return torch.randn(2, tokens, 12, generator=generator)

    return PlantedNet(Net(width, blocks).eval(), kind, planted, continuous, inputs)
