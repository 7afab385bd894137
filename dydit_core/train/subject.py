"""From settings to what a training works on: the base as teacher, its prompts and pictures or its classes, the job."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from ..checkpoints.dit import DiTFile
from ..checkpoints.files import bad
from ..demo.adapter import PROMPTS, demo_examples
from ..demo.codec import PATCH
from ..demo.files import BASE_FILE, VAE_FILE, WEIGHTS
from ..demo.material import painter, picture_examples, prompt_examples
from ..demo.vae import load_encoder
from ..models.dit import FLOW
from ..models.flux import FluxConfig
from ..sampling import sigmas
from .bases import GUIDED_SHIFT, PLAIN_SHIFT, PRECISIONS, add_lora, load_base, read_base, teacher_of
from .class_bases import check_settings, class_examples, class_teacher, find_class_base
from .examples import Examples, load_examples
from .kinds import KINDS
from .preview import Painter, false_colours
from .router import Recipe
from .session import Job
from .settings import FLUX_DEV, SettingError, Settings
from .teacher import Teacher


@dataclass(frozen=True)
class Subject:
    """`painter` and `note`: how latents are shown, and what is said under the dense ones; `things`: what the
    examples are."""

    teacher: Teacher
    examples: Examples
    job: Job
    painter: Painter
    note: str
    things: str = "prompts"


def prepare(settings: Settings, device: torch.device) -> Subject:
    """Raises SettingError or FileError."""
    if settings.base == FLUX_DEV:
        raise SettingError(f"--base {FLUX_DEV} is for --dry-run alone; to train, give the path of the model's .safetensors.")
    classes = None if settings.demo else find_class_base(settings.base_file)
    if classes is not None:
        return _of_classes(settings, classes, device)
    if settings.classes is not None:
        raise SettingError(f"--classes is for a DiT, SiT or Latte, and {settings.base_file.name} is none; take it out.")
    base = read_base(WEIGHTS / BASE_FILE if settings.demo else settings.base_file)
    examples = _examples(settings)
    _check(settings, base.config, examples)
    precision = PRECISIONS[settings.precision]
    # The demo was trained in single precision, and is small enough for it.
    model = load_base(base, device, torch.float32 if settings.demo else precision)
    if settings.lora is not None:
        add_lora(model, settings.lora)
    shift = shift_of(settings, base.config)
    teacher = teacher_of(model, precision, shift, settings.guidance, settings.checkpointing)
    size = latent_size(settings, base.config) if examples.latents is None else tuple(examples.latents.shape[1:])
    taught = {"shift": shift, "guidance": settings.guidance, "precision": settings.precision}
    job = _job(settings, size, "demo" if settings.demo else base.path.stem, taught)
    if settings.demo:
        return Subject(teacher, examples, job, painter(WEIGHTS / VAE_FILE), "")
    return Subject(teacher, examples, job, false_colours, "latents in false colours")


def _of_classes(settings: Settings, base: DiTFile, device: torch.device) -> Subject:
    check_settings(settings, base)
    examples = class_examples(base, settings.classes or ())
    teacher, taught = class_teacher(base, device, PRECISIONS[settings.precision], settings.checkpointing), {"precision": settings.precision}
    if base.config.prediction == FLOW:
        taught["shift"] = settings.shift or PLAIN_SHIFT
        teacher = replace(teacher, schedule=partial(sigmas, shift=taught["shift"]))
    job = _job(settings, base.config.latent_size, settings.base_file.stem, taught)
    things = "classes" if base.config.classes else "model without classes"
    return Subject(teacher, examples, job, false_colours, "latents in false colours", things)


def _job(settings: Settings, size: tuple[int, ...], name: str, taught: dict[str, str | float]) -> Job:
    words = KINDS[settings.kind].words
    return Job(recipe_of(settings), size, settings.title or f"{name}: {words}", words, settings.runs,
               (settings.cfg[0], settings.cfg[-1]), seed=settings.seed, license=settings.license, taught=taught)


def recipe_of(settings: Settings) -> Recipe:
    kind = KINDS[settings.kind]
    return Recipe(settings.steps, settings.batch, settings.group, settings.rate, (*settings.budgets, *([1.0] if kind.adds else [])),
                  settings.sampling_steps, settings.window, align=settings.align, reuse=settings.substitute == "reuse", **kind.parts)


def shift_of(settings: Settings, config: FluxConfig) -> float:
    return settings.shift or (GUIDED_SHIFT if config.guidance_embed else PLAIN_SHIFT)


def latent_size(settings: Settings, config: FluxConfig) -> tuple[int, int, int]:
    return config.in_channels, settings.height // PATCH, settings.width // PATCH


def _examples(settings: Settings) -> Examples:
    given = [name for name in ("prompts", "images", "examples") if getattr(settings, name) is not None]
    if len(given) > 1:
        raise SettingError(f"--{given[0]} and --{given[1]} are both given; take one of them.")
    if settings.examples is not None:
        return load_examples(settings.examples)
    if not settings.demo:
        said = f"--{given[0]} is for the demo, whose words are encoded here" if given else "No prompts are given"
        wanted = "give --examples the file that the DyDiT Save Examples node made of yours"
        raise SettingError(f"{said}; for {settings.base_file.name} {wanted}.")
    if settings.prompts is not None:
        return prompt_examples(settings.prompts)
    if settings.images is not None:
        return picture_examples(settings.images, (settings.width, settings.height), load_encoder(WEIGHTS / VAE_FILE))
    return demo_examples(PROMPTS)


def _check(settings: Settings, config: FluxConfig, examples: Examples) -> None:
    """That the examples are of this base. Raises FileError."""
    context, pooled = examples.conditioning
    sizes = {"prompts": (context.shape[2], config.context_in_dim), "pooled prompts": (pooled.shape[1], config.vec_in_dim)}
    if examples.latents is not None:
        sizes["latents"] = examples.latents.shape[1], config.in_channels
    for name, (here, wanted) in sizes.items():
        if here != wanted:
            raise bad(settings.examples, f"has {name} of {here} channels, and the base takes {wanted}",
                      "make it again with the text encoders and the VAE of this base")
    if examples.latents is not None and any(side % 2 for side in examples.latents.shape[2:]):
        raise bad(settings.examples, f"has latents of {examples.latents.shape[3]} × {examples.latents.shape[2]}",
                  "make it of pictures whose sides are multiples of 16 pixels")
