"""FLUX for running and training without ComfyUI.

Submodules carry the names of the Black Forest Labs files (and so of ComfyUI's own class), which is what
`dydit_core.families.flux` drives: the same family code runs this class and the host's.
Equations: FLUX.1 (black-forest-labs/flux), rectified flow with adaLN modulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sinusoid import sinusoid


@dataclass(frozen=True)
class FluxConfig:
    """Shape of a FLUX model. `hidden_size` must be a multiple of `head_dim` (128 in every FLUX file)."""

    hidden_size: int = 3072
    depth: int = 19
    depth_single_blocks: int = 38
    in_channels: int = 16
    context_in_dim: int = 4096
    vec_in_dim: int = 768
    guidance_embed: bool = False
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    patch_size: int = 2
    mlp_ratio: float = 4.0

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dim)

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim


@dataclass
class ModulationOut:
    """adaLN vectors of one branch, each [rows, 1, channels]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def timestep_embedding(t: Tensor) -> Tensor:
    """Sinusoidal embedding [rows, 256] of sigma `t` [rows] in 0…1."""
    return sinusoid(1000.0 * t.float())


def rotary_table(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    """Rotation matrices [rows, 1, tokens, head_dim / 2, 2, 2] for position ids [rows, tokens, axes]."""
    tables = []
    for axis, dim in enumerate(axes_dim):
        omega = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angle = ids[..., axis, None].double() * omega
        tables.append(torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1))
    return torch.cat(tables, dim=-2).unflatten(-1, (2, 2)).float().unsqueeze(1)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate channel pairs of `x` [rows, heads, tokens, head_dim] by `table` (see `rotary_table`)."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]).flatten(-2).type_as(x)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, operations: Any = nn) -> None:
        super().__init__()
        self.in_layer = operations.Linear(in_dim, hidden_dim)
        self.out_layer = operations.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class QKNorm(nn.Module):
    def __init__(self, dim: int, operations: Any = nn) -> None:
        super().__init__()
        self.query_norm = operations.RMSNorm(dim, eps=1e-6)
        self.key_norm = operations.RMSNorm(dim, eps=1e-6)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, operations: Any = nn) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = operations.Linear(dim, 3 * dim)
        self.norm = QKNorm(dim // num_heads, operations)
        self.proj = operations.Linear(dim, dim)


class Modulation(nn.Module):
    def __init__(self, dim: int, double: bool, operations: Any = nn) -> None:
        super().__init__()
        self.is_double = double
        self.lin = operations.Linear(dim, (6 if double else 3) * dim)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        out = self.lin(F.silu(vec))[:, None, :].chunk(6 if self.is_double else 3, dim=-1)
        return ModulationOut(*out[:3]), ModulationOut(*out[3:]) if self.is_double else None


def _norm(dim: int, operations: Any) -> nn.Module:
    return operations.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def _mlp(dim: int, hidden: int, operations: Any) -> nn.Sequential:
    return nn.Sequential(operations.Linear(dim, hidden), nn.GELU(approximate="tanh"), operations.Linear(hidden, dim))


def _modulate(x: Tensor, mod: ModulationOut) -> Tensor:
    return torch.addcmul(mod.shift, x, 1 + mod.scale)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)


def _attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None) -> Tensor:
    q, k = apply_rotary(q, pe), apply_rotary(k, pe)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class DoubleStreamBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, operations: Any = nn) -> None:
        super().__init__()
        self.num_heads, self.hidden_size = num_heads, dim
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(dim, True, operations))
            self.add_module(f"{stream}_norm1", _norm(dim, operations))
            self.add_module(f"{stream}_attn", SelfAttention(dim, num_heads, operations))
            self.add_module(f"{stream}_norm2", _norm(dim, operations))
            self.add_module(f"{stream}_mlp", _mlp(dim, round(dim * mlp_ratio), operations))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, attn_mask: Tensor | None = None,
                transformer_options: dict | None = None) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        img_qkv = _heads(self.img_attn.qkv(_modulate(self.img_norm1(img), img_mod1)), self.num_heads)
        txt_qkv = _heads(self.txt_attn.qkv(_modulate(self.txt_norm1(txt), txt_mod1)), self.num_heads)
        img_q, img_k = self.img_attn.norm(*img_qkv)
        txt_q, txt_k = self.txt_attn.norm(*txt_qkv)
        attn = _attention(torch.cat((txt_q, img_q), 2), torch.cat((txt_k, img_k), 2),
                          torch.cat((txt_qkv[2], img_qkv[2]), 2), pe, attn_mask)
        txt_attn, img_attn = attn.split((txt.shape[1], img.shape[1]), dim=1)
        img = img + img_mod1.gate * self.img_attn.proj(img_attn)
        img = img + img_mod2.gate * self.img_mlp(_modulate(self.img_norm2(img), img_mod2))
        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_attn)
        txt = txt + txt_mod2.gate * self.txt_mlp(_modulate(self.txt_norm2(txt), txt_mod2))
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, operations: Any = nn) -> None:
        super().__init__()
        self.num_heads, self.hidden_size, self.mlp_hidden_dim = num_heads, dim, round(dim * mlp_ratio)
        self.linear1 = operations.Linear(dim, 3 * dim + self.mlp_hidden_dim)
        self.linear2 = operations.Linear(dim + self.mlp_hidden_dim, dim)
        self.norm = QKNorm(dim // num_heads, operations)
        self.pre_norm = _norm(dim, operations)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(dim, False, operations)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, attn_mask: Tensor | None = None,
                transformer_options: dict | None = None) -> Tensor:
        mod, _ = self.modulation(vec)
        qkv, mlp = self.linear1(_modulate(self.pre_norm(x), mod)).split((3 * self.hidden_size, self.mlp_hidden_dim), -1)
        q, k, v = _heads(qkv, self.num_heads)
        q, k = self.norm(q, k, v)
        attn = _attention(q, k, v, pe, attn_mask)
        return x + mod.gate * self.linear2(torch.cat((attn, self.mlp_act(mlp)), 2))


