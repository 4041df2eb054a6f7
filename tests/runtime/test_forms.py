"""Which form is read: never much slower than the better one, at any rates, also where these change."""

from collections import deque
from contextlib import ExitStack

import pytest

from surfw.config import GB, MIB
from surfw.manifest import Chunk, Form
from surfw.metrics import Metrics
from surfw.runtime.forms import FormChoice

RATIO = 0.684
SIZE = 256 * MIB
CHUNK = Chunk("id", "c", "layer", SIZE, (), (Form("none", SIZE, "", b""), Form("lossless", int(RATIO * SIZE), "", b"")))


class Machine:
    """A run whose loads take as long as the rates say; two are asked for at a time.

    Rates are in bytes per second, computing is in seconds per byte; `overlap` is the part of decoding that is hidden.
    """

    def __init__(self, reading: float, decoding: float, computing: float, overlap: float, *, is_far: bool) -> None:
        self.reading, self.decoding, self.computing, self.overlap = reading, decoding, computing, overlap
        self.now = 0.0
        self.metrics = Metrics()
        self.forms = FormChoice(is_far=is_far, metrics=self.metrics, clock=lambda: self.now)
        self.loading: deque[tuple[Form, ExitStack]] = deque()

    def seconds(self, codec: str) -> float:
        """How long one load takes."""
        if codec == "none":
            return SIZE * max(1 / self.reading, self.computing)
        others = max(RATIO / self.reading, self.computing)
        apart, at_once = others + 1 / self.decoding, max(others, 1 / self.decoding)
        return SIZE * (self.overlap * at_once + (1 - self.overlap) * apart)

    def begin(self) -> None:
        stack = ExitStack()
        self.loading.append((stack.enter_context(self.forms.loading(CHUNK)), stack))

    def run(self, seconds: float) -> float:
        """How much longer loads took than they would all have taken in the faster form; 1.0 if they did not."""
        began, loads = self.now, 0
        while self.now < began + seconds:
            while len(self.loading) < 2:
                self.begin()
            form, stack = self.loading.popleft()
            self.now += self.seconds(form.codec)
            self.forms.reading.add(form.stored_bytes, form.stored_bytes / self.reading)
            self.metrics.add_seconds("forward", SIZE * self.computing)
            if form.codec != "none":
                with self.forms.decode(SIZE):
                    pass
                self.forms.decoding.add(0, SIZE / self.decoding)
            stack.close()
            loads += 1
        return (self.now - began) / loads / min(self.seconds("none"), self.seconds("lossless"))


@pytest.mark.parametrize(
    ("reading", "is_far"), [(0.117, True), (0.6, False), (0.9, True), (1.4, False), (2.4, True), (2.4, False)]
)
def test_a_long_run_is_hardly_slower_than_with_the_better_form(reading: float, *, is_far: bool) -> None:
    for decoding in (0.1, 1, 2.5):
        for computing in (0, 0.3):
            for overlap in (0, 0.5, 1):
                machine = Machine(reading * GB, decoding * GB, computing / GB, overlap, is_far=is_far)
                machine.run(60)
                assert machine.run(200) < 1.03, (decoding, computing, overlap)


@pytest.mark.parametrize("is_far", [True, False])
def test_a_link_that_becomes_slower_and_faster_is_followed(*, is_far: bool) -> None:
    machine = Machine(2.4 * GB, 2 * GB, 0.1 / GB, 0.6, is_far=is_far)
    for reading in (2.4, 0.8, 0.1, 0.8, 2.4):
        machine.reading = reading * GB
        machine.run(120)  # the pause after a trial of six such loads, at most
        assert machine.run(120) < 1.03, reading


@pytest.mark.parametrize("reading", [20, 2.4])
def test_finding_out_that_decoding_does_not_pay_takes_a_chunk_or_two(reading: float) -> None:
    machine = Machine(reading * GB, GB, 0, 0, is_far=False)
    machine.run(4)
    assert machine.metrics.count("decoded_bytes") <= 2 * SIZE


def test_a_far_source_begins_coded_and_stays_so_where_it_is_slow() -> None:
    machine = Machine(0.117 * GB, 2 * GB, 0.1 / GB, 0, is_far=True)
    assert machine.run(600) == pytest.approx(1)


def test_decoding_that_becomes_faster_is_noticed() -> None:
    machine = Machine(0.9 * GB, 0.5 * GB, 0.1 / GB, 0.5, is_far=False)
    assert machine.run(60) < 1.1
    machine.decoding = 3.4 * GB
    machine.run(200)
    assert machine.run(100) < 1.03


def test_only_time_in_which_weights_are_wanted_counts() -> None:
    machine = Machine(0.8 * GB, 2 * GB, 0, 0.6, is_far=False)
    for _ in range(100):  # a pause after each few loads, in which nothing is loaded
        machine.run(0.5)
        while machine.loading:
            form, stack = machine.loading.popleft()
            machine.now += machine.seconds(form.codec)
            stack.close()
        machine.now += 100
    assert machine.run(100) < 1.03
