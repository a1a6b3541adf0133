"""Other people's packages, as the import system sees them, and an encoder of no library.

A package is modules and a ``*.dist-info`` folder with its entry points, in a folder on the path.
"""

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from saint import plugins
from saint.upstream import BlockSpec, EncoderSpec, Role, registry
from support.models import enliven


@pytest.fixture
def fresh(monkeypatch):
    """Entry points are read again, and what a test registers is gone behind it."""
    plugins.points.cache_clear()
    monkeypatch.setattr(registry, "_tables", registry._Tables())
    yield
    plugins.points.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution: modules by file name, entry points by group."""

    def make(name: str, modules: dict[str, str], **groups: str) -> None:
        root = tmp_path / name
        info = root / f"{name}-1.5.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        lines = [f"[saint.{group}]\n{points}\n" for group, points in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for file, text in modules.items():
            (root / file).write_text(textwrap.dedent(text))
            monkeypatch.delitem(sys.modules, Path(file).stem, raising=False)
        monkeypatch.syspath_prepend(root)

    return make


class HomeAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, hidden=None):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
        return self.out(y.transpose(1, 2).flatten(2))


class HomeBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.look = HomeAttention(width, heads)
        self.think = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, hidden=None):
        x = x + self.look(self.before(x), hidden)
        return x + self.think(self.behind(x))


class HomeViT(nn.Module):
    """A ViT of no library: a class token, learned positions, four blocks."""

    image_size = 96

    def __init__(self, width: int = 48, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(3, width, 16, 16)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 37, width))
        self.trunk = nn.ModuleList(HomeBlock(width, heads) for _ in range(depth))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 7)

    def forward(self, x):
        patches = self.patchify(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), patches], 1) + self.positions
        for block in self.trunk:
            x = block(x)
        return self.head(self.last(x)[:, 0])


HOME = EncoderSpec(
    title="Home-made ViT",
    library="homevit",
    encoder=f"{__name__}.HomeViT",
    blocks="trunk",
    block_specs={
        "HomeBlock": BlockSpec(
            attn="look",
            mlp="think",
            norm1="before",
            norm2="behind",
            keys=("look.key",),
            heads=("look.heads",),
            mask=Role("hidden"),
        )
    },
    prefix=lambda model: 1,
    patch="patchify",
    final="last",
)


def home() -> nn.Module:
    torch.manual_seed(0)
    return enliven(HomeViT().eval())
