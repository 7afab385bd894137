"""What the widget hears: live events while sampling, and the trace route for everything else."""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import asdict, dataclass, field

import numpy as np
from aiohttp import web
from server import PromptServer

from ..dydit_core.trace import Evaluation, Trace, TraceStore

STORE = TraceStore()
_VERSION = 1
_LIVE_INTERVAL = 0.1


@dataclass(frozen=True)
class Address:
    """Which node of which workflow an event is for."""

    node: str
    workflow: str = ""


def workflow_id(extra_pnginfo: dict | None) -> str:
    """Id of the workflow that a prompt came with; empty where it came without one."""
    return str(((extra_pnginfo or {}).get("workflow") or {}).get("id") or "")


def current_workflow() -> str:
    """Id of the workflow whose prompt is running."""
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    for _, _, _, extra, *_ in queue.currently_running.values() if queue is not None else ():
        return workflow_id((extra or {}).get("extra_pnginfo"))
    return ""


@dataclass(frozen=True)
class Status:
    """What the node says in words; `asked` and `achieved` are budgets (fractions of dense block FLOPs), `size` the tokens and
    batch rows of a forward.

    `state` is ready, running, done, interrupted or failed.
    """

    run: str
    state: str
    lines: list[str]
    asked: float
    achieved: float | None = None
    seconds_per_step: float | None = None
    size: list[int] | None = None


def status_event(address: Address, status: Status) -> dict:
    return {"v": _VERSION, **asdict(address), **asdict(status)}


def step_event(address: Address, run: str, total: int, evaluation: Evaluation) -> dict:
    """One map, at most 64 × 64, as base64 of one byte per cell (255: computed in every block and branch).

    A cell is one token, or the mean of several where the picture's own `token_rows` × `token_cols` are more than that.
    """
    tokens = evaluation.mean_map()
    token_rows, token_cols = evaluation.grid
    grid = base64.b64encode(np.rint(tokens * 255).astype(np.uint8).tobytes()).decode()
    return {
        "v": _VERSION, **asdict(address), "run": run, "step": evaluation.index, "total": total,
        "sigma": evaluation.sigma, "rows": tokens.shape[0], "cols": tokens.shape[1], "grid": grid,
        "token_rows": token_rows, "token_cols": token_cols,
        "computed": evaluation.computed, "flops": evaluation.flops,
    }


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
    _sent: float = field(default=float("-inf"))

    def __call__(self, evaluation: Evaluation) -> None:
        now = time.monotonic()
        if now - self._sent >= _LIVE_INTERVAL:
            self._sent = now
            send("dydit.step", step_event(self.address, self.run, max(self.total, evaluation.index + 1), evaluation))


def _address(trace: Trace) -> Address:
    return Address(trace.facts["node"], trace.facts["workflow"])


def runs_of(node: str, workflow: str) -> list[dict]:
    """Status of the stored runs of a node, newest first; an empty `workflow` matches any.

    A run of a prompt that came without a workflow is nobody's history: it may have been another graph's node.
    """
    return [
        {**trace.facts, "evaluations": len(trace.evaluations)}
        for trace in STORE.newest_first()
        if trace.facts["node"] == node and workflow in ("", trace.facts["workflow"])
    ]


async def _runs(request: web.Request) -> web.Response:
    return web.json_response({"runs": runs_of(request.query.get("node", ""), request.query.get("workflow", ""))})


def _frames(trace: Trace) -> list[dict]:
    total = len(trace.evaluations)
    return [step_event(_address(trace), trace.run, total, evaluation) for evaluation in trace.evaluations]


async def _trace(request: web.Request) -> web.Response:
    trace = STORE.get(request.match_info["run"])
    if trace is None:
        return web.json_response({"error": "This run is no longer kept: only the last 8 runs are. Run the graph again."}, status=404)
    # A long run of a large model takes a quarter of a second to unpack; the server's loop must not stand still for it.
    frames = await asyncio.to_thread(_frames, trace)
    return web.json_response({**trace.facts, "frames": frames})


def add_routes() -> None:
    """Register the read-only routes; called once when the pack loads."""
    routes = PromptServer.instance.routes
    routes.get("/dydit/runs")(_runs)
    routes.get("/dydit/trace/{run}")(_trace)
