"""Settings of the train command, and every mistake in one sentence."""

from __future__ import annotations

import resource
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from training import SMALL, train, write_base, write_examples

from dydit_core.checkpoints.adapter import load_adapter
from dydit_core.lora import LoRA, save_lora
from dydit_core.train import session
from dydit_core.train.settings import SettingError, Settings, flag, read_settings

ROOT = Path(__file__).parents[1]
needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads no TOML")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, prompts and a finished training."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_base(folder / "tiny.safetensors")
    write_base(folder / "fp8.safetensors", torch.float8_e4m3fn)
    write_examples(folder / "prompts.safetensors")
    train(*run(folder))
    return folder


def run(home: Path, *more: object) -> list[object]:
    return ["--base", home / "tiny.safetensors", "--examples", home / "prompts.safetensors", *SMALL, "--steps", 2, "--work", home / "work", *more]


@needs_toml
def test_flags_count_more_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('base = "demo"\nsteps = 7\nbudgets = [0.5, 0.9]\nsampling-steps = 8\ncheckpointing = true\ncfg = [1, 3]\n')
    settings = read_settings({"steps": "9", "runs": "5"}, file)
    assert (settings.steps, settings.runs, settings.budgets, settings.sampling_steps) == (9, 5, (0.5, 0.9), (8,))
    assert settings.checkpointing is True and settings.cfg == (1.0, 3.0) and settings.width == 256
    other = read_settings({"base": "flux.safetensors"}, None)
    assert (other.width, other.group, other.checkpointing) == (512, 4, True)


@needs_toml
def test_the_settings_for_flux_dev_can_be_read() -> None:
    settings = read_settings({}, ROOT / "docs/train_flux_dev.toml")
    assert settings.base.endswith(".safetensors") and settings.checkpointing


def test_the_page_explains_every_setting() -> None:
    page = (ROOT / "docs/train.md").read_text()
    missing = [part.name for part in fields(Settings) if f"| `{part.name.replace('_', '-')}` |" not in page]
    assert not missing, missing


