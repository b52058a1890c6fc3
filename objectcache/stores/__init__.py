"""From a URL to the store behind it: the only list of stores. What a store must do: see base.py."""

from pathlib import Path

from objectcache.config import Options
from objectcache.errors import Misconfigured
from objectcache.stores.base import Store

__all__ = ["open_store"]


def open_store(options: Options, threads: int = 0) -> Store:
    """The store of `options.url`. No I/O yet: `check` asks whether it can be used.

    `threads` may receive bodies; 0: as many as do little harm to what else the process does. May be
    called outside of any loop. Imports only what the URL needs.
    """
    scheme, _, rest = options.url.partition("://")
    if scheme == "s3":
        return _s3_store(options, threads)
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


def _s3_store(options: Options, threads: int) -> Store:
    from objectcache.stores.s3 import S3Store

    library = S3Store(options)
    if options.transport == "aiobotocore":
        return library
    from objectcache.stores.s3_obstore import ObstoreStore

    obstore = ObstoreStore(library, options)
    if options.transport == "obstore":
        return obstore
    from objectcache.stores.s3_direct import THREADS, DirectStore

    return DirectStore(
        library, obstore, options, threads or THREADS
    )  # which leaves https to obstore
