"""Torch's default dtype is global: a model that runs is not affected by another that is being built."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from surfw.errors import ModelClosedError, ModelError, UnsupportedModelError
from surfw.models import StreamingModel
from surfw.runtime.run import Run
from surfw.skeleton import default_dtype
from surfw.skeleton.default_dtype import runs
from tests.models.test_streaming import IDS, opener
from tests.skeleton.models import skeleton_of
from tests.skeleton.test_guards import Other
from tests.toys import Pause

LLAMA = "llama"


def until(true: Callable[[], object]) -> None:
    """Wait for a condition that has no event."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def is_building() -> bool:
    """Whether a build is waiting for the runs, or is in progress."""
    return runs.build is not None


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """After each test, nothing runs or builds, and the default dtype is the old one."""
    yield
    assert (runs.build, runs.builder, runs._computing) == (None, None, set())
    assert torch.get_default_dtype() == torch.float32


class Watched(LlamaForCausalLM):
    """A model that sets an event while it is built."""

    config_class = LlamaConfig
    while_building: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, config: LlamaConfig) -> None:
        type(self).while_building()
        super().__init__(config)


class StreamingWatched(StreamingModel):
    model_class = Watched


def at_layer(model: StreamingModel, index: int, do: Callable[[], object]) -> Any:
    return model.model.model.layers[index].register_forward_pre_hook(lambda *_: (do(), None)[1])


@contextmanager
def opened(store: Path, count: int = 1) -> Iterator[list[StreamingModel]]:
    with ExitStack() as stack:
        yield [stack.enter_context(StreamingModel.open(opener(store), LLAMA, cache_size=1)) for _ in range(count)]


def open_and_close(store: Path, dtype: str = "bfloat16") -> torch.dtype:
    with StreamingModel.open(opener(store), LLAMA, dtype=dtype) as model:
        return model.model.dtype


