"""From a URL to the store behind it: the only list of stores. What a store must do: see base.py."""

from pathlib import Path

from objectcache.config import Options
from objectcache.errors import Misconfigured
from objectcache.stores.base import Store

__all__ = ["open_store"]


def open_store(options: Options) -> Store:
    """The store of `options.url`. No I/O yet: `check` asks whether it can be used.

    May be called outside of any loop. Imports only what the URL needs.
    """
    scheme, _, rest = options.url.partition("://")
    if scheme == "s3":
        from objectcache.stores.s3 import S3Store

        return S3Store(options)
    if scheme == "file":
        from objectcache.stores.local import LocalStore

        return LocalStore(Path(rest), max_connections=options.max_connections, write=options.save)
    if scheme == "memory":
        from objectcache.stores.memory import MemoryStore

        return MemoryStore(rest)
    raise Misconfigured(
        "option 'url' is not a place that objectcache knows.",
        "use s3://bucket/prefix, file:///path or memory://name.",
    )
