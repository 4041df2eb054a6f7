"""Loads experts once a router has chosen them, and evicts them, as their table decides.

The experts of a module lie in an `Arena`: the stacks that transformers computes with are views over all of it, but only
resident experts take memory. So the forward is transformers' own, with the same indices, strides within an expert and
kernels as with the whole model in memory.

Invariants: a module runs only when all experts that it uses are resident and verified, and they are not evicted before
it has run; while a load still writes to memory, the memory is not freed and the expert is not loaded again.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial

import torch

from surfw.errors import ManifestError, ModelClosedError
from surfw.manifest import Experts, Manifest, slice_name
from surfw.metrics import Metrics
from surfw.runtime.arena import Arena, arena_stride
from surfw.runtime.buffers import Buffer, buffer_capacity
from surfw.runtime.expert_stack import ExpertStack
from surfw.runtime.expert_table import Decision, ExpertTable, Key
from surfw.runtime.loader import Loader, as_parameter, buffer_bytes, flat_view, packed_form, tensor_places
from surfw.runtime.packed import values_of
from surfw.runtime.plan import ResidencyPlan
from surfw.runtime.run import IoThread, Job, Run
from surfw.skeleton.dtypes import torch_dtype

logger = logging.getLogger("surfw.runtime")

_AT_A_TIME = 8
"""How many experts are loaded concurrently; each is large enough to keep a source busy."""

_WARM_AT_A_TIME, _GUESSES_AT_A_TIME = 2, 4
_MOSTLY = 0.5
_GUESSES = 32
"""About how many of the last guesses at absent experts count: if half of them were right, guesses are prefetched."""
_PROBE = 8
"""While guesses are not acted upon, they are made only for every eighth token, to measure how often they are right."""

_DEMAND, _AHEAD = 0, 1 << 29


class _Stacks:
    """The experts of one module: their places, and the stacks over them.

    Attributes:
        experts: as given.
        arena: the memory of the experts.
        flat: the whole arena, as uint8.
        tensors: the stacks, by name.
    """

    def __init__(self, experts: Experts, size_bytes: int, loader: Loader, read: Callable[[str], torch.Tensor]) -> None:
        kinds = {form.kinds if (form := packed_form(chunk)) else () for chunk in experts.chunks}
        if len(kinds) > 1:
            raise ManifestError(f"the experts of {experts.path} are not all quantised alike; chunk the model again")
        self.experts = experts
        self.arena = Arena(len(experts.chunks), size_bytes)
        self._loader = loader
        self._read = read
        with torch.inference_mode(mode=False):  # or they could not be used outside of that mode
            self.flat = torch.frombuffer(self.arena.view, dtype=torch.uint8)
        self.tensors = self.over(self.flat)

    def over(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stacks, as parameters over memory with the arena's layout: uint8, of its size or more."""
        first, dtypes = self.experts.chunks[0], self._loader.dtypes
        places = tensor_places(first, dtypes).items()
        made: dict[str, torch.Tensor] = {}
        matrices = partial(self._matrices, flat, {})
        with torch.inference_mode(mode=False):
            for (name, stack), (slice_, place) in zip(self.experts.stacks.items(), places, strict=True):
                dtype = dtypes.get(slice_, torch_dtype(stack.dtype))
                if place is not None:
                    made[name] = as_parameter(_stack(flat, place, self.arena.stride, stack.shape, dtype))
                else:
                    like = torch.empty(stack.shape, dtype=dtype, device="meta")
                    made[name] = ExpertStack(like, partial(matrices, name), partial(self._read, name), flat.device)
        return made

    def _matrices(
        self, flat: torch.Tensor, known: dict[int, dict[str, torch.Tensor]], name: str, index: int
    ) -> torch.Tensor:
        """The packed matrix of an expert in the named stack, over memory with the arena's layout."""
        if index not in known:
            start = index * self.arena.stride
            with torch.inference_mode(mode=False):
                place = flat[start : start + self.arena.size_bytes]
                known[index] = self._loader.expert_tensors(self.experts.chunks[index], place)
        return known[index][slice_name(name, index)]

    def changed(self) -> None:
        """Make backward passes fail that still need evicted weights, instead of computing wrong gradients."""
        for tensor in self.tensors.values():
            torch.autograd.graph.increment_version(tensor)


