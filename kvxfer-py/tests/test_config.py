"""Where configuration comes from, and what is refused."""

import subprocess
import sys

import pytest

from kvxfer.config import Config, ConfigError, table


def load(role="kv_producer", extra=None, **environ):
    return Config.load(role, extra, environ)


def test_nothing_but_the_role_is_needed():
    producer, consumer = load(), load("kv_consumer")
    assert producer.peers_of(0) == [consumer.listen_at(0)] == ["127.0.0.1:55555"]
    assert (producer.listen_at(0), consumer.peers_of(0)) == (None, [])
    assert (producer.produces, producer.consumes) == (True, False)
    both = load("kv_both")
    assert both.produces
    assert both.consumes
    assert both.peers_of(0) == []


def test_the_tutorials_values():
    sender = {
        "nixlRole": "sender",
        "nixlPeerHost": "vllm-llama-decode-engine-service",
        "nixlPeerPort": "55555",
        "nixlBufferSize": "1073741824",
        "nixlEnableGc": True,
        "enablePD": True,
        "enableNixl": True,
        "discard_partial_chunks": False,
        "lmcache_rpc_port": "sender",
    }
    config = load(extra=sender)
    assert config.peers_of(1) == ["vllm-llama-decode-engine-service:55556"]
    assert config.buffer_size == 2**30
    receiver = {
        "LMCACHE_ENABLE_NIXL": "True",
        "LMCACHE_NIXL_ROLE": "receiver",
        "LMCACHE_NIXL_RECEIVER_HOST": "0.0.0.0",
        "LMCACHE_NIXL_RECEIVER_PORT": "7000",
        "LMCACHE_NIXL_BUFFER_SIZE": "1073741824",
        "LMCACHE_NIXL_ENABLE_GC": "False",
    }
    config = load("kv_consumer", **receiver)
    assert config.listen_at(2) == "0.0.0.0:7002"
    assert config.buffer_size == 2**30
    assert not config.enable_gc


def test_the_first_source_wins():
    names = {"LMCACHE_NIXL_PEER_PORT": "4"}
    assert load(**names).peer_port == 4
    assert load(extra={"nixl_peer_port": 3}, **names).peer_port == 3
    names["KVXFER_PEER_PORT"] = "2"
    assert load(extra={"nixl_peer_port": 3}, **names).peer_port == 2
    assert load(extra={"peer_port": 1, "nixl_peer_port": 3}, **names).peer_port == 1
    # Set to nothing is not set.
    assert load(KVXFER_PEER_PORT="").peer_port == 55555


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("1GiB", 2**30),
        ("1 gib", 2**30),
        ("1.5G", 1_500_000_000),
        ("512MB", 512_000_000),
        ("3ki", 3072),
        ("7B", 7),
    ],
)
def test_sizes(given, size):
    assert load(extra={"buffer_size": given}).buffer_size == size


@pytest.mark.parametrize(
    ("role", "extra", "message"),
    [
        ("kv_consumer", {"buffersize": 1}, r"unknown key buffersize = 1; did you mean buffer_size"),
        ("kv_consumer", {"nixlRolee": "x"}, r"nixlRolee = 'x'; did you mean nixlRole"),
        ("kv_consumer", {"qqq": 1}, r"unknown key qqq.*lists the keys"),
        ("kv_consumer", {"buffer_size": "1 gigabyte"}, r"buffer_size = '1 gigabyte' is not a size"),
        ("kv_consumer", {"buffer_size": True}, r"buffer_size = True is not a size"),
        ("kv_consumer", {"buffer_size": 0}, r"buffer_size = 0 holds nothing"),
        ("kv_consumer", {"segments": 0}, r"segments = 0 holds nothing"),
        ("kv_consumer", {"chunk_size": -1}, r"chunk_size = -1 is not a whole number"),
        ("kv_consumer", {"nixlRole": "sender"}, r"nixlRole = 'sender' contradicts kv_role kv_con"),
        ("kv_producer", {"role": "decode"}, r"role = 'decode' is not a role"),
        ("kv_consumer", {"buffer_device": "tpu"}, r"'tpu' is not one of cpu, cuda"),
        ("kv_consumer", {"peer_port": 70000}, r"peer_port = 70000 is not a port"),
        ("kv_consumer", {"low_watermark": 0.95}, r"low_watermark = 0.95 is not below"),
        ("kv_consumer", {"load_timeout": 0}, r"load_timeout = 0 must be more than 0"),
        ("kv_consumer", {"load_timeout": "soon"}, r"load_timeout = 'soon' is not a number of s"),
        ("kv_consumer", {"enable_gc": "maybe"}, r"enable_gc = 'maybe' is neither true nor false"),
        ("kv_consumer", {"enablePD": False}, r"enablePD = False contradicts the connector"),
        ("kv_consumer", {"gc_policy": "lru"}, r"gc_policy = 'lru' is not one of drop, keep"),
        ("kv_producer", {"peers": ["decode"]}, r"peers = 'decode' .*neither host:port nor unix"),
        ("kv_producer", {"peers": 7}, r"peers = 7 is not a list"),
    ],
)
def test_what_is_refused(role, extra, message):
    with pytest.raises(ConfigError, match=message):
        load(role, extra)


def test_a_slip_in_a_variable_is_refused_and_a_strange_one_is_not():
    with pytest.raises(ConfigError, match=r"KVXFER_PEER_PROT.*did you mean KVXFER_PEER_PORT"):
        load(KVXFER_PEER_PROT="1")
    load(KVXFER_CACHE="/somewhere")


def test_addresses_of_ranks():
    config = load(extra={"peers": "a:1, unix:/run/kv/d.sock,tcp://b:9"})
    assert config.peers_of(0) == ["a:1", "unix:/run/kv/d.sock", "tcp://b:9"]
    assert config.peers_of(1) == ["a:2", "unix:/run/kv/d.sock.1", "tcp://b:10"]
    assert load("kv_consumer", {"peer_host": "::1"}).listen_at(0) == "[::1]:55555"
    with pytest.raises(ConfigError, match=r"rank 1.*not a port"):
        load(extra={"peers": ["a:65535"]}).peers_of(1)


def test_the_table_has_every_key():
    text = table()
    for key in Config.__dataclass_fields__:
        assert f"| `{key}` |" in text
    assert "LMCACHE_NIXL_RECEIVER_HOST" in text


def test_importing_kvxfer_imports_neither_torch_nor_vllm():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "try: import kvxfer\n"
        "except ImportError:\n"
        "    import fake; sys.modules['kvxfer._kvxfer'] = fake\n"
        "import kvxfer, kvxfer.config, kvxfer.plugin\n"
        "assert all(hasattr(kvxfer, name) for name in kvxfer.__all__)\n"
        "assert not {'torch', 'vllm', 'lmcache', 'numpy'} & set(sys.modules)\n"
    )
    paths = [path for path in sys.path if path.endswith(("kvxfer-py/tests", "kvxfer-py/python"))]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=30)
