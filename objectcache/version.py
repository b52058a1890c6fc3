"""Which vLLM this works with; importing it refuses any other. Imported first, before anything that only a new vLLM has."""

import logging

import vllm
from packaging.version import InvalidVersion, Version

from objectcache.errors import Misconfigured

OLDEST = Version("0.32")
TESTED = "0.32"


def require_supported(found: str) -> None:
    """Raises Misconfigured for a vLLM that is too old; says so if one is newer than was tested."""
    try:
        version = Version(found)
    except InvalidVersion:
        version = None  # a build from source; it is taken to be new
    if version is not None and Version(version.base_version) < OLDEST:
        raise Misconfigured(
            f"objectcache needs vLLM {OLDEST} or newer, and this is {found}.",
            f"pip install 'vllm>={OLDEST}'.",
        )
    if version is None or f"{version.major}.{version.minor}" != TESTED:
        logging.getLogger("vllm.objectcache").warning(
            "objectcache is tested with vLLM %s, and this is %s.", TESTED, found
        )


require_supported(vllm.__version__)
