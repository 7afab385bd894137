"""The objectives of the class-conditional demo models, and DyDiT's own fine-tune, on a tiny DiT and SiT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dydit_core.models.dit import FLOW, DiT, DiTConfig
from dydit_core.train.base import Run, Stage, load, new_run, share, train, train_step
from dydit_core.train.diffusion import Denoising, bound, draw_batch, error, init_dit
from dydit_core.train.dynamic import Decisions, DynamicDenoising, router_pace, sort_units, with_routers
from dydit_core.train.team import Team, together

CONFIG = DiTConfig(hidden_size=32, depth=2, num_heads=4, side=8, classes=3)
PLAN = (Stage("windows", 2, batch=16, window=2, start=1e-2, end=1e-2), Stage("full", 2, 16, 4, 1e-2, 1e-3))


class Toy:
    """Twelve fixed pictures of three classes."""

    def __init__(self) -> None:
        self.latents = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0)).share_memory_()

    def __len__(self) -> int:
        return 12

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents[index], index % 3


def random_dit(config: DiTConfig = CONFIG, seed: int = 0) -> DiT:
    """Random weights everywhere: a fresh DiT would ignore its blocks, whose gates start at zero."""
    torch.manual_seed(seed)
    model = DiT(config)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.copy_(torch.randn_like(param) * (param.shape[-1] ** -0.5 if param.ndim > 1 else 0.3))
    return model


def quiet(line: str) -> None:
    pass


def test_the_variational_bound_is_the_divergence_of_two_normal_distributions() -> None:
    """Written down from DDPM's posterior (arXiv 2006.11239, equations 6 and 7), without shortcuts."""
    generator = torch.Generator().manual_seed(0)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    picture, noise, off = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    variance = 2 * torch.rand(3, 4, 2, 2, generator=generator, dtype=torch.float64) - 1
    step = torch.tensor([1, 400, 999])
    now, before, beta = (part[:, None, None, None] for part in (kept[step], kept[step - 1], betas[step]))
    x = now.sqrt() * picture + (1 - now).sqrt() * noise
    true_variance = beta * (1 - before) / (1 - now)

    def mean(start: Tensor) -> Tensor:
        return before.sqrt() * beta / (1 - now) * start + (1 - beta).sqrt() * (1 - before) / (1 - now) * x

    predicted = (x - (1 - now).sqrt() * (noise + off)) / now.sqrt()
    log_variance = (variance + 1) / 2 * beta.log() + (1 - variance) / 2 * true_variance.log()
    expected = kl_divergence(Normal(mean(picture), true_variance.sqrt()), Normal(mean(predicted), (log_variance / 2).exp()))
    expected = expected.flatten(1).mean(1) / torch.log(torch.tensor(2.0))
    assert torch.allclose(bound(off.float(), variance.float(), step), expected.float(), rtol=1e-3)


def test_the_bound_ends_in_the_likelihood_of_the_picture() -> None:
    step, off, variance = torch.tensor([0]), torch.full((1, 4, 2, 2), 0.3), torch.ones(1, 4, 2, 2)
    # At the first timestep the widest variance is beta, and the mean is off by the noise's share of the picture.
    spread = torch.tensor(1e-4).sqrt()
    missed = 0.3 * (1e-4 / (1 - 1e-4)) ** 0.5
    expected = -Normal(0.0, spread).log_prob(torch.tensor(missed)) / torch.log(torch.tensor(2.0))
    assert bound(off, variance, step).item() == pytest.approx(expected.item(), rel=1e-3)


def test_only_the_bound_teaches_the_variance_and_only_the_noise_teaches_the_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = draw_batch(DiT(CONFIG), Toy(), Stage("", 1, 8, 4, 0, 0), generator)
    predicted = torch.randn(8, 8, 8, 8, generator=generator, requires_grad=True)
    error(predicted, batch, slice(0, 8)).sum().backward()
    noise = 2 * (predicted[:, :4].detach() - batch.target) / batch.target[0].numel()
    assert torch.allclose(predicted.grad[:, :4], noise, rtol=1e-5)
    assert predicted.grad[:, 4:].abs().min() > 0


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, prediction=FLOW, learned_variance=False)])
def test_any_eight_rows_are_spread_over_the_noise_levels(config: DiTConfig) -> None:
    batch = draw_batch(DiT(config), Toy(), Stage("", 1, 32, 4, 0, 0), torch.Generator().manual_seed(1))
    last = 1000 if config is CONFIG else 1
    quarters = [(batch.time[start : start + 8] / last * 4).long().clamp(max=3).unique().tolist() for start in (0, 8, 16, 24)]
    assert quarters == [[0, 1, 2, 3]] * 4


