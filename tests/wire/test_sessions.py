"""Two sessions joined in memory follow the protocol; each accepts or refuses any message of its peer."""

import json
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.config import KIB, MIB, WireLimits
from surfw.errors import LocalProtocolError, RemoteProtocolError
from surfw.wire import (
    Begin,
    Cancel,
    ClientSession,
    Credit,
    Data,
    Failed,
    Get,
    GetFile,
    GetManifest,
    ListModels,
    Models,
    Progress,
    Schedule,
    ServerHello,
    ServerSession,
)
from surfw.wire import messages as m
from surfw.wire import sessions as t
from surfw.wire.messages import PROTOCOL, ClientHello, encode
from surfw.wire.sessions import Arrival
from tests.wire.strategies import CLIENT_MESSAGES, ODD_TEXTS, SERVER_MESSAGES

FRAME = 128 * KIB
LIMITS = WireLimits(
    frame_bytes=FRAME, run_bytes=2 * FRAME, window_bytes=4 * FRAME, control_bytes=4096, requests_in_flight=2
)


def joined() -> tuple[ClientSession, ServerSession]:
    """A client and a server after their hellos."""
    client, server = ClientSession(LIMITS, client="c"), ServerSession(LIMITS, server="s")
    client.receive(server.hello())
    assert server.receive(client.hello()) is None
    return client, server


def get(number: int, start: int = 0, stop: int = 3 * FRAME) -> Get:
    return Get(number, "m", "c", "none", start, stop)


def deliver(client: ClientSession, server: ServerSession, run: Data) -> list[Arrival]:
    """Send a run in frames, and return the client's credit when it is due."""
    client.receive(server.send(run))
    arrivals = []
    for at in range(run.start, run.stop, FRAME):
        size = min(FRAME, run.stop - at)
        assert client.place(size) == (run.id, at)
        arrivals.append(client.receive_binary(size))
        if credit := client.credit():
            server.receive(credit)
    return arrivals


def test_hello_tells_each_side_the_others_limits() -> None:
    client, server = joined()
    assert (client.requests, server.credit_bytes) == (2, 4 * FRAME)


def test_a_schedule_goes_to_servers_that_take_it() -> None:
    schedule = Schedule("m", ("a", "b", "a"), ("b",))
    client, older = joined()
    with pytest.raises(LocalProtocolError, match="takes no schedules"):
        client.send(schedule)
    client, server = ClientSession(LIMITS, client="c"), ServerSession(LIMITS, server="s", takes_schedules=True)
    client.receive(server.hello())
    server.receive(client.hello())
    assert server.receive(client.send(schedule)) == schedule
    assert client.next_id == 0
    assert "schedules" not in older.hello()


def test_a_client_has_no_more_requests_open_than_it_likes() -> None:
    client = ClientSession(LIMITS, client="c")
    client.receive(encode(ServerHello(PROTOCOL, "s", FRAME, 4 * FRAME, 1 << 53)))
    assert client.requests == 2


def test_a_chunk_crosses() -> None:
    client, server = joined()
    assert server.receive(client.send(get(0))) == get(0)
    arrivals = deliver(client, server, Data(0, 0, 2 * FRAME)) + deliver(client, server, Data(0, 2 * FRAME, 3 * FRAME))
    assert [(one.start, one.stop, one.last) for one in arrivals] == [
        (0, FRAME, False),
        (FRAME, 2 * FRAME, False),
        (2 * FRAME, 3 * FRAME, True),
    ]
    assert not client.is_open(0)
    assert not server.is_open(0)


def test_documents_begin_with_their_size() -> None:
    client, server = joined()
    for number, request in enumerate([GetManifest(0, "m"), GetFile(1, "m", "f")]):
        server.receive(client.send(request))
        assert client.receive(server.send(Begin(number, 10, "d"))) == Begin(number, 10, "d")
        assert deliver(client, server, Data(number, 0, 10)) == [Arrival(number, 0, 10, True)]


def test_an_answer_of_no_bytes_is_complete_with_its_announcement() -> None:
    client, server = joined()
    server.receive(client.send(get(0, 5, 5)))
    assert deliver(client, server, Data(0, 5, 5)) == []
    assert not client.is_open(0)
    assert not server.is_open(0)


def test_answers_interleave_between_runs() -> None:
    client, server = joined()
    server.receive(client.send(get(0)))
    server.receive(client.send(get(1)))
    runs = [Data(0, 0, FRAME), Data(1, 0, FRAME), Data(0, FRAME, 3 * FRAME), Data(1, FRAME, 3 * FRAME)]
    ended = [arrival.id for run in runs for arrival in deliver(client, server, run) if arrival.last]
    assert ended == [0, 1]