@needs_toml
@pytest.mark.parametrize("text, sentence", [
    ("stepz = 3", "my.toml: stepz is no setting; take it out"),
    ("steps = 1.5", "my.toml: steps is 1.5; it takes a whole number from 1 up."),
    ('rate = "fast"', "my.toml: rate is 'fast'; it takes a number from 1e-07 to 1."),
    ("checkpointing = 1", "my.toml: checkpointing is 1; it takes true or false."),
    ('kind = "all"', "my.toml: kind is 'all'; it takes one of tokens, "),
    ("budgets = [0.5, 2]", "my.toml: budgets is [0.5, 2]; it takes a number from 0.05 to 0.99."),
    ("budgets = [0.5, 0.5]", "--budgets has a number twice"),
    ("width = 100", "--width is 100; take a multiple of 16."),
    ("batch = 9", "take a batch that is a multiple of the group."),
    ("cfg = [3, 1]", "--cfg takes one number, or the lowest and the highest"),
    ('out = "mine.pt"', "--out is mine.pt; give it a name that ends in .safetensors."),
    ("steps 3", "my.toml is no TOML ("),
])
def test_a_wrong_setting_is_told(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        read_settings({}, file)
    assert sentence in str(error.value) and str(error.value).endswith(".")


def test_a_wrong_flag_is_told() -> None:
    with pytest.raises(SettingError, match="^--save-every is 'often'; it takes a whole number from 1 up.$"):
        read_settings({"save_every": "often"}, None)
    assert flag("save_every") == "--save-every"


def write_things(home: Path) -> None:
    save_file({"x": torch.zeros(1)}, home / "other.safetensors")
    torch.save({"x": torch.zeros(1)}, home / "base.pt")
    tensors = {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(1)}
    save_file(tensors, home / "lora.safetensors")
    save_lora(home / "ours.safetensors", LoRA({"single_blocks.0.linear1": (torch.zeros(2, 128), torch.zeros(896, 2))}), {})
    write_examples(home / "wide.safetensors", channels=6)
    for name in ("empty", "torn", "bare"):
        (home / name).mkdir(exist_ok=True)
    (home / "torn/a.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    (home / "torn/a.txt").write_text("a red house")
    Image.new("RGB", (40, 40)).save(home / "bare/b.png")
    (home / "words.txt").write_text("a red house\na purple dinosaur\n")
    (home / "nothing.txt").write_text("\n\n")


@pytest.mark.parametrize("flags, sentence", [
    ("--base {home}/tiny.safetensors", "No prompts are given; for tiny.safetensors give --examples the file"),
    ("--base {home}/tiny.safetensors --prompts {home}/words.txt", "--prompts is for the demo, whose words are encoded here; for tiny.safetensors"),
    ("--seed 99999999999999", "a whole number from 0 to 2147483647"),
    ("--base {home}/none.safetensors", "none.safetensors is not a file"),
    ("--base {home}/other.safetensors", "other.safetensors does not fit (This is not a FLUX file: the tensor img_in.weight is missing)"),
    ("--base {home}/base.pt", "base.pt is a PyTorch file"),
    ("--base flux-dev", "--base flux-dev is for --dry-run alone"),
    ("{base} --examples {home}/wide.safetensors", "wide.safetensors has prompts of 6 channels, and the base takes 8"),
    ("{base} --examples {home}/other.safetensors", "other.safetensors holds no encoded prompts"),
    ("{base} --examples {home}/prompts.safetensors --lora {home}/lora.safetensors", "lora.safetensors is a LoRA in another layout than --lora takes"),
    ("--base {home}/fp8.safetensors --examples {home}/prompts.safetensors --lora {home}/ours.safetensors", "cannot be merged into fp8 weights"),
    ("--prompts {home}/words.txt", "with words that the demo does not know (dinosaur)"),
    ("--prompts {home}/nothing.txt", "nothing.txt holds no prompts; write one prompt a line."),
    ("--prompts {home}/none.txt", "none.txt cannot be read (No such file or directory)"),
    ("--images {home}/torn", "a.png is no picture that can be read"),
    ("--images {home}/bare", "b.png has no caption; write one into"),
    ("--images {home}/empty", "empty holds no pictures"),
    ("--images {home}/bare --prompts {home}/words.txt", "--prompts and --images are both given; take one of them."),
    ("{base} --examples {home}/prompts.safetensors --work {home}/work --rate 0.01", "holds another training (it differs in: "),
    ("{base} --examples {home}/prompts.safetensors --work {home}/words.txt", "cannot be used (File exists); give --work and --out folders"),
    pytest.param("--device cuda", "--device is cuda, and PyTorch finds no GPU here",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
])
def test_a_mistake_is_one_sentence(flags: str, sentence: str, home: Path) -> None:
    write_things(home)
    base = f"--base {home}/tiny.safetensors"
    with pytest.raises(SystemExit) as error:
        train(*flags.format(home=home, base=base).split(), *([] if "--work" in flags else ["--work", home / "never"]))
    said = str(error.value).strip()
    assert sentence in said and said.endswith(".") and "\n" not in said
    assert not (home / "never").exists()


def kept(home: Path) -> tuple[list[float], bytes]:
    """Losses of the checkpoint, and the adapter."""
    state = torch.load(home / "work" / session.CHECKPOINT, weights_only=True)
    assert len(state["losses"]) == state["step"] == 2 and torch.isfinite(state["gauge"]).all()
    return state["losses"], (home / "work" / session.ADAPTER).read_bytes()


def failed(home: Path, sentence: str) -> None:
    """Two more steps fail with the sentence, and what was there is whole."""
    before = kept(home)
    with pytest.raises(SystemExit, match=sentence):
        train(*run(home, "--steps", 4, "--save-every", 1))
    assert kept(home) == before and not list((home / "work").glob("*.partial"))
    load_adapter(home / "work" / session.ADAPTER)


def test_a_full_disk_leaves_the_last_save(home: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        failed(home, "The disk is full: make room where .*work is; the last save there is whole")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_memory_leaves_the_last_save(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "train_step", lambda *_: torch.empty(2**60))
    failed(home, "Out of memory .--dry-run shows what is needed.: take a smaller --group, with which the same command goes on")


def test_a_loss_that_is_no_number_leaves_the_last_save(home: Path) -> None:
    for file in (home / "work/runs").glob("*_velocity.bin"):
        torch.from_file(str(file), shared=True, size=file.stat().st_size // 2, dtype=torch.float16).fill_(torch.nan)
    failed(home, "The loss of step 3 is nan; train with a lower rate .* and another --work folder; the adapter of the last save")