def test_labels_are_dropped_in_one_row_of_ten() -> None:
    batch = draw_batch(DiT(CONFIG), Toy(), Stage("", 1, 2000, 2, 0, 0), torch.Generator().manual_seed(1))
    assert 0.08 < (batch.labels == CONFIG.classes).float().mean() < 0.12


def test_a_window_has_the_positions_of_what_it_shows() -> None:
    """Windows of a picture whose numbers are its tokens': at almost no noise they are read off."""
    class Places(Toy):
        def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
            side = torch.arange(8) // 2
            return (1.0 + side[:, None] * 4 + side).expand(len(index), 4, 8, 8), index % 3

    model = DiT(replace(CONFIG, prediction=FLOW, learned_variance=False))
    batch = draw_batch(model, Places(), Stage("", 1, 6, 2, 0, 0), torch.Generator().manual_seed(2))
    pictures = batch.x + (1 - batch.time)[:, None, None, None] * batch.target
    token = pictures[:, 0, ::2, ::2].flatten(1).round().long() - 1
    assert torch.equal(batch.positions, model.pos_embed[0][token]) and len(token.unique(dim=0)) > 1


def test_flow_is_learned_towards_the_picture() -> None:
    """SiT's output is the velocity from noise to picture, of which `denoise_direction` is the opposite."""
    config = replace(CONFIG, prediction=FLOW, learned_variance=False)
    batch = draw_batch(DiT(config), Toy(), Stage("", 1, 8, 4, 0, 0), torch.Generator().manual_seed(1))
    data = Toy().latents
    ends = batch.x + (1 - batch.time)[:, None, None, None] * batch.target
    assert min((data - end).abs().amax((1, 2, 3)).min() for end in ends) < 1e-5
    assert all((data - end).abs().amax((1, 2, 3)).min() < 1e-5 for end in ends)


def test_sorting_heads_and_channels_changes_nothing_but_their_order() -> None:
    model, x = random_dit(), torch.randn(2, 4, 8, 8)
    time, labels = torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    before = model(x, time, labels)
    sort_units(model)
    assert torch.allclose(model(x, time, labels), before, atol=1e-5)
    for block in model.blocks:
        size = (block.mlp.fc1.weight.norm(dim=1) * block.mlp.fc2.weight.norm(dim=0)).tolist()
        assert size == sorted(size, reverse=True)


def routed(seed: int = 3) -> DiT:
    """Routers that shut about half, by token, time and picture."""
    model = with_routers(random_dit())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn_rate.router, block.mlp_rate.router, block.token_selection.mlp_head[2]):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
                layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, generator=generator))
    return model