def test_window_is_spent_by_announcing_and_given_back_by_credit() -> None:
    client, server = joined()
    server.receive(client.send(get(0, 0, 9 * FRAME)))
    server.send(Data(0, 0, 4 * FRAME))
    assert server.credit_bytes == 0
    with pytest.raises(LocalProtocolError):
        server.send(Data(0, 4 * FRAME, 5 * FRAME))
    assert server.receive(encode(Credit(FRAME))) == Credit(FRAME)
    assert server.credit_bytes == FRAME


def test_credit_is_due_at_half_the_window() -> None:
    client, server = joined()
    server.receive(client.send(get(0)))
    client.receive(server.send(Data(0, 0, 3 * FRAME)))
    due = []
    for _ in range(3):
        client.receive_binary(FRAME)
        due.append(client.credit())
    assert due == [None, encode(Credit(2 * FRAME)), None]


def test_cancel_ends_with_an_error_or_with_the_last_run() -> None:
    client, server = joined()
    server.receive(client.send(get(0)))
    server.receive(client.send(get(1)))
    crossing = server.send(Data(1, 0, 3 * FRAME))
    assert server.receive(client.send(Cancel(0))) == Cancel(0)
    assert server.receive(client.send(Cancel(1))) is None
    client.receive(crossing)
    assert [client.receive_binary(FRAME).last for _ in range(3)] == [False, False, True]
    assert client.receive(server.send(Failed(0, "cancelled", "…"))) == Failed(0, "cancelled", "…")
    assert not client.is_open(0)
    with pytest.raises(LocalProtocolError):
        client.send(Cancel(0))


def test_progress_is_for_open_requests_and_rises() -> None:
    client, server = joined()
    assert server.takes_progress
    server.receive(client.send(get(0)))
    server.receive(client.send(GetManifest(1, "m")))
    for progress in (Progress(0, 1), Progress(1, 1), Progress(0, 9), Progress(1, 5)):
        assert client.receive(server.send(progress)) == progress
    for wrong in (Progress(0, 9), Progress(1, 0), Progress(2, 1)):
        with pytest.raises(LocalProtocolError):
            server.send(wrong)
        with pytest.raises(RemoteProtocolError):
            client.receive(encode(wrong))
    deliver(client, server, Data(0, 0, 2 * FRAME))
    assert client.receive(server.send(Progress(0, 10))) == Progress(0, 10)
    client.receive(server.send(Data(0, 2 * FRAME, 3 * FRAME)))
    with pytest.raises(RemoteProtocolError):
        client.receive(encode(Progress(1, 6)))  # inside a run


def test_no_progress_for_a_client_that_does_not_know_it() -> None:
    server = ServerSession(LIMITS, server="s")
    server.receive(encode(ClientHello("older", LIMITS.window_bytes)))
    server.receive(encode(get(0)))
    assert not server.takes_progress
    with pytest.raises(LocalProtocolError):
        server.send(Progress(0, 1))


HELLO = encode(ClientHello("c", LIMITS.window_bytes))
GET = encode(get(0))


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([GET], 1008),
        (["not json"], 1002),
        ([encode(ClientHello("c", FRAME))], 1008),
        ([HELLO, HELLO], 1002),
        ([HELLO, b"\0"], 1003),
        ([HELLO, " " * 5000], 1009),
        ([HELLO, GET, GET], 1002),
        ([HELLO, encode(get(5)), encode(get(4))], 1002),
        ([HELLO, encode(get(0)), encode(get(1)), encode(get(2))], 1008),
        ([HELLO, encode(Credit(0))], 1002),
        ([HELLO, encode(Credit(1))], 1002),
        ([HELLO, '{"type":"credit","bytes":-5}'], 1002),
        ([HELLO, encode(ServerHello("surfw.v1", "s", FRAME, FRAME, 1))], 1002),
        ([HELLO, encode(Data(0, 0, 1))], 1002),
    ],
)
def test_a_server_refuses(messages: list[str | bytes], code: int) -> None:
    server = ServerSession(LIMITS, server="s")
    for message in messages[:-1]:
        server.receive(message)
    with pytest.raises(RemoteProtocolError) as caught:
        server.receive(messages[-1])
    assert caught.value.close_code == code


def test_cancel_of_an_unknown_id_is_ignored() -> None:
    _, server = joined()
    assert server.receive(encode(Cancel(77))) is None


@pytest.mark.parametrize(
    "hello",
    [
        ServerHello("surfw.v2", "s", FRAME, MIB, 1),
        ServerHello("surfw.v1", "s", FRAME - 1, MIB, 1),
        ServerHello("surfw.v1", "s", 600 * KIB, 8 * MIB, 1),
        ServerHello("surfw.v1", "s", FRAME, FRAME, 1),
        ServerHello("surfw.v1", "s", FRAME, MIB, 0),
        Models(0, ()),
    ],
)
def test_a_client_refuses_a_server_it_cannot_work_with(hello: ServerHello | Models) -> None:
    with pytest.raises(RemoteProtocolError):
        ClientSession(LIMITS, client="c").receive(encode(hello))


