"""A thread that runs one asyncio loop, and its bounded end. Not what runs on it.

vLLM runs no loop in its engine or worker processes, and its threads must never wait for ours.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from objectcache.report import log

T = TypeVar("T")


class LoopThread:
    """Start it where work begins, never at import. `stop` is idempotent and takes bounded time."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopped = False
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run a function on the loop soon; nothing happens once stopped. From any thread."""
        if not self._stopped:
            self._loop.call_soon_threadsafe(function, *args)

    def spawn(self, work: Coroutine[Any, Any, object]) -> "asyncio.Task[Any]":
        """Start a task. On the loop only."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("objectcache met a bug in the background", exc_info=task.exception())

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine on the loop. From any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self, last: Coroutine[Any, Any, object] | None, timeout_s: float) -> None:
        """Cancel what was spawned, run `last` (close the store, say), end the thread."""
        if self._stopped:
            if last is not None:
                last.close()
            return
        self._stopped = True
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._end(last, timeout_s)))
        self._thread.join(timeout_s + 1.0)

    async def _end(self, last: Coroutine[Any, Any, object] | None, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._end_tasks()
                if last is not None:
                    await last
        except TimeoutError:
            pass  # the process ends anyway; what hangs is the server's
        finally:
            if last is not None:
                last.close()  # if it never began
            self._loop.stop()

    async def _end_tasks(self) -> None:
        while self._tasks:  # the end of one may start another
            # A task that is cancelled before its first step never runs, its `finally` neither.
            await asyncio.sleep(0)
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
