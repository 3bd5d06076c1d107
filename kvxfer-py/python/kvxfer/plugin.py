"""vLLM's plug-in entry point: makes `"kv_connector": "KvxferConnector"` known.

vLLM calls it in every process it starts, possibly more than once, and forks later: so it is
idempotent, imports the connector only when it is asked for, and starts nothing.

`VLLM_PLUGINS` can hide it. Then `"kv_connector_module_path": "kvxfer.vllm"` beside
`"kv_connector"` does the same.
"""

NAME = "KvxferConnector"


def register() -> None:
    """Registers the connector by name."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    # The registry has no public way to ask, and raises on a duplicate.
    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvxfer.vllm", NAME)
