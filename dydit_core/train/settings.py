"""What a training is told, by flags and by a TOML file whose keys are the flags' names; a flag counts more than the file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoints.files import bad
from .kinds import KINDS

DEMO, FLUX_DEV = "demo", "flux-dev"
# Where nothing is said, for the demo and for all other bases: the demo is small, and a large base has to fit a 24 GB card.
_DEMO_DEFAULTS = {"width": 256, "height": 256, "steps": 1000, "batch": 16, "group": 8, "window": 3, "runs": 96, "checkpointing": False}
_OTHER_DEFAULTS = {"width": 512, "height": 512, "steps": 600, "batch": 8, "group": 4, "window": 2, "runs": 32, "checkpointing": True}


class SettingError(ValueError):
    """One sentence: which flag or key, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Form:
    """What a setting takes, in words, and how it is made of what a flag (a text) or TOML gives; ValueError or TypeError where not."""

    words: str
    make: Callable[[Any], Any]


def _whole(low: int, high: int | None = None) -> Form:
    def make(value: Any) -> int:
        if isinstance(value, (bool, float)) or int(value) < low or (high is not None and int(value) > high):
            raise ValueError
        return int(value)

    return Form(f"a whole number from {low} " + ("up" if high is None else f"to {high}"), make)


def _number(low: float, high: float) -> Form:
    def make(value: Any) -> float:
        if isinstance(value, bool) or not low <= float(value) <= high:
            raise ValueError
        return float(value)

    return Form(f"a number from {low:g} to {high:g}", make)


def _one_of(*words: str) -> Form:
    return Form(f"one of {', '.join(words)}", lambda value: words[words.index(value)])


