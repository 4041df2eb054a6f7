"""Messages of every kind, and invalid messages."""

import json
from typing import get_args

from hypothesis import strategies as st

from surfw.wire import messages as m

SIZE = st.integers(0, m.MAX_SIZE)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=256)
SHOWN = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), max_size=256)
IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=64), max_size=4).map(tuple)

CLIENT_MESSAGES = st.one_of(
    st.builds(m.ClientHello, SHOWN, SIZE, st.booleans()),
    st.builds(m.ListModels, SIZE),
    st.builds(m.GetManifest, SIZE, TEXT),
    st.builds(m.GetFile, SIZE, TEXT, TEXT),
    st.builds(m.GetDigests, SIZE, TEXT, TEXT),
    st.builds(m.Get, SIZE, TEXT, TEXT, TEXT, SIZE, SIZE, st.integers(-m.MAX_PRIORITY, m.MAX_PRIORITY), st.booleans()),
    st.builds(m.Cancel, SIZE),
    st.builds(m.Credit, SIZE),
    st.builds(m.Schedule, TEXT, IDS, IDS),
)
SERVER_MESSAGES = st.one_of(
    st.builds(m.ServerHello, TEXT, SHOWN, SIZE, SIZE, SIZE, st.booleans()),
    st.builds(m.Models, SIZE, st.lists(SHOWN, max_size=4).map(tuple)),
    st.builds(m.Begin, SIZE, SIZE, TEXT),
    st.builds(m.Data, SIZE, SIZE, SIZE),
    st.builds(m.Progress, SIZE, SIZE),
    st.builds(m.Failed, SIZE, SHOWN, SHOWN),
)
NAMES = [
    "type", "id", "model", "chunk", "form", "start", "stop", "bytes", "window_bytes", "client", "path", "priority",
    "cycle", "kept",
]  # fmt: skip
FLAGS = ["progress", "fresh", "schedules"]
TYPES = sorted({kind.type for kind in get_args(m.ClientMessage) + get_args(m.ServerMessage)})
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(TYPES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES + FLAGS), inner, max_size=4),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES + FLAGS), ODD, max_size=8)
ODD_TEXTS = st.text() | ODD.map(json.dumps) | OBJECTS.map(json.dumps)
