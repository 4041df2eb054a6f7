"""The protocol `surfw.v1`, sans-I/O: messages, the order they come in, and a session for each side.

Nothing here imports asyncio, sockets, time or a WebSocket library: text and sizes go in, messages and positions come
out, so that two sessions connected in memory are the whole protocol. The invariant: *whatever a peer sends, a session
accepts it or raises `RemoteProtocolError`, never anything else*. A mistake of our own side raises `LocalProtocolError`.
"""

from surfw.wire.access import EXPIRED, bearer, check_token, is_meant, shown_token
from surfw.wire.messages import (
    MOST_SCHEDULED,
    PROTOCOL,
    Begin,
    Cancel,
    Credit,
    Data,
    Failed,
    Get,
    GetDigests,
    GetFile,
    GetManifest,
    ListModels,
    Models,
    Progress,
    Request,
    Schedule,
    ServerHello,
    binary_header,
)
from surfw.wire.rates import Rates, rates_between
from surfw.wire.reports import (
    MOST_CONNECTIONS,
    CacheShortage,
    ClientFacts,
    ModelHeat,
    RedisState,
    SendingState,
    ServerEvent,
    ServerHealth,
    ServerStats,
    find_shortage,
    parse_stats,
)
from surfw.wire.sessions import ClientSession, ServerSession

__all__ = [
    "EXPIRED",
    "MOST_CONNECTIONS",
    "MOST_SCHEDULED",
    "PROTOCOL",
    "Begin",
    "CacheShortage",
    "Cancel",
    "ClientFacts",
    "ClientSession",
    "Credit",
    "Data",
    "Failed",
    "Get",
    "GetDigests",
    "GetFile",
    "GetManifest",
    "ListModels",
    "ModelHeat",
    "Models",
    "Progress",
    "Rates",
    "RedisState",
    "Request",
    "Schedule",
    "SendingState",
    "ServerEvent",
    "ServerHealth",
    "ServerHello",
    "ServerSession",
    "ServerStats",
    "bearer",
    "binary_header",
    "check_token",
    "find_shortage",
    "is_meant",
    "parse_stats",
    "rates_between",
    "shown_token",
]