def _checked(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


_TEXT = Form("a text in quotes", partial(_checked, str))
_WORD = Form("numbers or names of classes", lambda value: str(value))
_PATH = Form("a path in quotes", lambda value: Path(_checked(str, value)).expanduser())
_SWITCH = Form("true or false", partial(_checked, bool))


def _option(form: Form, help: str, default: Any = MISSING, many: bool = False) -> Any:
    return field(**({} if default is MISSING else {"default": default}), metadata={"form": form, "help": help, "many": many})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting; `field(metadata)` has what it takes and what it means."""

    base: str = _option(_TEXT, 'what is trained for: "demo", or a FLUX, DiT, SiT or Latte in a .safetensors; "flux-dev": --dry-run without a file', DEMO)
    lora: Path | None = _option(_PATH, "a LoRA to merge into the base first, in the layout of this pack's own", None)
    prompts: Path | None = _option(_PATH, "demo: a text file, one prompt a line (without it: the captions it was trained on)", None)
    images: Path | None = _option(_PATH, "demo: a folder of pictures, each with its caption in a .txt of the same name", None)
    examples: Path | None = _option(_PATH, "other FLUXes: encoded prompts, and perhaps latents, of the DyDiT Save Examples node", None)
    classes: tuple[str, ...] | None = _option(_WORD, "DiT, SiT and Latte: classes to learn from, by number or name (without it: all)", None, many=True)
    work: Path = _option(_PATH, "folder of this training, from which the same command goes on", Path("dydit_training"))
    out: Path | None = _option(_PATH, "where a copy of the finished adapter goes, for example ComfyUI/models/dydit/mine.safetensors", None)
    kind: str = _option(_one_of(*KINDS), f"what the adapter has: {', '.join(KINDS)}", "tokens")
    substitute: str = _option(_one_of("reuse", "nothing"), "what stands in for a skipped token: reuse or nothing", "reuse")
    budgets: tuple[float, ...] = _option(_number(0.05, 0.99), "budgets to train, shares of the blocks' FLOPs", (0.4, 0.5, 0.6, 0.75, 0.9),
                                         many=True)
    sampling_steps: tuple[int, ...] = _option(_whole(2), "numbers of sampling steps to train for", (4, 8, 20, 28), many=True)
    steps: int = _option(_whole(1), "training steps")
    batch: int = _option(_whole(1), "evaluations (windows of them) a training step, a multiple of --group")
    group: int = _option(_whole(1), "how many of them are in memory at once, under one budget")
    window: int = _option(_whole(1), "sampling steps in a row that an error is followed through")
    rate: float = _option(_number(1e-7, 1.0), "learning rate", 6e-3)
    align: float = _option(_number(0.0, 100.0), "weight of the features of every block beside the velocity's; above 0, a dense evaluation more for each", 0.0)
    runs: int = _option(_whole(1), "dense runs to learn from, for each number of sampling steps")
    cfg: tuple[float, ...] = _option(_number(1.0, 100.0), "guidance by a second evaluation: one scale, or a lowest and a highest (1: none)",
                                     (1.0,), many=True)
    guidance: float = _option(_number(0.0, 100.0), "guidance of models that have an input for it (FLUX.1-dev)", 3.5)
    shift: float | None = _option(_number(0.01, 100.0), "shift s of the sigmas, s·σ/(1 + (s − 1)·σ); without it 3.158 for models "
                                  "with a guidance input, else 1", None)
    width: int = _option(_whole(16), "pixels, a multiple of 16; latents have their own size, and so have DiT, SiT and Latte")
    height: int = _option(_whole(16), "pixels, a multiple of 16")
    seed: int = _option(_whole(0, 2**31 - 1), "of the noise, the gates and the order", 0)
    save_every: int = _option(_whole(1), "training steps between two saves; a kill costs the steps since the last", 50)
    grid_every: int = _option(_whole(0), "saves between two sheets of samples; 0: only at the end", 0)
    checkpointing: bool = _option(_SWITCH, "compute blocks twice instead of keeping what is in them")
    precision: str = _option(_one_of("bf16", "fp32"), "what products are made in: bf16 or fp32", "bf16")
    device: str = _option(_one_of("auto", "cpu", "cuda"), "auto (a GPU where there is one), cpu or cuda", "auto")
    title: str = _option(_TEXT, "the adapter's name; without it from the base and the kind", "")
    license: str = _option(_TEXT, "the adapter's licence, as its file says it", "")

    @property
    def demo(self) -> bool:
        """Whether it is for the demo."""
        return self.base == DEMO

    @property
    def base_file(self) -> Path:
        return Path(self.base).expanduser()


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One for each setting; those that are not given do not appear in the namespace."""
    for part in fields(Settings):
        many, switch = part.metadata["many"], part.metadata["form"] is _SWITCH
        extra = {"action": argparse.BooleanOptionalAction} if switch else {"nargs": "+"} if many else {}
        parser.add_argument(flag(part.name), default=argparse.SUPPRESS, help=_help(part), **extra)


def _help(part: Any) -> str:
    default = part.default
    if default is MISSING:
        default = f"{_DEMO_DEFAULTS[part.name]} for the demo, else {_OTHER_DEFAULTS[part.name]}"
    elif isinstance(default, tuple):
        default = " ".join(map(str, default))
    return part.metadata["help"] if default in (None, "") else f"{part.metadata['help']} (default {default})"


def read_settings(given: Mapping[str, Any], file: Path | None) -> Settings:
    """`given`: flags as the parser left them. Raises SettingError or FileError."""
    told = {name: (value, flag(name)) for name, value in given.items()}
    if file is not None:
        told = {name.replace("-", "_"): (value, f"{file.name}: {name}") for name, value in _toml(file).items()} | told
    parts = {part.name: part for part in fields(Settings)}
    values = {}
    for name, (value, source) in told.items():
        if name not in parts:
            raise SettingError(f"{source} is no setting; take it out, or see python -m dydit_core train --help for their names.")
        values[name] = _read(parts[name].metadata, value, source)
    defaults = _DEMO_DEFAULTS if values.get("base", DEMO) == DEMO else _OTHER_DEFAULTS
    settings = Settings(**{**defaults, **values})
    _check(settings)
    return settings


def _read(how: Mapping[str, Any], value: Any, source: str) -> Any:
    form = how["form"]
    try:
        if how["many"]:
            return tuple(map(form.make, value if isinstance(value, list) else [value]))
        return form.make(value)
    except (ValueError, TypeError):
        raise SettingError(f"{source} is {value!r}; it takes {form.words}.") from None


def _check(settings: Settings) -> None:
    for name in ("width", "height"):
        if getattr(settings, name) % 16:
            raise SettingError(f"{flag(name)} is {getattr(settings, name)}; take a multiple of 16.")
    if settings.batch % settings.group:
        raise SettingError(f"--batch is {settings.batch} and --group {settings.group}; take a batch that is a multiple of the group.")
    if len(settings.cfg) > 2 or settings.cfg[0] > settings.cfg[-1]:
        raise SettingError("--cfg takes one number, or the lowest and the highest in this order.")
    for name in ("budgets", "sampling_steps"):
        if not getattr(settings, name) or len(set(getattr(settings, name))) < len(getattr(settings, name)):
            raise SettingError(f"{flag(name)} has a number twice, or none; give each once.")
    if settings.out is not None and settings.out.suffix != ".safetensors":
        raise SettingError(f"--out is {settings.out}; give it a name that ends in .safetensors.")


def _toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        raise SettingError("TOML files need Python 3.11 or newer; give the same settings as flags.") from None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise bad(path, f"cannot be read ({error.strerror})", "give the path of your settings, or flags alone") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise bad(path, f"is no TOML ({error})", "write one setting a line, name = value, with texts in quotes") from None
