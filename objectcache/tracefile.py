"""Lines of a trace into a file, off vLLM's thread and never more than a file may hold. Not what is in them: see trace.py."""

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Full, Queue

from objectcache.report import log
from objectcache.trace import Record, Trace, tell

FILE_BYTES_MAX = 64 << 20
WAITING_MAX = 1000  # records; more are dropped
CLOSE_TIMEOUT_S = 1.0


class TraceFile:
    """Appends to `path`. What cannot be written is dropped, and the log says so once."""

    def __init__(self, path: str, most_bytes: int = FILE_BYTES_MAX) -> None:
        self._path, self._most_bytes = Path(path), most_bytes
        self._records: Queue[Record | None] = Queue(WAITING_MAX)
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="objectcache-trace", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """From any thread; never blocks."""
        try:
            self._records.put_nowait(record)
        except Full:
            self._warn("the disk is too slow for them")

    def close(self) -> None:
        """What was put is written, if that does not take long. Idempotent."""
        try:
            self._records.put(None, timeout=CLOSE_TIMEOUT_S)
        except Full:
            return
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            line = json.dumps(record, separators=(",", ":")) + "\n"
            try:
                with self._path.open("ab") as file:
                    if file.tell() + len(line) <= self._most_bytes:
                        file.write(line.encode())
                    else:
                        self._warn(f"it has {self._most_bytes >> 20} MiB: move it away")
            except OSError as error:
                self._warn(error.strerror or "it cannot be written")

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "objectcache drops traces of requests for %s: %s.", self._path, why.rstrip(".")
            )


def keeps_traces(path: str) -> bool:
    """Whether anybody will read them."""
    return bool(path) or log.isEnabledFor(logging.DEBUG)


def open_trace(path: str) -> tuple[Trace, Callable[[], None]]:
    """A trace that is told to the log, at level DEBUG, and to a file if `path` names one; and what closes it."""
    file = TraceFile(path) if path else None

    def told(record: Record) -> None:
        log.debug("objectcache: request %s", tell(record))
        if file is not None:
            file.put(record)

    trace = Trace(time.monotonic, told, keeps_traces(path))

    def close() -> None:
        trace.close()
        if file is not None:
            file.close()

    return trace, close
