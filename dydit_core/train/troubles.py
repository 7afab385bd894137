"""What can go wrong in a training, each in one sentence that says what to do; and how it is stopped from outside."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError

from ..checkpoints.files import FileError
from .router import Diverged
from .session import CHECKPOINT, OtherRun
from .settings import SettingError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of PyTorch's writer and of safetensors', which raise no OSError where the disk is full.
_FULL_WORDS = ("inline_container", "PytorchStreamWriter", "No space left", "File too large", "quota")
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def sentence(error: BaseException, work: Path) -> str | None:
    """What to tell about `error` in a training in the folder `work`; None for what is nobody's mistake but ours."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        if (work / CHECKPOINT).exists():
            return f"Stopped; what is trained is kept in {work}, and the same command goes on."
        return f"Stopped before the first step; dense runs that were made are in {work}, and the same command goes on." if work.exists() else "Stopped."
    if isinstance(error, Diverged):
        return f"{text.rstrip('.')} and another --work folder; the adapter of the last save in {work} is whole."
    if isinstance(error, (SettingError, FileError, OtherRun)):
        return text
    memory = isinstance(error, RuntimeError) and any(word in text for word in _MEMORY_WORDS)
    if memory or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return ("Out of memory (--dry-run shows what is needed): take a smaller --group, with which the same command goes on in "
                f"{work}; or begin in another --work with a smaller --width and --height or --window, with --checkpointing, or with the base in fp8.")
    full = isinstance(error, (RuntimeError, SafetensorError)) and any(word in text for word in _FULL_WORDS)
    if full or (isinstance(error, OSError) and error.errno in _FULL):
        return f"The disk is full: make room where {work} is; the last save there is whole, and the same command goes on from it."
    if isinstance(error, OSError):
        return f"{error.filename or work} cannot be used ({error.strerror or text}); give --work and --out folders that you may write to."
    return None


@contextmanager
def stopped_once() -> Iterator[None]:
    """Ctrl-C and SIGTERM both end what runs inside, once: launchers send one after the other, while it is being saved."""
    signals = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in signals]

    def stop(*_: object) -> NoReturn:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    try:
        for number in signals:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in zip(signals, before):
            signal.signal(number, handler)