class ExpertPool:
    """Loads and evicts the experts of one model.

    One forward at a time may use it; the other methods may be called from any thread.

    Attributes:
        table: which experts are resident.
        is_ahead: as given.
        on_cramped: called when memory granted by `afford` has to be freed.
        read_whole: paths of modules that multiply absent experts by zero. The memory of those must hold finite numbers,
            so nothing is prefetched there.
        tokens: about how many tokens the first module has seen.
    """

    def __init__(
        self,
        manifest: Manifest,
        loader: Loader,
        *,
        io: IoThread,
        metrics: Metrics,
        plan: ResidencyPlan,
        run: Callable[[], Run] = Run,
        is_ahead: bool = True,
    ) -> None:
        """Reserve address space; nothing is loaded yet.

        Args:
            manifest: the model.
            loader: loads chunks into memory.
            io: the thread that the loader works in.
            metrics: counts `expert_hits`, `expert_loads`, and fetched bytes.
            plan: how much memory there is.
            run: returns the current run.
            is_ahead: whether experts are ever prefetched, before a router has chosen them.
        """
        self._loader = loader
        self.is_ahead = is_ahead
        self._io = io
        self._metrics = metrics
        self._run = run
        self._in_pieces = plan.in_pieces
        self._stacks = {
            path: _Stacks(experts, expert_bytes(experts, loader.dtypes), loader, self.read)
            for path, experts in manifest.experts.items()
        }
        self._first = next(iter(self._stacks), "")
        sizes = {path: stacks.arena.size_bytes for path, stacks in self._stacks.items()}
        self.table = ExpertTable(sizes, plan.expert_bytes)
        self._loads: dict[Key, Job[None]] = {}
        self._waiting: dict[Key, asyncio.Semaphore] = {}  # prefetches that have not begun
        self._used: dict[str, list[Key]] = {}  # experts in use, by module
        self._lock = threading.RLock()
        self._name = manifest.name
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._warm_turns, self._guess_turns = asyncio.Semaphore(_WARM_AT_A_TIME), asyncio.Semaphore(_GUESSES_AT_A_TIME)
        self.on_cramped: Callable[[], object] = lambda: None
        self.read_whole: set[str] = set()
        self.tokens = 0
        self._aside = 0  # bytes of the budget that `afford` has granted
        modules = [len(one.experts.chunks) * one.arena.size_bytes for one in self._stacks.values()]
        self._budget_bytes = plan.expert_bytes
        self._least_bytes, self._all_bytes = max(modules, default=0), sum(modules)
        self._expected: dict[str, tuple[set[int], set[int]]] = {}  # all guesses, and those that were not in memory
        self._right = 0.0  # the share of the latter that were right lately

    def stack(self, name: str) -> torch.Tensor | None:
        """A stack, in which only the resident experts have values; None after `close`."""
        stacks = self._stacks.get(name.rpartition(".")[0])
        return stacks.tensors[name] if stacks else None

    def acquire(self, path: str, counts: Sequence[int], used: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """Load the experts that a module uses, and hold them until `release`.

        Args:
            path: the module's.
            counts: how many tokens each expert computes.
            used: the experts that are used, the most wanted first.

        Returns:
            The module's stacks, by name; experts that are not used need not have values.

        Raises:
            SurfwError: an expert could not be loaded, or the run was interrupted.
        """
        run = self._run()
        run.pause()
        # For several tokens, experts are read in the order of the file.
        keys = [(path, index) for index in (used if max(counts) <= 1 else sorted(used))]
        with self._lock:
            for key in self._waiting.keys() & keys:
                self._loads[key].cancel()  # it has not begun; it is loaded again with priority
            written = list(self._loads) if path in self.read_whole else keys
        self._wait_for_ends(written)
        with self._lock:
            self.table.note(path, counts)
            self._compare(path, used)
            if path == self._first:
                self.tokens += max(counts, default=0)
            there = sum(key in self.table for key in keys)
            self._metrics.add("expert_hits", there)
            self._metrics.add("expert_loads", len(keys) - there)
            self._obey(self.table.use(keys))
            self._used[path] = keys
            loads = [self._loads[key] for key in keys if key in self._loads]
        try:
            self._wait(dict.fromkeys(loads))
        except BaseException:
            self.release(path)
            raise
        return self._stacks[path].tensors

    def release(self, path: str) -> None:
        """Note that the module has run: its experts may be evicted."""
        with self._lock:
            self._obey(self.table.let_go(self._used.pop(path, [])))

    def release_all(self) -> None:
        """Note that nothing runs: all experts may be evicted."""
        with self._lock:
            self._used.clear()
            self._collect()
            self.table.release_all(but=self._loads)
            self._obey(self.table.adopt(self.table.budget_bytes))

    def afford(self, size_bytes: int) -> bool:
        """Set this much of the budget aside for another use; False if the experts need it."""
        with self._lock:
            aside = self._aside + size_bytes
            if self._budget_bytes - aside < self._least_bytes:
                return False
            self._aside = aside
            self._obey(self.table.adopt(self._budget_bytes - aside))
            return True

    @property
    def foresees(self) -> bool:
        """Whether to guess which experts will be used: not all of them fit, and recent guesses were mostly right.

        Also true for every eighth token, to measure how often guesses are right.
        """
        is_of_use = self._right >= _MOSTLY or self.tokens % _PROBE == 0
        return self.is_ahead and self._budget_bytes < self._all_bytes and is_of_use

    def expect(self, path: str, likely: Sequence[int]) -> None:
        """Note a guess at the experts a module will use, and prefetch the missing ones if guesses are mostly right."""
        with self._lock:
            for key, turns in list(self._waiting.items()):
                if turns is self._guess_turns:
                    self._loads[key].cancel()  # of an earlier guess
            self._collect()
            new = [key for index in likely if (key := (path, index)) not in self.table]
            self._expected[path] = set(likely), {index for _, index in new}
            if self._right >= _MOSTLY and new and path not in self.read_whole:
                self._obey(self.table.admit(new), self._guess_turns)

    def _compare(self, path: str, used: Sequence[int]) -> None:
        """Compare the guess for a module with the experts that it uses."""
        if guess := self._expected.pop(path, None):
            expected, new = guess
            self._metrics.add("experts_foreseen", len(expected.intersection(used)))
            self._metrics.add("expert_guesses", len(expected))
            for index in new:  # guesses at resident experts cost nothing and gain nothing
                self._right += ((index in used) - self._right) / _GUESSES

    def counts(self) -> dict[str, tuple[float, ...]]:
        """How many tokens each expert of each module has computed; earlier tokens count less."""
        with self._lock:
            return {path: tuple(self.table.counts(path, len(one.experts.chunks))) for path, one in self._stacks.items()}

    def warm(self, counts: Mapping[str, Sequence[float]]) -> None:
        """Start from the counts of an earlier run, and begin to load the experts that were chosen most."""
        with self._lock:
            for path, known in counts.items():
                self.table.remember(path, known)
            wanted = [key for key in self.table.worthiest() if key[0] not in self.read_whole]
            self._obey(self.table.admit(wanted), self._warm_turns)

    def read(self, name: str) -> torch.Tensor:
        """A copy of a whole stack for the caller; which experts are resident stays as it was.

        Raises:
            SurfwError: an expert could not be loaded.
        """
        stacks = self._stacks[name.rpartition(".")[0]]
        size_bytes, like = stacks.arena.size_bytes, stacks.tensors[name]
        whole = torch.empty(like.shape, dtype=like.dtype)
        buffer = Buffer(size_bytes)
        for index, chunk in enumerate(stacks.experts.chunks):
            self._io.run(self._loader.load(chunk, buffer, priority=_DEMAND))
            whole[index] = values_of(self._loader.expert_tensors(chunk, flat_view(buffer))[slice_name(name, index)])
        return as_parameter(whole)

    def adopt(self, plan: ResidencyPlan) -> None:
        """Adopt another plan."""
        with self._lock:
            self._in_pieces, self._budget_bytes = plan.in_pieces, plan.expert_bytes
            if self._aside and plan.expert_bytes - self._aside < self._least_bytes:
                self.on_cramped()
                self._aside = 0
            self._obey(self.table.adopt(plan.expert_bytes - self._aside))
            if self.table.held_bytes > self.table.budget_bytes:
                for key in list(self._waiting):  # not begun, they write to no memory yet; others may begin meanwhile
                    self._loads[key].cancel()

    def clear(self) -> None:
        """Evict all idle experts."""
        with self._lock:
            self._collect()
            self._obey(self.table.clear())

    def close(self) -> None:
        """Free everything, and cancel loads in flight; their memory is freed once nothing writes to it any more."""
        with self._lock:
            for load in self._loads.values():
                load.cancel()
            self._loads.clear()
            self._waiting.clear()
            self._stacks.clear()

    @property
    def largest_bytes(self) -> int:
        """The address space of the largest arena, in bytes."""
        return max((len(stacks.flat) for stacks in self._stacks.values()), default=0)

    def stacks_over(self, path: str, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stacks of a module over other memory, such as a device's: uint8, of `largest_bytes`."""
        stacks = self._stacks[path]
        return stacks.over(flat[: len(stacks.flat)])

    def places(self, path: str, used: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """For each used expert of a module: its offset in the arena, and its memory as uint8."""
        arena, flat = self._stacks[path].arena, self._stacks[path].flat
        for index in used:
            start = index * arena.stride
            yield start, flat[start : start + arena.size_bytes]

    @property
    def resident_bytes(self) -> int:
        """Memory of all experts that are resident or in flight."""
        return self.table.held_bytes

    def resident(self) -> list[str]:
        """Names of the chunks of resident experts."""
        with self._lock:
            self._collect()
            return [
                chunk.name
                for path, stacks in self._stacks.items()
                for index, chunk in enumerate(stacks.experts.chunks)
                if (path, index) in self.table and (path, index) not in self._loads
            ]

    def _obey(self, decision: Decision, turns: asyncio.Semaphore | None = None) -> None:
        """Carry out a decision; prefetches wait for `turns`, and can be cancelled until they begin."""
        for path, index in decision.evict:
            self._stacks[path].arena.give_back(index)
        for path in {path for path, _ in decision.evict}:
            self._stacks[path].changed()
        try:
            if turns is not None:
                for key in decision.load:
                    self._waiting[key] = turns
                    self._loads[key] = self._io.submit(self._fill_ahead(key, turns))
            elif decision.load:
                load = self._io.submit(self._fill(decision.load))
                self._loads |= dict.fromkeys(decision.load, load)
        except BaseException:  # nothing loads the rest, so it must not count as resident
            for key in set(decision.load) - self._loads.keys():
                self._waiting.pop(key, None)
                self.table.loaded(key)
                self.table.drop([key])
            raise

    async def _fill(self, keys: Sequence[Key]) -> None:
        """Load experts into their places, in order; the first failure is raised once all have ended."""
        works = [asyncio.ensure_future(self._fill_in_turn(key)) for key in keys]
        try:
            await asyncio.gather(*works)
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    async def _fill_in_turn(self, key: Key) -> None:
        async with self._turns:
            await self._fill_one(key, _DEMAND)

    async def _fill_ahead(self, key: Key, turns: asyncio.Semaphore) -> None:
        async with turns:
            self._waiting.pop(key, None)
            await self._fill_one(key, _AHEAD)

    async def _fill_one(self, key: Key, priority: int) -> None:
        stacks = self._stacks[key[0]]
        chunk, place = stacks.experts.chunks[key[1]], stacks.arena.place(key[1])
        start = time.perf_counter()
        form = await self._loader.load(chunk, place, priority=priority, in_pieces=self._in_pieces)
        self._metrics.add("fetched_bytes", form.stored_bytes)
        self._metrics.add("expert_bytes", form.stored_bytes)
        self._metrics.latency("fetch").observe(time.perf_counter() - start)

    def _wait(self, loads: Mapping[Job[None], None]) -> None:
        """Wait until loads have ended; if one fails, cancel the others and raise its error."""
        run = self._run()
        try:
            for load in loads:
                if not load.done():
                    with self._metrics.span("stall"):
                        run.wait_for(load)
                load.result()
        except CancelledError as exc:
            raise ModelClosedError(f"the source of {self._name} was closed while it was read") from exc
        except BaseException:
            for load in loads:
                load.cancel()
            raise
        finally:
            with self._lock:
                self._collect()

    def _wait_for_ends(self, keys: Sequence[Key]) -> None:
        """Wait until no cancelled load writes to the memory of these experts any more."""
        for key in keys:
            load = self._loads.get(key)
            if load is not None and load.is_ending:
                self._run().wait_for(load)
        with self._lock:
            self._collect()

    def _collect(self) -> None:
        """Note which loads have ended, and free the memory of those that failed."""
        for key, load in list(self._loads.items()):
            if load.done():
                del self._loads[key]
                self._waiting.pop(key, None)
                self.table.loaded(key)
                if load.cancelled() or load.exception() is not None:
                    self.table.drop([key])
                    self._stacks[key[0]].arena.give_back(key[1])


def expert_bytes(experts: Experts, dtypes: Mapping[str, torch.dtype]) -> int:
    """The memory that each expert of a module takes: that of the largest one, in whole pages."""
    return buffer_capacity(max(buffer_bytes(chunk, dtypes) for chunk in experts.chunks))


def stacked_bytes(manifest: Manifest, dtypes: Mapping[str, torch.dtype]) -> int:
    """The size of the largest arena in bytes: address space in host memory, real memory on a device."""
    arenas = [len(one.chunks) * arena_stride(expert_bytes(one, dtypes)) for one in manifest.experts.values()]
    return max(arenas, default=0)


def _stack(flat: torch.Tensor, place: int, stride: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A view of uint8 memory in this shape: its first item begins at `place`, each next one `stride` bytes later."""
    inner = torch.empty(shape[1:], device="meta").stride()
    return torch.as_strided(flat.view(dtype), shape, (stride // dtype.itemsize, *inner), place // dtype.itemsize)
