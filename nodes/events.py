"""What the widget hears while sampling, and the store that its questions afterwards are answered from (see `routes`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from server import PromptServer

from ..dydit_core import wire
from ..dydit_core.trace import Evaluation, Trace, TraceStore

STORE = TraceStore()
_LIVE_INTERVAL = 0.1


@dataclass(frozen=True)
class Address:
    """Which node of which workflow an event is for."""

    node: str
    workflow: str = ""


def workflow_id(extra_pnginfo: dict | None) -> str:
    """Id of the workflow that a prompt came with; empty where it came without one."""
    return str(((extra_pnginfo or {}).get("workflow") or {}).get("id") or "")


def current_prompt() -> tuple[str, str]:
    """Ids of the prompt that is running and of its workflow."""
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    for _, prompt, _, extra, *_ in queue.currently_running.values() if queue is not None else ():
        return str(prompt), workflow_id((extra or {}).get("extra_pnginfo"))
    return "", ""


@dataclass(frozen=True)
class Status:
    """What the node says in words; `asked` and `achieved` are budgets (fractions of dense block FLOPs), `size` the tokens and
    batch rows of a forward.

    `state` is ready, running, done, interrupted or failed. `dropped`: evaluations that are in no map. `prompt`: id of the
    prompt that the run was part of, by which the host's history knows its pictures. `ignored`: a file's threshold decided
    what was spent, and not what was asked. `floor`: the least that such a run can spend.
    """

    run: str
    state: str
    lines: list[str]
    asked: float
    achieved: float | None = None
    seconds_per_step: float | None = None
    size: list[int] | None = None
    dropped: int = 0
    prompt: str = ""
    ignored: bool = False
    floor: float | None = None


def status_event(address: Address, status: Status) -> dict:
    return {"v": wire.VERSION, **asdict(address), **asdict(status)}


def step_event(address: Address, run: str, total: int, evaluation: Evaluation, blocks: Sequence[str]) -> dict:
    """One map, at most 64 × 64, and what each block of these names kept (see `wire.live`)."""
    return {"v": wire.VERSION, **asdict(address), "run": run, "total": total, **wire.live(evaluation, blocks)}


def send(kind: str, payload: dict) -> None:
    """To the browser that queued the prompt (to all where none is known); returns at once."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(kind, payload, server.client_id)


def keep_status(address: Address, state: str, lines: list[str], asked: float) -> None:
    """Say what ended before a run began, in place of the run before: also to a page that is loaded later."""
    run = f"{address.workflow or '-'}:{address.node or '-'}"  # one place in the store for each node
    event = status_event(address, Status(run, state, lines, asked))
    STORE.put(Trace(run, event, ()))
    send("dydit.status", event)


@dataclass
class LiveMap:
    """Sends maps as they come, at most ten a second; called on the recorder's thread. The first is always sent."""

    address: Address
    run: str
    total: int
    blocks: Sequence[str]
    _sent: float = field(default=float("-inf"))

    def __call__(self, evaluation: Evaluation) -> None:
        now = time.monotonic()
        if now - self._sent >= _LIVE_INTERVAL:
            self._sent = now
            total = max(self.total, evaluation.index + 1)
            send("dydit.step", step_event(self.address, self.run, total, evaluation, self.blocks))
