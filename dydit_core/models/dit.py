"""DiT and SiT: class-conditional transformers that ComfyUI has no class for.

Submodules carry the names of the authors' files (facebookresearch/DiT, willisma/SiT), so those load as they are.
Equations: DiT (arXiv 2212.09748), adaLN-zero blocks on patches of a latent; SiT (arXiv 2401.08740) is the same network
trained for flow matching. What differs between blocks of relatives (experts, other gates) is a `block` of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sinusoid import sinusoid

# [rows, query tokens, width] from q, k, v [rows, heads, tokens, head width], a mask and the host's options.
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, dict | None], Tensor]
EPS, FLOW = "eps", "flow"
# DiT's noise schedule: betas rise in a straight line.
STEPS, FIRST_BETA, LAST_BETA = 1000, 1e-4, 0.02
_VARIANTS = {(384, 12): "S", (768, 12): "B", (1024, 24): "L", (1152, 28): "XL"}


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a DiT. `side`: latent rows and columns that its positions were made for; `classes`: without the null class.

    `prediction`: EPS (DiT) or FLOW (SiT). `learned_variance`: the output has a second half, which only the original's sampler uses.
    """

    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch_size: int = 2
    side: int = 32
    in_channels: int = 4
    classes: int = 1000
    learned_variance: bool = True
    prediction: str = EPS
    mlp_ratio: float = 4.0

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learned_variance else 1)

    @property
    def tokens(self) -> int:
        return (self.side // self.patch_size) ** 2

    @property
    def latent_size(self) -> tuple[int, ...]:
        """(channels, rows, columns)."""
        return self.in_channels, self.side, self.side

    @property
    def name(self) -> str:
        return "SiT" if self.prediction == FLOW else "DiT"

    @property
    def kind(self) -> str:
        """What routers and their like cannot be taken across, beside the size: `DiT/2`."""
        return f"{self.name}/{self.patch_size}"

    @property
    def title(self) -> str:
        """As the papers call it, `DiT-XL/2`; sizes of one's own by their width and depth."""
        size = _VARIANTS.get((self.hidden_size, self.depth), f"{self.hidden_size}×{self.depth}")
        return f"{self.name}-{size}/{self.patch_size}"


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, options: dict | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@lru_cache(maxsize=1)
def eps_log_sigmas() -> Tensor:
    """log sigma [1000] of DiT's timesteps, rising, in float64; sigma² = (1 − ᾱ) / ᾱ."""
    kept = (1 - torch.linspace(FIRST_BETA, LAST_BETA, STEPS, dtype=torch.float64)).cumprod(0)
    return ((1 - kept) / kept).log() / 2


def timestep(sigmas: Tensor, prediction: str) -> Tensor:
    """What the network calls the noise level `sigmas` [S]: the nearest of DiT's 1000 timesteps; in SiT 0 is noise and 1 the picture."""
    if prediction == FLOW:
        return 1.0 - sigmas
    return (sigmas.float().log()[:, None] - _log_sigmas_on(sigmas.device)).abs().argmin(1).to(sigmas.dtype)


@lru_cache(maxsize=4)
def _log_sigmas_on(device: torch.device) -> Tensor:
    """In float32, as Apple's devices have no other, and sent once: a copy in every forward would wait for the device."""
    return eps_log_sigmas().float().to(device)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, operations: Any = nn, **made: Any) -> None:
        super().__init__()
        layers = operations.Linear(256, width, **made), nn.SiLU(), operations.Linear(width, width, **made)
        self.mlp = nn.Sequential(*layers)

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoid(time).to(dtype))


class LabelEmbedder(nn.Module):
    """One vector for each class, and a last one for no class."""

    def __init__(self, classes: int, width: int, operations: Any = nn, **made: Any) -> None:
        super().__init__()
        self.embedding_table = operations.Embedding(classes + 1, width, **made)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class PatchEmbed(nn.Module):
    def __init__(self, config: DiTConfig, operations: Any = nn, **made: Any) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = operations.Conv2d(config.in_channels, config.hidden_size, kernel_size=size, stride=size, **made)

    def forward(self, x: Tensor) -> Tensor:
        # In this order in memory too: every block would otherwise sort them anew for its norms.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class SelfAttention(nn.Module):
    def __init__(self, width: int, operations: Any = nn, **made: Any) -> None:
        super().__init__()
        self.qkv = operations.Linear(width, 3 * width, **made)
        self.proj = operations.Linear(width, width, **made)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, operations: Any = nn, **made: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(width, hidden, **made)
        self.fc2 = operations.Linear(hidden, width, **made)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _norm(width: int, operations: Any, **made: Any) -> nn.Module:
    return operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **made)


