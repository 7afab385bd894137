"""`bench quality`: what each method keeps of the dense picture or video, on held-out prompts of the demo model or on classes of its relatives.

Every row starts from the same noise. PSNR is to the dense picture or video of the same number of steps; "fewer steps" is what
an artist gets for at most the same FLOPs without any of this, and "another seed" is the scale's zero.

With --out the rows are kept in a folder beside the tables (NAME.cache), and the same command continues where it was
stopped; what another prompt count, cfg, type, batch or weight file decides is measured anew. After a change of the code
that draws or measures, delete that folder.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..checkpoints.files import FileError
from ..demo.files import WEIGHTS
from .class_lab import ClassLab
from .judge import Judge, Measured, PictureJudge, VideoJudge
from .lab import CLASSES, PROMPTS, VIDEOS, Lab, Settings, Shot
from .lineup import Job, class_lineup, lineup
from .quality_page import Row, markdown, plots, title
from .report import machine
from .results import Results
from .video_lab import VideoLab

BUDGETS = (0.9, 0.75, 0.5, 0.35)
STEPS = {PROMPTS: (4, 8, 20), CLASSES: (4, 8, 20), VIDEOS: (8, 20)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--of", choices=(PROMPTS, CLASSES, VIDEOS), default=PROMPTS,
                        help="prompts: the demo model and its few-step twin; classes: the small DyDiT and DySiT; videos: the small Latte "
                        "(default prompts)")
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts, or pictures or videos of classes in turn (default 256)")
    parser.add_argument("--steps", type=int, nargs="+", help="sampling steps, one table each (default 4 8 20, of videos 8 20)")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), help="budgets (default 0.9 0.75 0.5 0.35)")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale (default 1, the way of FLUX)")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16, dense and ours alike: faster on a CPU that has it")
    parser.add_argument("--batch", type=int, default=16, help="prompts sampled together (default 16)")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name has one of these in it, beside dense (default: all)")
    parser.add_argument("--adapter", type=_named, action="append", default=[], metavar="NAME=FILE", help="rows for one more adapter; repeatable")
    parser.add_argument("--twin-adapter", type=_named, action="append", default=[], metavar="NAME=FILE",
                        help="the same for an adapter of the few-step twin, in its table alone")
    parser.add_argument("--processes", type=int, default=1,
                        help="rows measured at a time, each on one thread (default 1, on all threads); seconds are only taken with 1")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the demo's weights; its table is made where the few-step twin is there")
    parser.add_argument("--out", type=Path, help="write the tables as Markdown here, with their plots beside; what is measured is kept")


def _named(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if not name or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not NAME=FILE with a file that is there")
    return name, Path(file)


def run(args: argparse.Namespace) -> None:
    if args.of != VIDEOS and find_spec("torchmetrics") is None:
        raise SystemExit('bench quality needs torchmetrics: pip install -e ".[bench]"')
    with _folder(args.out) as folder:
        settings = Settings(folder, args.prompts, args.cfg, args.bfloat16, args.batch, args.weights, dict(args.adapter),
                            dict(args.twin_adapter), args.processes == 1, args.of)
        try:
            judge = _judge_of(settings)
            line = lineup if args.of == PROMPTS else class_lineup
            rows = collect(judge, line(judge.lab, args.steps or STEPS[args.of], args.budgets, args.only), args.processes)
        except FileError as error:
            raise SystemExit(str(error)) from None
        except KeyboardInterrupt:
            raise SystemExit("Stopped. With --out the same command goes on from here.") from None
    text = markdown(rows, settings, machine(torch.device("cpu")))
    print("\n" + text)
    if args.out:
        args.out.write_text(text)
        for name, picture in plots(rows).items():
            picture.save(args.out.with_name(name))


def _judge_of(settings: Settings) -> Judge:
    if settings.of == VIDEOS:
        return VideoJudge(VideoLab(settings))
    return PictureJudge(Lab(settings) if settings.of == PROMPTS else ClassLab(settings))


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where measurements and dense pictures are kept."""
    if out is not None:
        yield out.with_suffix(".cache")
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


def collect(judge: Judge, jobs: Sequence[Job], processes: int = 1) -> list[Row]:
    """The rows of `jobs`; measures those that were not kept, and keeps each as soon as it is measured."""
    results = Results(judge.lab.settings.folder / "rows.json")
    of_pair = {(job.shot, job.reference): job for job in reversed(jobs)}
    pairs = list(dict.fromkeys((job.shot, job.reference) for job in jobs))
    missing = [pair for pair in pairs if results.get(judge.key(*pair)) is None]
    dense = list(dict.fromkeys(shot for pair in missing for shot in reversed(pair) if shot.is_dense))
    print(f"{len(pairs) - len(missing)} of {len(pairs)} rows are there", flush=True)
    with _workers(judge, processes) as work:
        for number, _ in enumerate(work(_take, dense), 1):
            print(f"dense pictures {number} / {len(dense)}", flush=True)
        for number, (pair, measured) in enumerate(work(_measure, missing), 1):
            results.put(judge.key(*pair), measured)
            print(f"{number:>4} / {len(missing)}  {_line(of_pair[pair], measured)}", flush=True)
    return [Row(job, results.get(judge.key(job.shot, job.reference))) for job in jobs]


Pair = tuple[Shot, Shot]
Work = Callable[[Judge, Any], Any]


def _take(judge: Judge, shot: Shot) -> None:
    """Leave dense latents on disk."""
    judge.lab.take(shot)


def _measure(judge: Judge, pair: Pair) -> tuple[Pair, Measured]:
    return pair, judge.measure(*pair)


@contextmanager
def _workers(judge: Judge, processes: int) -> Iterator[Callable[[Work, list], Iterator]]:
    """Maps work over items: here, or in processes of one thread each that have a judge of their own."""
    if processes == 1:
        yield lambda work, items: (work(judge, item) for item in items)
        return
    with torch.multiprocessing.get_context("spawn").Pool(processes, _start, (judge.lab.settings,)) as pool:
        yield lambda work, items: pool.imap_unordered(partial(_in_process, work), items)


_judge: Judge | None = None


def _start(settings: Settings) -> None:
    global _judge
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    torch.set_num_threads(1)
    _judge = _judge_of(settings)


def _in_process(work: Work, item: Any) -> Any:
    return work(_judge, item)


def _line(job: Job, measured: Measured) -> str:
    psnr = f"{measured.psnr:6.2f}" if measured.psnr is not None else "  same"
    fid = "" if measured.fid is None else f"  scene-FID {measured.fid:6.2f}"
    return (f"{title(job.table):<24} asked {job.asked:.2f}  spent {measured.spent:.3f}  {job.name:<30} PSNR {psnr}  SSIM {measured.ssim:.4f}  "
            f"accuracy {measured.accuracy:.3f}{fid}")
