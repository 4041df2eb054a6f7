"""The services that other tests rely on are the real ones."""

import socket
from urllib.parse import urlsplit


def ask_redis(url: str, *words: str) -> bytes:
    """One command to a Redis server, and the first bytes of its answer."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=10) as connection:
        connection.sendall(" ".join(words).encode() + b"\r\n")
        return connection.recv(4096)


def test_redis_keeps_values_in_memory_only(redis_url: str) -> None:
    assert ask_redis(redis_url, "SET", "surfw", "kept") == b"+OK\r\n"
    assert ask_redis(redis_url, "GET", "surfw") == b"$4\r\nkept\r\n"
    assert b"allkeys-lfu" in ask_redis(redis_url, "CONFIG", "GET", "maxmemory-policy")
    assert ask_redis(redis_url, "CONFIG", "GET", "save").endswith(b"$4\r\nsave\r\n$0\r\n\r\n")