@pytest.mark.parametrize(
    "messages",
    [
        [Data(7, 0, FRAME)],
        [Data(0, FRAME, 2 * FRAME)],
        [Data(0, 0, 4 * FRAME)],
        [Data(0, 0, 0)],
        [Data(0, 0, FRAME), Data(0, FRAME, 2 * FRAME)],
        [Begin(0, 10, "d")],
        [Models(0, ())],
        [Failed(9, "x", "y")],
        [Progress(0, 0)],
        [Progress(9, 1)],
        [Progress(1, 5), Progress(1, 5)],
        [Begin(1, LIMITS.manifest_bytes + 1, "d")],
        [Begin(1, 5, "d"), Begin(1, 5, "d")],
        [Data(1, 0, 1)],
        [ServerHello("surfw.v1", "s", FRAME, MIB, 1)],
    ],
)
def test_a_client_refuses(messages: list[Data | Begin | Models | Progress | Failed | ServerHello]) -> None:
    client, _ = joined()
    client.send(get(0))
    client.send(GetManifest(1, "m"))
    for message in messages[:-1]:
        client.receive(encode(message))
    with pytest.raises(RemoteProtocolError):
        client.receive(encode(messages[-1]))


def test_a_client_refuses_binary_data_beyond_what_was_announced() -> None:
    client, _ = joined()
    client.send(get(0))
    with pytest.raises(RemoteProtocolError):
        client.receive_binary(1)
    client.receive(encode(Data(0, 0, FRAME + 1)))
    with pytest.raises(RemoteProtocolError):
        client.place(FRAME + 1)
    client.receive_binary(FRAME)
    with pytest.raises(RemoteProtocolError):
        client.receive_binary(2)
    assert client.receive_binary(1) == Arrival(0, FRAME, FRAME + 1, False)


def test_a_client_refuses_more_than_the_window() -> None:
    client, _ = joined()
    client.send(get(0, 0, 9 * FRAME))
    client.receive(encode(Data(0, 0, 4 * FRAME)))
    for _ in range(4):
        client.receive_binary(FRAME)
    with pytest.raises(RemoteProtocolError, match="window"):
        client.receive(encode(Data(0, 4 * FRAME, 5 * FRAME)))


def test_our_own_mistakes_are_local_errors() -> None:
    client, server = joined()
    for wrong in (get(3), Cancel(0)):
        with pytest.raises(LocalProtocolError):
            client.send(wrong)
    server.receive(client.send(ListModels(0)))
    for mistake in (Begin(0, 1, "d"), Data(0, 0, 1), Models(4, ()), ServerHello("surfw.v1", "s", 1, 1, 1)):
        with pytest.raises(LocalProtocolError):
            server.send(mistake)
    client.send(get(1))
    with pytest.raises(LocalProtocolError):
        client.send(get(2))


@settings(max_examples=300, deadline=None)
@given(st.lists(ODD_TEXTS | CLIENT_MESSAGES.map(encode) | st.binary(max_size=8) | st.just(HELLO), max_size=12))
def test_a_server_takes_or_refuses_whatever_comes(messages: list[str | bytes]) -> None:
    server = ServerSession(LIMITS, server="s")
    refused = None
    for message in messages:
        try:
            server.receive(message)
        except RemoteProtocolError as exc:
            refused = exc.close_code
            break
        assert 0 <= server.credit_bytes <= LIMITS.window_bytes
    assert refused in {None, 1002, 1003, 1008, 1009}


SMALL = st.integers(0, 3)
IN_RANGE = st.builds(
    Data, SMALL, st.sampled_from([0, FRAME, 2 * FRAME]), st.sampled_from([0, FRAME, 2 * FRAME, 3 * FRAME])
)
FROM_SERVER = st.one_of(
    SERVER_MESSAGES,
    IN_RANGE,
    st.builds(Begin, SMALL, st.integers(0, 9), st.just("d")),
    st.builds(Progress, SMALL, SMALL),
    st.builds(Failed, SMALL, st.just("x"), st.just("y")),
).map(encode)


@settings(max_examples=300, deadline=None)
@given(st.lists(ODD_TEXTS | FROM_SERVER | st.sampled_from([0, 1, FRAME, FRAME + 1]), max_size=16))
def test_a_client_takes_or_refuses_whatever_comes(messages: list[str | int]) -> None:
    client, _ = joined()
    client.send(get(0))
    client.send(GetManifest(1, "m"))
    for message in messages:
        try:
            if isinstance(message, str):
                client.receive(message)
            else:
                where = client.place(message)
                arrival = client.receive_binary(message)
                assert where == (arrival.id, arrival.start)
                client.credit()
        except RemoteProtocolError:
            return


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[str, int]]:
    return draw(
        st.lists(st.tuples(st.sampled_from(["get", "run", "cancel", "credit"]), st.integers(0, 7)), max_size=60)
    )


