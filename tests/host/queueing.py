"""A prompt in API format, run by the host's own executor."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import inside  # noqa: F401 - first: makes the host importable

import execution


def queue(prompt: dict, **extra: object) -> None:
    """Raises AssertionError with what the host would show."""
    valid, error, outputs, errors = asyncio.run(execution.validate_prompt("p", prompt, None))
    assert valid, (error, errors)
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
    executor = execution.PromptExecutor(server, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
    executor.execute(prompt, "p", extra, outputs)
    # Without a client nothing is sent, but all is kept.
    failed = [data["exception_message"] for event, data in executor.status_messages if event == "execution_error"]
    assert not failed, failed[0].strip()