def test_shut_units_are_as_if_they_were_not_there() -> None:
    """Equal to a network from which heads, channels and tokens were cut by hand."""
    model, x = routed(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    time, labels = torch.tensor([300.0]), torch.tensor([1])
    embedding = model.embed_time(time, x.dtype)
    decisions = Decisions(embedding)
    found = model(x, time, labels, {"decisions": decisions})
    tokens = model.x_embedder(x) + model.pos_embed
    condition = embedding + model.y_embedder(labels)
    shares = []
    for block in model.blocks:
        heads = torch.cat([torch.tensor([True]), block.attn_rate.router(embedding)[0] > 0])
        groups = torch.cat([torch.tensor([True]), block.mlp_rate.router(embedding)[0] > 0])
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(condition).chunk(6, dim=-1)
        q, k, v = block.attn.qkv(block.norm1(tokens) * (1 + scale1) + shift1)[0].unflatten(-1, (3, 4, 8)).permute(1, 2, 0, 3)
        attended = torch.stack([((q[h] @ k[h].T) * 8**-0.5).softmax(-1) @ v[h] for h in range(4) if heads[h]], 1)
        out = block.attn.proj.weight.unflatten(1, (4, 8))[:, heads].flatten(1)
        tokens = tokens + gate1 * (attended.flatten(1) @ out.T + block.attn.proj.bias)
        keep = block.token_selection.mlp_head(tokens)[0, :, 0] > 0
        units = groups.repeat_interleave(32)
        normed = block.norm2(tokens[:, keep]) * (1 + scale2) + shift2
        hidden = torch.nn.functional.gelu(normed @ block.mlp.fc1.weight[units].T + block.mlp.fc1.bias[units], approximate="tanh")
        tokens = tokens.clone()
        tokens[:, keep] += gate2 * (hidden @ block.mlp.fc2.weight[:, units].T + block.mlp.fc2.bias)
        shares.append((heads.float().mean(), groups.float().mean(), keep.float().mean()))
    expected = model.final_layer(tokens, condition)
    expected = expected.unflatten(1, (4, 4)).unflatten(3, (2, 2, 8)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(torch.tensor([[part.item() for part in kept] for kept in decisions.kept]), torch.tensor(shares))
    assert 0.2 < torch.tensor(shares).mean() < 0.9
    attention, mlp = 4 * 16 * 32**2 + 2 * 16**2 * 32, 8 * 16 * 32**2
    cost = sum(heads * attention + groups * kept * mlp for heads, groups, kept in shares) / (2 * (attention + mlp))
    assert decisions.cost(model.blocks[0], 16).item() == pytest.approx(float(cost), rel=1e-5)


def test_a_network_with_new_routers_is_the_dense_one() -> None:
    dense, x = random_dit(), torch.randn(2, 4, 8, 8)
    time, labels = torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    expected = dense(x, time, labels)
    model = with_routers(dense)
    assert torch.allclose(model(x, time, labels), expected, atol=1e-5)
    for block in model.blocks:  # open whatever the picture
        torch.nn.init.zeros_(block.token_selection.mlp_head[2].weight)
        torch.nn.init.zeros_(block.attn_rate.router.weight)
        torch.nn.init.zeros_(block.mlp_rate.router.weight)
    decisions = Decisions(model.embed_time(time, x.dtype))
    assert torch.allclose(model(x, time, labels, {"decisions": decisions}), expected, atol=1e-5)
    assert decisions.cost(model.blocks[0], 16).tolist() == [1.0, 1.0]


def test_routers_learn_to_spend_half() -> None:
    """The cost of the plain threshold, as it will be run, follows its target."""
    torch.manual_seed(0)
    objective = DynamicDenoising(Toy(), steps=60, complete=0.2)
    run = new_run(with_routers(init_dit(DiT(CONFIG))), 0, router_pace)
    stage = Stage("dynamic", 60, batch=16, window=4, start=0, end=0)
    for _ in range(60):
        train_step(run, objective, stage, 2e-3)
    batch = draw_batch(run.model, Toy(), Stage("", 1, 64, 4, 0, 0), torch.Generator().manual_seed(9))
    decisions = Decisions(run.model.embed_time(batch.time, batch.x.dtype))
    with torch.no_grad():
        batch.predict(run.model, slice(0, 64), {"decisions": decisions})
    assert decisions.cost(run.model.blocks[0], 16).mean().item() == pytest.approx(0.5, abs=0.06)
    moved = torch.tensor([[share.mean().item() for share in block] for block in decisions.kept]).mean(0)
    assert (moved < 0.97).all(), f"heads, groups and tokens kept: {moved.tolist()}"


@pytest.mark.parametrize("dynamic", [False, True])
def test_resumed_training_is_bit_identical_to_uninterrupted(tmp_path: Path, dynamic: bool) -> None:
    def fresh() -> Run:
        torch.manual_seed(0)
        model = init_dit(DiT(CONFIG))
        return new_run(with_routers(model) if dynamic else model, 0, router_pace)

    objective = DynamicDenoising(Toy(), 4) if dynamic else Denoising(Toy())
    whole, resumed = fresh(), fresh()
    train(whole, objective, PLAN, tmp_path / "whole.pt", quiet)
    train(fresh(), objective, PLAN[:1], tmp_path / "part.pt", quiet)
    load(resumed, tmp_path / "part.pt")
    assert resumed.step == 2
    train(resumed, objective, PLAN, tmp_path / "part.pt", quiet)
    assert resumed.losses == whole.losses and len(whole.losses) == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert all(torch.equal(value, resumed.ema[name]) for name, value in whole.ema.items())


def member(team: Team, run: Run, objective: DynamicDenoising, checkpoint: Path) -> None:
    train(run, objective, PLAN, checkpoint, quiet, team=team)


def test_a_team_takes_the_steps_of_one(tmp_path: Path) -> None:
    losses = []
    for size in (1, 2):
        torch.manual_seed(0)
        run = new_run(with_routers(init_dit(DiT(CONFIG))), 0, router_pace)
        share(run)
        together(member, size, sum(param.numel() for param in run.ema.values()), run, DynamicDenoising(Toy(), 4), tmp_path / f"{size}.pt")
        losses.append(torch.tensor(torch.load(tmp_path / f"{size}.pt", weights_only=True)["losses"]))
    assert torch.allclose(losses[0], losses[1], rtol=1e-4)


def test_rows_of_a_batch_add_up() -> None:
    objective, run = Denoising(Toy()), new_run(random_dit())
    loss = objective(run, PLAN[1], torch.Generator().manual_seed(0))
    batch = draw_batch(run.model, Toy(), PLAN[1], torch.Generator().manual_seed(0))
    whole = error(batch.predict(run.model, slice(0, 16)), batch, slice(0, 16)).mean()
    assert sum(loss(slice(start, start + 8)).item() for start in (0, 8)) == pytest.approx(whole.item(), rel=1e-5)
