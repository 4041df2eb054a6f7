"""Messages survive JSON; any other text raises `RemoteProtocolError`, never anything else."""

import re
from dataclasses import fields
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from websockets.frames import Frame, Opcode

from surfw.config import WireLimits
from surfw.errors import RemoteProtocolError
from surfw.wire import messages as m
from surfw.wire.sessions import ClientSession, ServerSession
from tests import pages
from tests.wire.strategies import CLIENT_MESSAGES, ODD_TEXTS, SERVER_MESSAGES


@settings(deadline=None)
@given(CLIENT_MESSAGES)
def test_client_messages_survive(message: m.ClientMessage) -> None:
    assert m.parse_client_message(m.encode(message)) == message


@settings(deadline=None)
@given(SERVER_MESSAGES)
def test_server_messages_survive(message: m.ServerMessage) -> None:
    assert m.parse_server_message(m.encode(message)) == message


@settings(deadline=None)
@given(ODD_TEXTS)
def test_whatever_is_sent_is_a_message_or_refused(text: str) -> None:
    for parse in (m.parse_client_message, m.parse_server_message):
        try:
            parsed: Any = parse(text)
        except RemoteProtocolError as exc:
            str(exc).encode()
        else:
            assert parse(m.encode(parsed)) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "{}",
        '{"type": 7}',
        '{"type": "GET"}',
        '{"type": "credit"}',
        '{"type": "credit", "bytes": -1}',
        '{"type": "credit", "bytes": 1.0}',
        '{"type": "credit", "bytes": true}',
        '{"type": "credit", "bytes": 1e400}',
        '{"type": "credit", "bytes": NaN}',
        '{"type": "credit", "bytes": 9007199254740993}',
        '{"type": "credit", "bytes": ' + "9" * 5000 + "}",
        '{"type": "manifest", "id": 1, "model": "\\ud800"}',
        '{"type": "hello", "client": "c", "window_bytes": 1, "progress": 1}',
        '{"type": "get", "id": 0, "model": "m", "chunk": "c", "form": "none", "start": 0, "stop": 1, "fresh": null}',
        '{"type": "manifest", "id": 1, "model": "' + "x" * 300 + '"}',
        '{"type": "manifest", "id": 1, "model": ["x"]}',
        '{"type": "schedule", "model": "m", "cycle": "a", "kept": []}',
        '{"type": "schedule", "model": "m", "cycle": ["' + "x" * 65 + '"], "kept": []}',
        '{"type": "schedule", "model": "m", "cycle": ["a"' + ', "a"' * m.MOST_SCHEDULED + '], "kept": []}',
        "[" * 100_000,
        '{"type":' * 50_000,
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        m.parse_client_message(text)


def test_unknown_fields_are_ignored() -> None:
    assert m.parse_client_message('{"type": "cancel", "id": 3, "why": "not needed"}') == m.Cancel(3)


def test_flags_that_are_missing_are_false_and_false_flags_are_left_out() -> None:
    older = '{"type":"hello","client":"c","window_bytes":7}'
    assert m.parse_client_message(older) == m.ClientHello("c", 7, progress=False)
    assert m.encode(m.ClientHello("c", 7, progress=False)) == older
    assert '"progress":true' in m.encode(m.ClientHello("c", 7, progress=True))
    get = m.Get(0, "m", "c", "none", 0, 1)
    assert "fresh" not in m.encode(get)
    assert m.parse_client_message(m.encode(get)) == get
    assert '"fresh":true' in m.encode(m.Get(0, "m", "c", "none", 0, 1, fresh=True))


def test_reasons_name_field_value_and_what_was_expected() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        m.parse_client_message('{"type": "cancel", "id": "seven"}')
    assert str(caught.value) == "cancel: field 'id' is 'seven', expected an integer from 0 to 9007199254740992"


@pytest.mark.parametrize(
    "message",
    [
        m.ServerHello(m.PROTOCOL, "\x1b[2J", 1, 1, 1),
        m.Models(0, ("good", "a\nb")),
        m.Failed(0, "code", "\x1b]0;title\x07"),
        m.Failed(0, "\x9b", "text"),
    ],
)
def test_texts_for_people_cannot_control_their_terminals(message: m.ServerMessage) -> None:
    with pytest.raises(RemoteProtocolError, match="expected a text of printable characters") as caught:
        m.parse_server_message(m.encode(message))
    assert str(caught.value).isprintable()
    with pytest.raises(RemoteProtocolError, match="printable"):
        m.parse_client_message(m.encode(m.ClientHello("\x1b[2J", 1)))


def test_the_page_has_a_row_for_every_message_with_all_its_fields() -> None:
    page = pages.read("surfw/wire/PROTOCOL.md")
    rows = re.findall(r"^\| (client|server) \| `(\w+) \{([\w, ]+)\}`", page, re.MULTILINE)
    declared = {
        (side, kind.type, ", ".join(one.name for one in fields(kind)))
        for side, kinds in (("client", m.ClientMessage), ("server", m.ServerMessage))
        for kind in get_args(kinds)
    }
    assert len(rows) == len(declared)
    assert set(rows) == declared


def test_both_sides_take_part_in_the_session_of_the_page() -> None:
    (session,) = [one for one in pages.blocks("text") if one.flags == ("session",)]
    client, server = ClientSession(WireLimits(), client="a"), ServerSession(WireLimits(), server="b")
    for line in session.text.splitlines():
        side, said = line.split(" ", 1)
        if size := re.fullmatch(r"\(a binary frame of (\d+) bytes\)", said):
            client.receive_binary(int(size[1]))
        elif side == "C":
            asked = m.parse_client_message(said)
            server.receive(said)
            if not isinstance(asked, m.ClientHello):
                client.send(asked)  # type: ignore[arg-type]
        else:
            client.receive(said)
            if not isinstance(told := m.parse_server_message(said), m.ServerHello):
                server.send(told)
    assert not any(side.is_open(number) for side in (client, server) for number in range(4))


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 512 * 1024])
def test_header_is_what_the_library_writes(length: int) -> None:
    payload = bytes(length)
    assert m.binary_header(length) + payload == Frame(Opcode.BINARY, payload).serialize(mask=False)