class LastLayer(nn.Module):
    def __init__(self, dim: int, out_dim: int, operations: Any = nn) -> None:
        super().__init__()
        self.norm_final = _norm(dim, operations)
        self.linear = operations.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))


class Flux(nn.Module):
    """The FLUX transformer: velocity [rows, channels, height, width] of a noisy latent of that shape."""

    def __init__(self, config: FluxConfig, operations: Any = nn) -> None:
        super().__init__()
        if config.hidden_size % config.head_dim:
            raise ValueError(f"FLUX width {config.hidden_size} is not a multiple of the head width {config.head_dim}.")
        self.config = config
        width, patch_dim = config.hidden_size, config.in_channels * config.patch_size**2
        self.img_in = operations.Linear(patch_dim, width)
        self.txt_in = operations.Linear(config.context_in_dim, width)
        self.time_in = MLPEmbedder(256, width, operations)
        self.vector_in = MLPEmbedder(config.vec_in_dim, width, operations)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(256, width, operations)
        shape = (width, config.num_heads, config.mlp_ratio, operations)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*shape) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*shape) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(width, patch_dim, operations)

    def patchify(self, x: Tensor) -> Tensor:
        """Latent [rows, channels, height, width] to tokens [rows, height·width / patch², channels·patch²]."""
        p = self.config.patch_size
        rows, channels, height, width = x.shape
        x = x.view(rows, channels, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(rows, (height // p) * (width // p), channels * p * p)

    def unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Inverse of `patchify` for a latent of `height` × `width`."""
        p = self.config.patch_size
        x = tokens.view(tokens.shape[0], height // p, width // p, -1, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, height, width)

    def positions(self, text_tokens: int, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
        """Position ids [1, text + rows·columns, 3]: zeros for text, (0, row, column) for image tokens."""
        ids = torch.zeros(text_tokens + rows * columns, len(self.config.axes_dim), device=device)
        grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
        ids[text_tokens:, 1:] = grid.float()
        return ids[None]

    def embed_condition(self, timestep: Tensor, y: Tensor, guidance: Tensor | None = None) -> Tensor:
        """The adaLN condition `vec` [rows, width] from sigma, the pooled prompt `y` and the guidance scale."""
        dtype = self.img_in.weight.dtype
        vec = self.time_in(timestep_embedding(timestep).to(dtype)) + self.vector_in(y)
        if self.config.guidance_embed and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(dtype))
        return vec

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor, guidance: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        height, width = x.shape[-2:]
        patch = self.config.patch_size
        img, txt = self.img_in(self.patchify(x)), self.txt_in(context)
        if positions is None:
            positions = self.positions(txt.shape[1], height // patch, width // patch, x.device)
        pe = rotary_table(positions, self.config.axes_dim, self.config.theta)
        vec = self.embed_condition(timestep, y, guidance)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec=vec, pe=pe)
        return self.unpatchify(self.final_layer(x[:, txt.shape[1]:], vec), height, width)

    def denoise_direction(self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """d x / d sigma of x = (1 − sigma) · picture + sigma · noise, which every sampler integrates: the velocity itself."""
        return self(x, sigma, context, pooled)


def config_from_state_dict(shapes: dict[str, tuple[int, ...]]) -> FluxConfig:
    """Read a `FluxConfig` off the tensor shapes of a BFL-layout file.

    Raises ValueError naming the first key that is missing.
    """
    for key in ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight"):
        if key not in shapes:
            raise ValueError(f"This is not a FLUX file: the tensor {key} is missing.")

    def depth(prefix: str) -> int:
        return 1 + max((int(key.split(".")[1]) for key in shapes if key.startswith(prefix)), default=-1)

    return FluxConfig(
        hidden_size=shapes["img_in.weight"][0],
        depth=depth("double_blocks."),
        depth_single_blocks=depth("single_blocks."),
        in_channels=shapes["img_in.weight"][1] // 4,
        context_in_dim=shapes["txt_in.weight"][1],
        vec_in_dim=shapes["vector_in.in_layer.weight"][1],
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )


def from_file_key(key: str) -> str:
    """BFL files call an RMSNorm's weight `scale`; torch calls it `weight`."""
    return key[: -len("scale")] + "weight" if key.endswith("_norm.scale") else key


def to_file_key(key: str) -> str:
    """Inverse of `from_file_key`."""
    return key[: -len("weight")] + "scale" if key.endswith(("query_norm.weight", "key_norm.weight")) else key
