"""Running several things at once, all of them or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


async def all_or_none(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results in order. The first failure cancels the rest, waits for it and is raised as it is."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await cancelled(tasks)


async def cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what still runs, and wait until it has stopped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def merged(
    sources: Sequence[AsyncGenerator[Result, None]],
) -> AsyncGenerator[tuple[int, Result], None]:
    """Everything that `sources` yield, with the index of its source, as it comes.

    The first error of any source is raised. The sources stay open: whoever made them closes them.
    """
    if len(sources) == 1:
        async for item in sources[0]:
            yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Result] | Exception | None] = asyncio.Queue(maxsize=2 * len(sources))
    pumps = [asyncio.create_task(_pump(i, source, queue)) for i, source in enumerate(sources)]
    try:
        running = len(pumps)
        while running:
            entry = await queue.get()
            if isinstance(entry, Exception):
                raise entry
            if entry is None:
                running -= 1
            else:
                yield entry
    finally:
        await cancelled(pumps)


async def _pump(
    index: int,
    source: AsyncGenerator[Result, None],
    queue: asyncio.Queue[tuple[int, Result] | Exception | None],
) -> None:
    try:
        async for item in source:
            await queue.put((index, item))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