def _modulation(width: int, parts: int, operations: Any, **made: Any) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), operations.Linear(width, parts * width, **made))


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: `normed` [rows, tokens, width], `shift` and `scale` [rows, 1, width]."""
    return torch.addcmul(shift, normed, 1 + scale)


class DiTBlock(nn.Module):
    def __init__(self, config: DiTConfig, attention: Attention, operations: Any = nn, **made: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.num_heads, self.hidden_size, self.attention = config, config.num_heads, width, attention
        self.norm1, self.norm2 = _norm(width, operations, **made), _norm(width, operations, **made)
        self.attn = SelfAttention(width, operations, **made)
        self.mlp = Mlp(width, round(width * config.mlp_ratio), operations, **made)
        self.adaLN_modulation = _modulation(width, 6, operations, **made)

    def forward(self, x: Tensor, condition: Tensor, transformer_options: dict | None = None) -> Tensor:
        """`x` [rows, tokens, width], `condition` [rows, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        qkv = self.attn.qkv(modulate(self.norm1(x), shift1, scale1))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = self.attend(self.attention, q, k, v, transformer_options)
        x = torch.addcmul(x, gate1, self.attn.proj(attn))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, options: dict | None) -> Tensor:
        """Which tokens see one another: here each one all. Inputs and output as of `Attention`."""
        return attention(q, k, v, None, options)


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig, operations: Any = nn, **made: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = _norm(width, operations, **made)
        self.linear = operations.Linear(width, config.patch_size**2 * config.out_channels, **made)
        self.adaLN_modulation = _modulation(width, 2, operations, **made)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The network: [rows, out channels, height, width] of a noisy latent [rows, in channels, height, width].

    `operations`, `made` (dtype, device) and `attention` are the host's. `interpolate`: latents of another size than the
    positions were made for get positions in between; otherwise they are refused (ValueError).
    """

    def __init__(self, config: DiTConfig, operations: Any = nn, attention: Attention = plain_attention,
                 block: Callable[..., nn.Module] = DiTBlock, interpolate: bool = False, **made: Any) -> None:
        super().__init__()
        self.config, self.patch_size, self.interpolate = config, config.patch_size, interpolate
        self.x_embedder = PatchEmbed(config, operations, **made)
        self.t_embedder = TimestepEmbedder(config.hidden_size, operations, **made)
        self.y_embedder = LabelEmbedder(config.classes, config.hidden_size, operations, **made)
        positions = grid_positions(config.hidden_size, config.side // config.patch_size)
        self.pos_embed = nn.Parameter(positions[None].to(**made), requires_grad=False)
        self.blocks = nn.ModuleList(block(config, attention, operations, **made) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, operations, **made)

    def embed_time(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        """The part [rows, width] of the condition that follows the noise level; TDW decides by it alone."""
        return self.t_embedder(time, dtype)

    def refusal(self, shape: torch.Size) -> str | None:
        """Why a latent of this shape cannot be taken, or None; whether there are positions for its size, `positions` says."""
        title, patch = self.config.title, self.patch_size
        if len(shape) != 4:
            return f"This {title} draws pictures, and the latent is of a video; use an Empty Latent Image."
        channels, height, width = shape[1:]
        if channels != self.config.in_channels:
            return (f"This {title} draws in {self.config.in_channels} channels, and the latent has {channels}; use an Empty Latent Image, or encode with a VAE of "
                    "Stable Diffusion 1.")
        if height % patch or width % patch:
            return (f"This {title} takes latents of whole patches: width and height in multiples of {8 * patch} pixels, not {8 * width}×{8 * height}.")
        return None

    def positions(self, rows: int, columns: int) -> Tensor:
        """[1, rows · columns, width] for this many tokens."""
        side = math.isqrt(self.pos_embed.shape[1])
        if (rows, columns) == (side, side):
            return self.pos_embed
        if not self.interpolate:
            made, asked = (f"{8 * self.patch_size * a}×{8 * self.patch_size * b}" for a, b in ((side, side), (columns, rows)))
            raise ValueError(f"This {self.config.title} was made for pictures of {made}, and is asked for one of {asked}, the size of the latent or of a "
                             f"prompt's area; make it {made}, or turn on interpolate_positions in DyDiT Checkpoint Loader.")
        grid = self.pos_embed.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
        return grid.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor, transformer_options: dict | None = None,
                positions: Tensor | None = None) -> Tensor:
        """`time` [rows] as of `timestep`; `labels` [rows] of int64, `config.classes` for no class; `positions`
        [rows or 1, tokens, width] where they are not those of a whole picture."""
        reason = self.refusal(x.shape)
        if reason is not None:
            raise ValueError(reason)
        patch, (height, width) = self.patch_size, x.shape[-2:]
        tokens = self.x_embedder(x)
        tokens = tokens + (self.positions(height // patch, width // patch) if positions is None else positions).to(tokens)
        condition = self.embed_time(time, x.dtype) + self.y_embedder(labels).to(x.dtype)
        for block in self.blocks:
            tokens = block(tokens, condition, transformer_options=transformer_options)
        out = self.final_layer(tokens, condition)
        return out.unflatten(1, (height // patch, -1)).unflatten(3, (patch, patch, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def denoise_direction(self, x: Tensor, sigma: Tensor, labels: Tensor, transformer_options: dict | None = None) -> Tensor:
        """See `direction`."""
        return direction(self, x, sigma, labels, transformer_options)


def direction(model: nn.Module, x: Tensor, sigma: Tensor, labels: Tensor | None, transformer_options: dict | None) -> Tensor:
    """d x / d sigma, like x, of a DiT, SiT or Latte at noise level `sigma` [rows], which every sampler integrates.

    EPS: of x = picture + sigma · noise. FLOW: of x = (1 − sigma) · picture + sigma · noise.
    """
    config, time = model.config, timestep(sigma, model.config.prediction)
    if config.prediction == FLOW:
        return -model(x, time, labels, transformer_options)[:, : config.in_channels]
    scaled = x * (1 + sigma**2).rsqrt().view(-1, *[1] * (x.ndim - 1)).to(x)
    return model(scaled, time, labels, transformer_options)[:, : config.in_channels]


def sines(places: Tensor, width: int) -> Tensor:
    """[places, width], float64: half sines, half cosines, of falling frequencies."""
    omega = 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = places.double()[:, None] * omega
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def grid_positions(width: int, side: int) -> Tensor:
    """Sinusoidal positions [side² of a square, width], float32: half of them of the column, half of the row."""
    row, column = torch.meshgrid(*2 * (torch.arange(side),), indexing="ij")
    return torch.cat([sines(place.flatten(), width // 2) for place in (column, row)], dim=1).float()
