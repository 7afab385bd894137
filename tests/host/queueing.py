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
    failed: list[dict] = []
    server = SimpleNamespace(client_id=None, last_node_id=None,
                             send_sync=lambda event, data, *_: failed.append(data) if event == "execution_error" else None)
    execution.PromptExecutor(server, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0}).execute(prompt, "p", extra, outputs)
    assert not failed, failed[0]["exception_message"]
