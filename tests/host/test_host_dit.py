"""DiT and SiT as a MODEL of the host: the pictures of plain torch, and what a graph does to a model."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny import budgeted  # first: starts the host
from tiny_dit import CLASSES, SIDE, config, dit, euler, load_dit, network, sample, transformer

import comfy.samplers
import comfy.sd
import comfy_extras.nodes_custom_sampler as custom
from arrangements import nothing_fits
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_cfg import CFGZeroStar
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_fresca import FreSca
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_lt import LTXVDualCFGGuider
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow, ModelSamplingSD3, RescaleCFG
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNegGuider
from comfy_extras.nodes_rope import ScaleROPE
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from dydit_pack.dydit_core.models.dit import EPS, FLOW, eps_log_sigmas
from dydit_pack.nodes.classes import conditioning
from dydit_pack.nodes.dit import dit_model
from dydit_pack.nodes.guidance import guide_three
from nodes import ConditioningAverage, ConditioningCombine, ConditioningConcat, ConditioningSetArea, ConditioningZeroOut

BOTH = pytest.mark.parametrize("prediction", [EPS, FLOW])


def sigmas_of(prediction: str, steps: int, scheduler: str = "simple") -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(dit(prediction).get_model_object("model_sampling"), scheduler, steps)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_the_hosts_noise_levels_are_dits() -> None:
    sampling = dit(EPS).get_model_object("model_sampling")
    torch.testing.assert_close(sampling.sigmas.double(), eps_log_sigmas().exp(), rtol=1e-5, atol=0)
    assert 156 < float(sampling.sigma_max) < 158


@BOTH
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_class_through_the_hosts_sampler_is_the_picture_of_plain_torch(prediction: str, cfg: float) -> None:
    expected = euler(config(prediction), sigmas_of(prediction, 6), 3, cfg, batch=2)
    close(sample(dit(prediction), 6, cfg, batch=2), expected)
    assert expected.std() > 0.1 and (expected - euler(config(prediction), sigmas_of(prediction, 6), 4, cfg, batch=2)).abs().max() > 0.1 * expected.std()


@BOTH
@pytest.mark.parametrize("sampler, scheduler", [("dpmpp_2m", "karras"), ("uni_pc", "simple"), ("ddim", "ddim_uniform"), ("dpmpp_2m_sde", "beta")])
def test_the_stock_samplers_and_schedules_run(prediction: str, sampler: str, scheduler: str) -> None:
    expected = euler(config(prediction), sigmas_of(prediction, 6, scheduler), 3, 2.0)
    found = sample(dit(prediction), 6, 2.0, sampler, scheduler=scheduler)
    assert found.isfinite().all() and 0.3 < found.std() / expected.std() < 3
    if sampler == "ddim":
        close(found, expected)  # the same steps


def test_cond_and_uncond_run_in_one_batch() -> None:
    seen: list[list[int]] = []
    hook = transformer(dit()).y_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    sample(dit(), 1, 4.0, batch=2)
    hook.remove()
    assert seen == [[CLASSES, CLASSES, 3, 3]]


@BOTH
def test_guidance_on_three_channels_is_the_authors(prediction: str) -> None:
    sigmas = sigmas_of(prediction, 4)
    guided = guide_three(dit(prediction))
    close(sample(guided, 4, 4.0, batch=2), euler(config(prediction), sigmas, 3, 4.0, channels=3, batch=2))
    assert (euler(config(prediction), sigmas, 3, 4.0, channels=3) - euler(config(prediction), sigmas, 3, 4.0)).abs().max() > 0.1
    assert torch.equal(sample(guided, 2), sample(dit(prediction), 2))  # at cfg 1 there is nothing to guide


def test_another_node_in_the_place_of_the_guidance_is_refused_by_name() -> None:
    rescaled, = RescaleCFG().patch(guide_three(dit()), 0.7)
    with pytest.raises(ValueError, match=r'RescaleCFG also sets how cfg is computed.*set guidance_channels to "all"\.$'):
        sample(rescaled, 1, 4.0)
    wrapped = guide_three(dit())
    wrapped.set_model_sampler_cfg_function(lambda cond, uncond, scale: cond)  # old style: the host wraps it
    with pytest.raises(ValueError, match="another node also sets how cfg is computed"):
        sample(wrapped, 1, 4.0)
    rescaled, = RescaleCFG().patch(dit(), 0.7)
    assert sample(rescaled, 1, 4.0).isfinite().all()


def guided_by(guider: comfy.samplers.CFGGuider) -> torch.Tensor:
    """What SamplerCustomAdvanced does."""
    latent = {"samples": torch.zeros(1, 4, SIDE, SIDE)}
    return custom.SamplerCustomAdvanced.execute(custom.Noise_RandomNoise(5), guider, comfy.samplers.sampler_object("euler"), sigmas_of(EPS, 4), latent).result[0]["samples"]


GUIDERS = {
    "PerpNeg": lambda model: PerpNegGuider.execute(model, conditioning(3), conditioning(4), conditioning(None), 4.0, 1.0),
    "DualCFG": lambda model: custom.DualCFGGuider.execute(model, conditioning(3), conditioning(4), conditioning(None), 4.0, 2.0, "regular"),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_a_guider_that_computes_cfg_itself_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf'^DyDiT Checkpoint Loader: the guider {name} computes cfg itself, .* or set guidance_channels to "all"\.$'):
        guided_by(GUIDERS[name](guide_three(dit())).result[0])
    assert guided_by(GUIDERS[name](dit()).result[0]).isfinite().all()


def test_guiders_that_leave_cfg_to_the_host_are_the_authors() -> None:
    """Two models, and two scales for what has one, end in the same function."""
    guided, labels = guide_three(dit()), (conditioning(3), conditioning(None))
    expected = euler(config(), sigmas_of(EPS, 4), 3, 4.0, channels=3)
    for guider in (custom.CFGGuider.execute(guided, *labels, 4.0), custom.DualModelGuider.execute(guided, labels[0], 4.0, guided, labels[1]),
                   LTXVDualCFGGuider.execute(guided, *labels, 4.0, 4.0)):
        close(guided_by(guider.result[0]), expected)
    basic = custom.BasicGuider.execute(guided, labels[0]).result[0]
    close(guided_by(basic), euler(config(), sigmas_of(EPS, 4), 3))


def test_a_guider_of_another_pack() -> None:
    """It is refused where it leaves the host's function out, and goes through where it ends there."""
    class Own(comfy.samplers.CFGGuider):
        def predict_noise(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            return x

    class Scheduled(comfy.samplers.CFGGuider):
        def predict_noise(self, *args: object, **kwargs: object) -> torch.Tensor:
            self.set_cfg(4.0)
            return super().predict_noise(*args, **kwargs)

    own, scheduled = (kind(guide_three(dit())) for kind in (Own, Scheduled))
    for guider in (own, scheduled):
        guider.set_conds(conditioning(3), conditioning(None))
    with pytest.raises(ValueError, match="the guider Own computes cfg itself"):
        guided_by(own)
    close(guided_by(scheduled), euler(config(), sigmas_of(EPS, 4), 3, 4.0, channels=3))


def test_no_class_is_what_zero_out_makes_of_one() -> None:
    zeroed, = ConditioningZeroOut().zero_out(conditioning(3))
    assert torch.equal(sample(dit(), 2, 4.0, negative=zeroed), sample(dit(), 2, 4.0))


def test_an_average_of_one_class_alone_is_that_class() -> None:
    for mixed in (average(3, 3, 0.7), average(3, 5, 1.0), average(5, 3, 0.0)):
        assert torch.equal(sample(dit(), 1, positive=mixed), sample(dit(), 1))


def test_combined_classes_are_drawn_as_the_mean_of_what_they_say() -> None:
    both, = ConditioningCombine().combine(conditioning(2), conditioning(4))
    close(sample(dit(), 1, positive=both), (sample(dit(), 1, label=2) + sample(dit(), 1, label=4)) / 2)


def lora_of(shape: object, strength: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A LoRA for every layer of the blocks, under the names of files in general, and the weights it makes."""
    generator, lora, merged = torch.Generator().manual_seed(1), {}, dict(network(shape).state_dict())
    for name, layer in network(shape).named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith("blocks"):
            down, up = torch.randn(2, layer.in_features, generator=generator), torch.randn(layer.out_features, 2, generator=generator)
            lora |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
            merged[f"{name}.weight"] = layer.weight + strength * up @ down
    return lora, merged


@pytest.mark.parametrize("left_out", [False, True], ids=["merged", "at each use"])
def test_a_lora(left_out: bool) -> None:
    lora, merged = lora_of(config(), 0.01)
    expected = sample(dit_model(config(), merged), 4, 2.0)
    assert (expected - sample(dit(), 4, 2.0)).abs().max() > 0.1 * expected.std()
    with nothing_fits() if left_out else nullcontext():
        model = comfy.sd.load_lora_for_models(load_dit(config()), None, lora, 0.01, 0)[0]
        found = sample(model, 4, 2.0)
        assert bool(transformer(model).blocks[0].attn.qkv.weight_function) == left_out
    close(found, expected)


def test_weights_that_do_not_fit() -> None:
    with nothing_fits():
        model = load_dit(config())
        found = sample(model, 4, 2.0)
        assert transformer(model).blocks[0].mlp.fc1.comfy_cast_weights
    close(found, sample(dit(), 4, 2.0))


def test_weights_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the host stores them with --fp8_e4m3fn-unet; what is looked up keeps its precision."""
    monkeypatch.setattr(comfy.model_management.args, "fp8_e4m3fn_unet", True)
    model = load_dit(config())
    assert transformer(model).blocks[0].mlp.fc1.weight.dtype == torch.float8_e4m3fn and transformer(model).pos_embed.dtype == torch.float32
    looked_up = ("pos_embed", "y_embedder.embedding_table.weight")
    rounded = {key: value if key in looked_up else value.to(torch.float8_e4m3fn).float() for key, value in network(config()).state_dict().items()}
    found = sample(model, 4, 2.0)
    monkeypatch.undo()
    model.set_model_compute_dtype(torch.float32)
    close(sample(model, 4, 2.0), sample(dit_model(config(), rounded), 4, 2.0))
    assert found.isfinite().all()


def test_a_copy_of_the_hosts_own() -> None:
    """Where the host wants one, it asks the loader."""
    model = load_dit(config())
    model.cached_patcher_init = (load_dit, (config(),))
    close(sample(model.clone(disable_dynamic=True, force_deepcopy=True), 2), sample(dit(), 2))


def test_the_schedule_can_be_shifted() -> None:
    """By the nodes that count time in thousands, and in ones."""
    for node, multiplier in ((ModelSamplingSD3, 1000), (ModelSamplingAuraFlow, 1.0)):
        shifted = (node().patch_aura if multiplier == 1.0 else node().patch)(dit(FLOW), 3.0)[0]
        sigmas = comfy.samplers.calculate_sigmas(shifted.get_model_object("model_sampling"), "simple", 4)
        assert sigmas[2] > 0.7 and shifted.get_model_object("model_sampling").multiplier == multiplier
        close(sample(shifted, 4), euler(config(FLOW), sigmas, 3))


def test_another_size() -> None:
    with pytest.raises(ValueError, match="made for pictures of 128×128, and is asked for one of 192×128, the size of the latent or of a prompt's area; make it 128×128, or turn on interpolate"):
        sample(dit(), 1, side=(SIDE, 24))
    area, = ConditioningSetArea().append(conditioning(3), 64, 64, 0, 0, 1.0)
    with pytest.raises(ValueError, match="is asked for one of 64×64, the size of the latent or of a prompt's area; make it 128×128"):
        sample(dit(), 1, positive=area)
    model = load_dit(config(), interpolate=True)
    assert sample(model, 2, side=(SIDE, 24)).shape == (1, 4, SIDE, 24)
    close(sample(model, 2), sample(dit(), 2))


def average(one: int | None, other: int | None, strength: float) -> list:
    return ConditioningAverage().addWeighted(conditioning(one), conditioning(other), strength)[0]


_MIXED = r"draws one class at a time, and another node mixed two; take Conditioning Average or Concat out\.$"
REFUSED = {
    "a prompt": (lambda: [[torch.zeros(1, 77, 768), {}]], r"draws classes and no prompts, and positive has a prompt; connect DyDiT Class Label there\.$"),
    "an average": (lambda: average(2, 5, 0.5), _MIXED),
    "an average that is a class's number": (lambda: average(2, 4, 0.5), _MIXED),
    "an average far from half": (lambda: average(9, 4, 0.8), _MIXED),
    "a class and none": (lambda: average(5, None, 0.5), _MIXED),
    "an average of names": (lambda: ConditioningAverage().addWeighted(conditioning(2, "thing 2"), conditioning(4, "thing 4"), 0.5)[0], _MIXED),
    "two in one": (lambda: ConditioningConcat().concat(conditioning(2), conditioning(5))[0], "one class at a time.*Concat"),
    "too large": (lambda: conditioning(CLASSES), r"number is 10, and this DiT-64×3/2 has classes 0 to 9\.$"),
    "of other classes": (lambda: conditioning(7, "cock"), r'"cock" is no class of this DiT-64×3/2, which has 10 classes \(thing 0, thing 1, .*choose one of them, or give its number\.$'),
}


@pytest.mark.parametrize("what", REFUSED)
def test_conditioning_that_is_no_class_of_the_model(what: str) -> None:
    make, sentence = REFUSED[what]
    with pytest.raises(ValueError, match=sentence):
        sample(dit(), 1, positive=make())


def test_classes_of_a_model_that_names_none() -> None:
    few, many = load_dit(config()), load_dit(config(classes=1000))
    with pytest.raises(ValueError, match='"cock" is no class of this .* 10 classes without names; choose by number'):
        sample(few, 1, positive=conditioning(7, "cock"))
    assert torch.equal(sample(few, 1, positive=conditioning(3)), sample(dit(), 1, positive=conditioning(3, "thing 3")))
    assert sample(many, 1, positive=conditioning(7, "cock")).isfinite().all()


def test_a_network_for_other_latents_is_refused() -> None:
    with pytest.raises(ValueError, match="draws in 16 channels, and ComfyUI's latents for it have 4"):
        load_dit(config(in_channels=16))


def test_a_controlnet_is_refused() -> None:
    with pytest.raises(ValueError, match="has no ControlNets"):
        transformer(dit())(torch.zeros(1, 4, SIDE, SIDE), torch.zeros(1), torch.zeros(1, dtype=torch.long), control={"input": []})


PATCHED = {
    "slg": (lambda: SkipLayerGuidanceDiT.execute(dit(), 3.0, 0.0, 1.0, "1", "1, 2"), "dit double_block, dit single_block"),
    "slg simple": (lambda: SkipLayerGuidanceDiTSimple.execute(dit(), 0.0, 1.0, "", "1"), "dit single_block"),
    "pag": (lambda: PerturbedAttentionGuidance.execute(dit(), 3.0), "attn1 middle"),
    "nag": (lambda: NAGuidance.execute(dit(), 5.0, 0.25, 2.5), "attn1_output_patch"),
    "downscale": (lambda: PatchModelAddDownscale.execute(dit(), 3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic"), "input_block_patch_after_skip, output_block_patch"),
    "rope": (lambda: ScaleROPE.execute(dit(), 2.0, 0.0, 2.0, 0.0, 1.0, 0.0), "rope_options"),
    "hypertile": (lambda: HyperTile.execute(dit(), 256, 2, 0, False), "attn1_patch, attn1_output_patch"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("what", PATCHED)
def test_patches_that_would_change_nothing_are_refused(what: str, compiled: bool) -> None:
    make, names = PATCHED[what]
    made = make()
    model = (made if isinstance(made, tuple) else made.result)[0]
    if compiled:
        set_torch_compile_wrapper(model=model, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    with pytest.raises(ValueError, match=rf"^This DiT-64×3/2 has no place for patches .* \({names}\); take that node out \(Skip Layer Guidance, .*\)\.$"):
        sample(model, 3, 4.0)
    torch._dynamo.reset()


def test_guidance_in_a_pass_of_its_own_is_refused_beside_a_budget_too() -> None:
    for model in (SkipLayerGuidanceDiT.execute(dit(), 3.0, 0.0, 1.0, "", "1").result[0], PerturbedAttentionGuidance.execute(dit(), 3.0).result[0]):
        with pytest.raises(ValueError, match="has no place for patches"):
            sample(budgeted(model, 0.6), 3, 4.0)


@pytest.mark.parametrize("node", [APG, CFGZeroStar, FreSca, Mahiro, DifferentialDiffusion])
def test_nodes_without_patches_go_through(node: type) -> None:
    inputs = {APG: (1.0, 5.0, 0.0), FreSca: (1.0, 1.25, 4)}.get(node, ())
    model = node.execute(dit(), *inputs).result[0]
    assert sample(model, 2, 4.0).isfinite().all() and sample(budgeted(model, 0.6), 2, 4.0).isfinite().all()


def test_a_wrapper_around_the_network_is_called() -> None:
    """Stock EasyCache works there."""
    seen: list[tuple] = []
    model = dit().clone()

    def around(executor, x, *args, **kwargs):
        seen.append(tuple(x.shape))
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", around)
    assert torch.equal(sample(model, 2), sample(dit(), 2)) and seen == [(1, 4, SIDE, SIDE)] * 2
    cached = EasyCacheNode.execute(dit(), 0.2, 0.0, 1.0, False).result[0]
    assert sample(cached, 8).isfinite().all()
