"""KV cache that outlives a GPU: vLLM prefixes in S3-compatible object storage.

Importing this package starts no thread, opens no connection and touches no GPU:
vLLM imports connectors in its front-end process as well.
"""

__version__ = "0.1.0"
