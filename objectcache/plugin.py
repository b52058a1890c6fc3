"""The entry point by which vLLM learns our name. Nothing else happens here."""

NAME = "ObjectCacheConnector"


def register() -> None:
    """Called by vLLM in each of its processes (`vllm.general_plugins`)."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "objectcache.connector", NAME)