def test_a_layer_makes_its_tensors_as_if_nobody_built(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, computed = threading.Event(), threading.Event()
    seen: list[torch.dtype] = []
    built: list[torch.dtype] = []

    def scale(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        factor = torch.tensor(1 / 3)  # of the default dtype
        seen.append(factor.dtype)
        return (inputs[0] * factor,)

    def while_building() -> None:
        built.append(torch.get_default_dtype())
        inside.set()
        until(lambda: computed.is_set() or is_building())  # both threads end, with or without an error

    monkeypatch.setattr(Watched, "while_building", while_building)
    with opened(store) as [model]:
        layers = model.model.model.layers
        hooks = [layer.register_forward_pre_hook(scale) for layer in layers]
        expected = model(input_ids=IDS).logits
        hooks[1].remove()

        def build() -> None:
            StreamingWatched.open(opener(store), LLAMA, dtype="bfloat16").close()

        others: list[Other] = []
        at_layer(model, 0, lambda: others.append(Other(build)))
        at_layer(model, 1, lambda: until(lambda: inside.is_set() or is_building()))
        layers[1].register_forward_pre_hook(scale)
        at_layer(model, 1, computed.set)
        found = model(input_ids=IDS).logits
        others[0].end()
    assert built == [torch.bfloat16]
    assert set(seen) == {torch.float32}
    assert torch.equal(found, expected)


def test_a_run_does_not_begin_while_another_model_is_built(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pause = Pause()
    order: list[str] = []
    monkeypatch.setattr(Watched, "while_building", lambda: pause() and order.append("built"))
    with opened(store) as [model]:
        at_layer(model, 0, lambda: order.append("layer"))
        build = Other(lambda: StreamingWatched.open(opener(store), LLAMA, dtype="bfloat16").close())
        assert pause.reached.wait(60)
        run = Other(lambda: model.run(lambda inner: (order.append("work"), inner(input_ids=IDS))))
        until(lambda: model._current)
        pause.go_on.set()
        build.end()
        run.end()
    assert order == ["built", "work", "layer"]


def test_a_model_of_the_default_dtype_is_built_while_another_runs(store: Path) -> None:
    with opened(store) as [model]:

        def build_in_another_thread() -> None:
            Other(lambda: open_and_close(store, "float32")).end()

        at_layer(model, 1, build_in_another_thread)
        model(input_ids=IDS)


def test_hooks_of_several_runs_build_models_at_once(store: Path) -> None:
    meeting = threading.Barrier(2)
    found: list[torch.dtype] = []

    def build() -> None:
        if meeting.wait(60):
            until(is_building)  # the other thread builds, and waits for this run
        found.append(skeleton_of(LLAMA, dtype=torch.bfloat16).dtype)  # without waiting for a manifest

    with opened(store, 2) as models:
        for model in models:
            at_layer(model, 1, build)
        others = [Other(lambda model=model: model(input_ids=IDS)) for model in models]  # type: ignore[misc]
        for other in others:
            other.end()
    assert found == [torch.bfloat16] * 2


def test_a_run_uses_a_model_that_another_thread_is_just_opening(store: Path) -> None:
    both = StreamingModel(opener(store), LLAMA, dtype="bfloat16")
    started = threading.Event()

    def build() -> None:
        assert started.wait(60)
        both.__enter__()

    def use() -> None:
        started.set()
        until(is_building)  # it waits for this run, and has begun to open the model
        assert both(input_ids=IDS).logits.dtype == torch.bfloat16

    with opened(store) as [model]:
        at_layer(model, 1, use)
        other = Other(build)
        model(input_ids=IDS)
        other.end()
    both.close()


@pytest.mark.parametrize("use", [lambda model: model(input_ids=IDS), StreamingModel.close], ids=["run", "close"])
def test_a_run_waits_for_a_model_whose_run_waits_for_a_build(store: Path, use: Callable[[StreamingModel], Any]) -> None:
    first_in, second_in = threading.Event(), threading.Event()
    ended: list[str] = []

    def run_first(model: StreamingModel) -> None:
        try:
            model(input_ids=IDS)
        except ModelClosedError:
            ended.append("closed")

    with opened(store, 2) as [first, second]:

        def in_first() -> None:
            first_in.set()
            until(is_building)

        def in_second() -> None:
            second_in.set()
            until(is_building)
            until(lambda: len(runs._computing) == 1)  # the first run waits at its next layer
            handle.remove()
            use(first)

        handle = at_layer(first, 1, in_first)
        at_layer(second, 1, in_second)
        one = Other(lambda: run_first(first))
        assert first_in.wait(60)
        two = Other(lambda: second(input_ids=IDS))
        assert second_in.wait(60)
        assert open_and_close(store) == torch.bfloat16
        one.end()
        two.end()
    assert ended == (["closed"] if use is StreamingModel.close else [])


class ThreeThreads:
    """One thread computes from the start, one builds, and one waits at a layer until the others have met."""

    def __init__(self, run: Run) -> None:
        self.computed, self.inside, self.built = threading.Event(), threading.Event(), threading.Event()
        self.run, self.error = run, ""
        self.busy = Other(self._compute)
        until(lambda: len(runs._computing) == 1)
        self.layer = Other(self._pause)
        until(lambda: len(runs._computing) == 2)
        self.builder = Other(self._build)
        until(lambda: len(runs._computing) == 1)

    def _compute(self) -> None:
        with runs.computing():
            assert self.computed.wait(60)

    def _pause(self) -> None:
        with runs.computing():
            until(is_building)
            try:
                self.run.pause()
            except ModelError as exc:
                self.error = f"{exc}, {'inside' if runs.builder else 'outside'}"

    def _build(self) -> None:
        with runs.building(torch.bfloat16, lambda: None, where="toy"):
            self.inside.set()
            assert self.built.wait(60)

    def end(self) -> None:
        for event in (self.computed, self.built):
            event.set()
        for other in (self.busy, self.layer, self.builder):
            other.end()


def test_an_interrupted_run_ends_before_a_build_that_has_not_begun() -> None:
    run = Run()
    threads = ThreeThreads(run)
    run.interrupt(ModelError("enough"))
    threads.layer.end()
    assert not threads.inside.is_set()
    assert threads.error == "enough, outside"
    threads.end()


def test_an_interrupted_run_goes_on_once_the_build_has_ended() -> None:
    run = Run()
    threads = ThreeThreads(run)
    threads.computed.set()
    assert threads.inside.wait(60)
    run.interrupt(ModelError("enough"))
    threads.end()
    assert threads.error == "enough, outside"


def test_a_build_does_not_wait_for_a_run_that_waits_for_weights() -> None:
    weights: Future[None] = Future()

    def run() -> None:
        with runs.computing():
            Run().wait_for(weights)
            assert torch.get_default_dtype() == torch.float32

    other = Other(run)
    skeleton = skeleton_of(
        LLAMA, dtype=torch.bfloat16, accepts=lambda _: weights.done() or not weights.set_result(None)
    )
    assert skeleton.dtype == torch.bfloat16
    other.end()


@pytest.mark.parametrize("error", [UnsupportedModelError("no"), KeyboardInterrupt()])
def test_a_build_that_fails_lets_the_runs_go_on(store: Path, error: BaseException) -> None:
    def fail(_: object) -> bool:
        raise error

    def build() -> None:
        with pytest.raises(type(error)):
            skeleton_of(LLAMA, dtype=torch.bfloat16, accepts=fail)

    with opened(store) as [model]:
        others: list[Other] = []
        at_layer(model, 1, lambda: (others.append(Other(build)), until(is_building)))
        model(input_ids=IDS)
        others[0].end()


@pytest.mark.parametrize("error", [ModelClosedError("closed"), KeyboardInterrupt()])
def test_a_build_that_waits_can_be_interrupted(store: Path, error: BaseException) -> None:
    def check() -> None:
        raise error

    def build() -> None:
        with pytest.raises(type(error)), runs.building(torch.bfloat16, check, where="toy"):
            raise AssertionError("it was not to begin")

    with opened(store) as [model]:
        at_layer(model, 1, lambda: Other(build).end())
        model(input_ids=IDS)


def test_closing_a_model_ends_the_wait_to_build_it(store: Path) -> None:
    model = StreamingModel(opener(store), LLAMA, dtype="bfloat16")

    def build() -> None:
        with pytest.raises(ModelClosedError, match="llama is closed"):
            model.__enter__()

    def close() -> None:
        other = Other(build)
        until(is_building)
        model.close()
        other.end()

    with opened(store) as [running]:
        at_layer(running, 1, close)
        running(input_ids=IDS)


def test_a_model_may_be_closed_by_the_thread_that_builds_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamingWatched(opener(store), LLAMA)
    monkeypatch.setattr(Watched, "while_building", model.close)
    model.__enter__()
    assert repr(model).endswith("closed>")
    assert not any(module._forward_hooks for module in model.model.modules())
    with pytest.raises(ModelClosedError, match="llama is closed"):
        model(input_ids=IDS)


def test_a_run_that_waits_for_the_build_it_holds_up_is_told_in_the_end(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_dtype, "_LAYER_SECONDS", 0)

    def build() -> None:
        with pytest.raises(ModelError, match=r"llama cannot be built: .* open this one before it"):
            open_and_close(store)

    with opened(store) as [model]:
        at_layer(model, 1, lambda: Other(build).end())
        model(input_ids=IDS)


def test_many_models_run_and_are_built_at_once(store: Path) -> None:
    built = threading.Semaphore(0)
    seen: set[torch.dtype] = set()

    def build(dtype: torch.dtype) -> None:
        try:
            for _ in range(8):
                assert {parameter.dtype for parameter in skeleton_of(LLAMA, dtype=dtype).model.parameters()} == {dtype}
        finally:
            built.release()

    def run(model: StreamingModel, ended: threading.Event, expected: torch.Tensor) -> None:
        while not ended.is_set():
            assert torch.equal(model(input_ids=IDS).logits, expected)

    ended = threading.Event()
    with opened(store, 3) as models:
        expected = models[0](input_ids=IDS).logits
        for model, other in zip(models, models[1:] + models[:1], strict=True):
            for layer in model.model.model.layers:
                layer.register_forward_pre_hook(lambda *_: seen.add(torch.zeros(1).dtype))
            at_layer(model, 2, lambda other=other: other.get_cache_info())  # type: ignore[misc]
        at_layer(models[0], 3, lambda: models[1].run(lambda inner: inner.lm_head.weight.shape))
        running = [Other(lambda model=model: run(model, ended, expected)) for model in models]  # type: ignore[misc]
        building = [Other(lambda dtype=dtype: build(dtype)) for dtype in (torch.bfloat16, torch.float16)]  # type: ignore[misc]
        assert all(built.acquire(timeout=60) for _ in building)
        ended.set()
        for other_thread in building + running:
            other_thread.end()
    assert seen == {torch.float32}
