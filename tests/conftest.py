"""What every test has in common. No fixtures: those stand where they are used."""

import gc
import os

# With awscrt beside it botocore signs in another way. Most users have none; test_s3_crt.py is for
# those who do.
os.environ.setdefault("BOTO_DISABLE_CRT", "true")


def pytest_collection_finish() -> None:
    """What was imported stays: without this each full collection walks through all of vLLM, for seconds."""
    gc.collect()
    gc.freeze()