@settings(deadline=None)
@given(traffic())
def test_joined_sessions_always_agree(steps: list[tuple[str, int]]) -> None:
    """Two correct peers never refuse each other, and each byte arrives once and in order."""
    client, server = joined()
    wanted: dict[int, int] = {}
    came: dict[int, int] = {}
    for step, choice in steps:
        opened = sorted(number for number in wanted if server.is_open(number))
        match step:
            case "get" if len(opened) < LIMITS.requests_in_flight:
                request = get(client.next_id, choice, choice + choice * FRAME)
                server.receive(client.send(request))
                wanted[request.id], came[request.id] = request.stop, request.start
            case "run" if opened:
                number = opened[choice % len(opened)]
                length = min(wanted[number] - came[number], server.credit_bytes)
                if length or came[number] == wanted[number]:
                    for arrival in deliver(client, server, Data(number, came[number], came[number] + length)):
                        assert arrival.start == came[number]
                        came[number] = arrival.stop
            case "cancel" if opened:
                number = opened[choice % len(opened)]
                assert server.receive(client.send(Cancel(number))) == Cancel(number)
                client.receive(server.send(Failed(number, "cancelled", "")))
    assert all(client.is_open(number) == server.is_open(number) for number in wanted)


def test_messages_are_json_objects_with_a_type() -> None:
    assert json.loads(GET) == {
        "type": "get",
        "id": 0,
        "model": "m",
        "chunk": "c",
        "form": "none",
        "start": 0,
        "stop": 3 * FRAME,
        "priority": 0,
    }


def test_the_tables_have_a_place_for_every_message_and_a_way_to_the_end() -> None:
    assert set(t.ANSWER_STARTS) == set(get_args(m.Request))
    assert {kind for row in t.ANSWERS.values() for kind in row} == set(get_args(m.AnswerMessage))
    assert set(t.ANSWER_STARTS.values()) | {after for row in t.ANSWERS.values() for after in row.values()} == set(
        t.AnswerState
    )
    for state, row in t.ANSWERS.items():
        assert (t.AnswerState.DONE in row.values()) == (state is not t.AnswerState.DONE)


EVERY_REQUEST = [ListModels(0), GetManifest(0, "m"), GetFile(0, "m", "f"), m.GetDigests(0, "m", "c"), get(0)]
EVERY_ANSWER = [Models(0, ()), Begin(0, 9, "d"), Data(0, 0, 4), Progress(0, 5), Failed(0, "x", "y")]


@pytest.mark.parametrize(
    "request_", [ListModels(0), GetManifest(0, "m"), get(0, 0, 4)], ids=["models", "manifest", "get"]
)
@pytest.mark.parametrize("begun", [False, True])
def test_both_sides_refuse_what_the_table_has_not(request_: m.Request, begun: bool) -> None:
    """In every state of an answer, both sides accept or refuse the same messages."""
    for message in EVERY_ANSWER:
        client, server = joined()
        server.receive(client.send(request_))
        state = t.ANSWER_STARTS[type(request_)]
        if begun and state is t.AnswerState.DOCUMENT:
            client.receive(server.send(Begin(0, 9, "d")))
            state = t.AnswerState.BYTES
        if type(message) in t.ANSWERS[state]:
            assert client.receive(server.send(message)) == message
        else:
            with pytest.raises(LocalProtocolError):
                server.send(message)
            with pytest.raises(RemoteProtocolError, match=f"{message.type} is out of order"):
                client.receive(encode(message))


def test_hello_comes_first_and_only_then() -> None:
    assert {type(one) for one in EVERY_ANSWER} | {ServerHello} == set(get_args(m.ServerMessage))
    for answer in EVERY_ANSWER:
        with pytest.raises(RemoteProtocolError, match="the first message of a server is hello"):
            ClientSession(LIMITS, client="c").receive(encode(answer))
    from_client = [*EVERY_REQUEST, Cancel(0), Credit(1), Schedule("m", (), ())]
    assert {type(one) for one in from_client} | {ClientHello} == set(get_args(m.ClientMessage))
    for message in from_client:
        with pytest.raises(RemoteProtocolError, match="the first message of a client is hello"):
            ServerSession(LIMITS, server="s").receive(encode(message))
    client, server = joined()
    with pytest.raises(RemoteProtocolError, match="a second hello"):
        client.receive(server.hello())
    with pytest.raises(RemoteProtocolError, match="a second hello"):
        server.receive(HELLO)
