"""What the widget can ask for: the runs of a node, the numbers of a run, and one map of it. Read-only.

Only what the store holds is answered. Unpacking goes on a thread, so that the server's loop never stands still, and a
few at a time: a client that asks for more at once is told to wait.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web
from server import PromptServer

from ..dydit_core import wire
from ..dydit_core.trace import Trace
from .events import STORE
from .training import last_event

AT_ONCE = 8
_free = threading.BoundedSemaphore(AT_ONCE)


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


async def _training(request: web.Request) -> web.Response:
    return web.json_response(last_event(request.query.get("node", ""), request.query.get("workflow", "")))


async def _summary(request: web.Request) -> web.Response:
    return await _answer(wire.summary, _trace(request))


async def _map(request: web.Request) -> web.Response:
    trace = _trace(request)
    step, block = (_number(request.match_info[name], name, "mean") for name in ("step", "block"))
    frame = _number(request.query.get("frame"), "frame", None)
    return await _answer(wire.one_map, trace, step, block, request.query.get("branch"), frame)


def _trace(request: web.Request) -> Trace:
    trace = STORE.get(request.match_info["run"])
    if trace is None:
        raise LookupError("This run is no longer kept: only the last 8 runs are. Run the graph again.")
    return trace


def _number(text: str | None, name: str, for_all: str | None) -> int | None:
    """None stands for all of them."""
    if text == for_all:
        return None
    try:
        return int(text)
    except ValueError:
        raise LookupError(f"A {name} is a number" + (f' or "{for_all}".' if for_all else ".")) from None


async def _answer(work: Callable[..., dict], *args: Any) -> web.Response:
    if not _free.acquire(blocking=False):
        return web.json_response({"error": f"{AT_ONCE} maps are being unpacked: ask again in a second."}, status=429,
                                 headers={"Retry-After": "1"})
    # Shielded: a client that goes away must not free a place whose thread still works.
    return web.json_response(await asyncio.shield(asyncio.to_thread(_freeing, work, *args)))


def _freeing(work: Callable[..., dict], *args: Any) -> dict:
    try:
        return work(*args)
    finally:
        _free.release()


def _not_found(handler: Callable) -> Callable:
    """LookupError says in a sentence what there is."""
    async def answer(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except LookupError as error:
            return web.json_response({"error": str(error)}, status=404)

    return answer


def add_routes() -> None:
    """Called once when the pack loads."""
    routes = PromptServer.instance.routes
    routes.get("/dydit/runs")(_runs)
    routes.get("/dydit/training")(_training)
    routes.get("/dydit/trace/{run}")(_not_found(_summary))
    routes.get("/dydit/trace/{run}/{step}/{block}")(_not_found(_map))
