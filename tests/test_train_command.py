"""`python -m dydit_core train`: runs that are killed, shared or stopped, and the adapter that comes out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from training import SMALL, train, write_base, write_examples

from dydit_core.budget import Plan
from dydit_core.checkpoints.adapter import load_adapter
from dydit_core.methods import resolve
from dydit_core.sampling import sample, sigmas
from dydit_core.standalone import Budgeted
from dydit_core.train import session
from dydit_core.train.bases import load_base, read_base
from dydit_core.train.casting import CastBackend
from dydit_core.train.examples import load_examples

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_base(folder / "tiny.safetensors")
    write_base(folder / "tiny_fp8.safetensors", torch.float8_e4m3fn)
    write_examples(folder / "prompts.safetensors")
    write_examples(folder / "latents.safetensors", latents=True)
    return folder


def flags(home: Path, work: str, *more: object) -> list[object]:
    return ["--base", home / "tiny.safetensors", "--examples", home / "prompts.safetensors", *SMALL, "--work", home / work, *more]


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The folder of a training that nothing interrupted."""
    train(*flags(home, "whole", "--out", home / "out/mine.safetensors", "--title", "Mine"))
    return home / "whole"


def losses(work: Path) -> list[float]:
    return torch.load(work / session.CHECKPOINT, weights_only=True)["losses"]


def started(arguments: list[object], **environment: str) -> subprocess.Popen:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "dydit_core", "train", *map(str, arguments)], env={**os.environ, **threads, **environment},
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_adapter_runs_at_half_the_flops(home: Path, whole: Path) -> None:
    adapter = load_adapter(home / "out/mine.safetensors")
    assert adapter.facts.title == "Mine" and adapter.facts.training["steps"] == 10 and adapter.facts.substitutes == ("reuse",)
    model, examples = load_base(read_base(home / "tiny.safetensors"), torch.device("cpu"), torch.float32), load_examples(home / "prompts.safetensors")
    _, _, method = resolve("learned tokens", "reuse", adapter.router)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with Budgeted(model, Plan(0.6), method, sigmas(8), backend=CastBackend()) as budgeted:
        latents = sample(budgeted, examples.given(torch.tensor([0])), noise, 8)
    assert budgeted.spent.achieved == pytest.approx(0.6, abs=0.02) and torch.isfinite(latents).all()


def test_a_folder_holds_curves_and_samples(whole: Path) -> None:
    for name in ("loss.png", "error.png", "samples_10.png"):
        colours = Image.open(whole / name).convert("RGB").getcolors(1 << 20)
        assert len(colours) > 50, name


def test_killed_at_any_moment_it_takes_the_same_steps(home: Path, whole: Path) -> None:
    work, arguments = home / "killed", flags(home, "killed")
    process = started(arguments)
    deadline = time.monotonic() + 240
    while not (work / session.CHECKPOINT).exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    taken = len(losses(work))
    assert 0 < taken < 10
    train(*arguments)
    assert losses(work) == losses(whole) and len(losses(whole)) == 10


def test_two_processes_take_the_steps_of_one(home: Path, whole: Path) -> None:
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    members = [started(flags(home, "two"), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port) for rank in range(2)]
    said = [member.communicate(timeout=300)[0] for member in members]
    assert [member.returncode for member in members] == [0, 0], said
    assert "2 processes" in said[0] and "step" not in said[1]
    torch.testing.assert_close(torch.tensor(losses(home / "two")), torch.tensor(losses(whole)), rtol=1e-4, atol=0)


def test_ctrl_c_keeps_every_step(home: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrives in the middle of a step; the handler of before is back afterwards."""
    step, before = session.train_step, signal.getsignal(signal.SIGINT)

    def interrupted(run: session.RouterRun, *rest: object) -> float:
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="Stopped; what is trained is kept in .*stopped, and the same command goes on"):
        patch.setattr(session, "train_step", interrupted)
        train(*flags(home, "stopped"))
    assert len(losses(home / "stopped")) == 5 and signal.getsignal(signal.SIGINT) is before
    train(*flags(home, "stopped"))
    assert losses(home / "stopped") == losses(whole)


@pytest.mark.parametrize("base, examples, kind", [("tiny", "latents", "tokens+widths"), ("tiny_fp8", "prompts", "tokens+widths+low-rank")])
def test_every_kind_trains(base: str, examples: str, kind: str, home: Path) -> None:
    """Pictures and prompts, fp8 weights in bfloat16 products."""
    work = home / f"{base}_{examples}"
    train("--base", home / f"{base}.safetensors", "--examples", home / f"{examples}.safetensors", *SMALL, "--kind", kind, "--work", work,
          "--steps", 2, "--precision", "bf16", "--cfg", 1, 3)
    adapter = load_adapter(work / session.ADAPTER)
    assert adapter.width is not None and (adapter.low_rank is not None) == kind.endswith("low-rank")
    assert all(map(torch.isfinite, map(torch.tensor, losses(work))))
