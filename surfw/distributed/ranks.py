"""Communication between the ranks of a job while they load: agreement on failures, and exchange of tensors.

It uses its own gloo group, whatever backend the job computes with, so that a rank that dies or hangs is detected within
the timeout and can be named. Every rank must call the same methods in the same order.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from surfw.errors import RankError

_WORDS_BYTES = 512
_DATA, _WORDS = 0, 1
_FAREWELL_SECONDS = 2.0
"""How long a rank that ends with an error waits for the other ranks to receive it."""

Doing = Callable[[int], str]
"""Describes what a rank, given by its number, is doing now, for error messages."""


class Ranks:
    """The ranks of the default process group, or a single rank if there is no group."""

    def __init__(self, timeout_seconds: float) -> None:
        """Create the gloo group; a collective call."""
        self._timeout = timedelta(seconds=timeout_seconds)
        self.count, self.rank = 1, 0
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            self.count, self.rank = dist.get_world_size(), dist.get_rank()
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def __enter__(self) -> Self:
        """Enter the context."""
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Destroy the group."""
        if self._group is not None:
            with suppress(RuntimeError):  # a rank is gone
                dist.destroy_process_group(self._group)
            self._group = None

    def gather(self, mine: object, doing: Doing) -> list[Any]:
        """Gather one object from each rank, in rank order.

        Raises:
            RankError: a rank is gone, or does not answer.
        """
        self.agree("", doing)  # unlike a collective, this can name a missing rank
        if self._group is None:
            return [mine]
        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, mine, group=self._group)
        except RuntimeError as exc:
            raise RankError(f"another process of the job is gone: {_first(exc)}; see what it says itself") from exc
        return found

    def agree(self, trouble: str, doing: Doing) -> None:
        """Wait for all ranks and exchange errors; `trouble` is this rank's error, empty if it has no error.

        Raises:
            RankError: another rank reported an error, is gone, or does not answer within the timeout.
        """
        if self._group is None:
            return
        words = trouble.encode()[:_WORDS_BYTES]
        mine = torch.zeros(_WORDS_BYTES, dtype=torch.uint8)
        mine[: len(words)] = torch.frombuffer(bytearray(words or b"\0"), dtype=torch.uint8)[: len(words)]
        others = [rank for rank in range(self.count) if rank != self.rank]
        heard = {rank: torch.zeros(_WORDS_BYTES, dtype=torch.uint8) for rank in others}
        lost: dict[int, str] = {}
        sending, receiving = {}, {}
        for rank in others:
            try:
                receiving[rank] = dist.irecv(heard[rank], rank, group=self._group, tag=_WORDS)
                sending[rank] = dist.isend(mine, rank, group=self._group, tag=_WORDS)
            except RuntimeError as exc:
                lost[rank] = _first(exc)
        self._wait_for(receiving, lost)
        told = {rank: bytes(heard[rank].tolist()).rstrip(b"\0").decode(errors="replace") for rank in others}
        is_wrong = bool(trouble or lost or any(told.values()))
        self._wait_for(sending, {} if is_wrong else lost, seconds=_FAREWELL_SECONDS if is_wrong else None)
        if trouble:
            return  # the caller raises its own, more precise error
        for rank, text in told.items():
            if text:
                raise RankError(f"rank {rank} of {self.count} failed {doing(rank)}: {text}")
        self._expect_nobody(lost, doing)

    def exchange(
        self, sent: Mapping[int, Sequence[torch.Tensor]], received: Mapping[int, Sequence[torch.Tensor]], doing: Doing
    ) -> None:
        """Send tensors to other ranks and receive theirs in place; both sides must list them in the same order.

        Raises:
            RankError: a rank is gone, or does not answer within the timeout.
        """
        lost: dict[int, str] = {}
        work: list[tuple[int, Any]] = []
        for call, all_of_them in ((dist.irecv, received), (dist.isend, sent)):
            for rank, tensors in all_of_them.items():
                try:
                    work += [(rank, call(tensor, rank, group=self._group, tag=_DATA)) for tensor in tensors]
                except RuntimeError as exc:
                    lost[rank] = _first(exc)
        for rank, one in work:
            self._wait_for({rank: one}, lost)
        self._expect_nobody(lost, doing)

    def _wait_for(self, work: Mapping[int, Any], lost: dict[int, str], *, seconds: float | None = None) -> None:
        """Wait for pending operations, by rank. Failed ranks are added to `lost`; lost ranks are skipped."""
        for rank, one in work.items():
            if rank in lost:
                continue
            try:
                one.wait(self._timeout if seconds is None else timedelta(seconds=seconds))
            except RuntimeError as exc:
                lost[rank] = _first(exc)

    def _expect_nobody(self, lost: Mapping[int, str], doing: Doing) -> None:
        for rank, why in lost.items():
            is_late = "imed out" in why
            seen = f"did not answer within {self._timeout.total_seconds():.0f} s" if is_late else "is gone"
            raise RankError(
                f"rank {rank} of {self.count} {seen} {doing(rank)}; see what its own output says, and start the job "
                "again: what a disk cache has is not fetched twice"
            )


def expect_one_model(identities: Sequence[str], rank: int) -> None:
    """Check that all ranks have the same model; the stored forms may differ between their sources.

    Args:
        identities: the `Manifest.identity` of each rank's model.
        rank: this rank.

    Raises:
        RankError: a rank has another model.
    """
    mine = identities[rank]
    for other, identity in enumerate(identities):
        if identity != mine:
            raise RankError(
                f"rank {other} has another model than rank {rank} (identities {identity[:16]}… and {mine[:16]}…); give "
                "all ranks the same source and name"
            )


def _first(exc: BaseException) -> str:
    """The first line of an exception from torch."""
    return str(exc).partition("\n")[0][:200]


def this_host() -> str:
    """A text that identifies this machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{platform.node()} {boot}"
