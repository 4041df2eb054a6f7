"""The plan that an engine obeys, as it changes: with the schedule that is learned, and with the room there is.

Whatever asks for another plan gets it, or an error, and then all stays as it was. Not thread-safe: the engine has the
lock.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from surfw.errors import ConfigurationError
from surfw.manifest import Manifest
from surfw.runtime.plan import Limit, Needs, ResidencyPlan, least_bytes, next_uses, plan_residency
from surfw.runtime.rows import TableUnit
from surfw.runtime.schedule import Phases, Schedule


class Planning:
    """What is known of a model's needs, its schedule and its limit, and the plan that follows from it.

    Attributes:
        plan: the plan there is.
        limit: what it was made for.
        uses: the chunks of each module.
        tables: modules that can run while their tables are not in memory.
    """

    def __init__(
        self,
        manifest: Manifest,
        needs: Needs,
        limit: Limit,
        *,
        phases: Phases | None = None,
        tables: Mapping[str, TableUnit] | None = None,
    ) -> None:
        """Make a plan.

        Args:
            manifest: the model.
            needs: what it needs.
            limit: what may be kept.
            phases: what is known of the order in which modules run; default: the manifest's, as a cycle.
            tables: modules that can run while their tables are not in memory.

        Raises:
            ConfigurationError: the limit is too small for the model.
        """
        self.limit = limit
        self.uses = {use.module: use.chunks for use in manifest.order}
        self.tables = tables or {}
        self._needs = needs
        self._forced: frozenset[str] = frozenset()  # used outside of their modules' forward, so they stay
        self._whole: frozenset[str] = frozenset()  # tables that rows were not enough of
        self._schedule = Schedule(phases or Phases(cycle=tuple(self.uses)))
        self._planned_version = self._schedule.version
        self.plan = self._make_plan()

    def begin(self) -> None:
        """A run begins."""
        self._schedule.begin()

    def observe(self, module: str) -> bool:
        """Note what runs. Another schedule gets another plan, where its cycle begins.

        Returns:
            Whether there is another plan now.
        """
        self._schedule.observe(module)
        if self._schedule.version == self._planned_version:
            return False
        _, cycle = self._schedule.cycle()
        if not cycle or module != cycle[0]:
            return False
        self._change()
        return True

    def stays(self, name: str) -> bool:
        """Whether a chunk stays whatever is planned."""
        return name in self._needs.fixed or name in self._forced

    def size_bytes(self, name: str) -> int:
        """What a chunk takes in memory."""
        return self._needs.sizes[name]

    def force(self, module: str) -> frozenset[str]:
        """Have the chunks of a module stay from now on.

        Returns:
            Those that did not have to until now.

        Raises:
            ConfigurationError: there is no room to keep them.
        """
        forced = frozenset(name for name in self.uses[module] if not self.stays(name))
        if forced:
            try:
                self._change(_forced=self._forced | forced)
            except ConfigurationError as exc:
                raise ConfigurationError(
                    f"weights of {module} are used outside of its forward, so they have to stay in memory: {exc}"
                ) from exc
        return forced

    def read_whole(self, names: Sequence[str]) -> bool:
        """Have a place for those of these chunks that are tables which only rows were to be read of.

        Returns:
            Whether there are any, and another plan.

        Raises:
            ConfigurationError: there is no room for one.
        """
        absent = self.plan.absent.intersection(names)
        if absent:
            self._change(_whole=self._whole | absent)
        return bool(absent)

    def reserve(self, size_bytes: int, *, or_less: bool) -> bool:
        """Leave so much of the budget free from now on, or, if that will do, what the model does not need to run.

        Returns:
            Whether there is another plan.

        Raises:
            ConfigurationError: the model does not run with the rest.
        """
        if or_less and self.limit.budget_bytes is not None:
            needs, cycle, before = self._planned()
            least = least_bytes(needs.in_pieces(), cycle, before)
            size_bytes = max(0, min(size_bytes, self.limit.budget_bytes - least))
        if size_bytes == self.limit.reserved_bytes:
            return False
        self._change(limit=replace(self.limit, reserved_bytes=size_bytes))
        return True

    def set_limit(self, limit: Limit) -> None:
        """Plan for another limit from now on.

        Raises:
            ConfigurationError: it is too small for the model.
        """
        self._change(limit=limit)

    def plan_with(self, limit: Limit) -> ResidencyPlan:
        """The plan that there would be with another limit.

        Raises:
            ConfigurationError: the limit is too small for the model.
        """
        return self._make_plan(limit)

    @property
    def least_budget_bytes(self) -> int:
        """The smallest budget that the model runs with, from any source, and that leaves what is reserved now."""
        needs, cycle, before = self._planned()
        return least_bytes(needs.from_anywhere(), cycle, before) + self.limit.reserved_bytes

    def upcoming(self) -> Iterator[str]:
        """The chunks that are used next, as far as one can tell; not those of tables that rows are read of."""
        seen: set[str] = set()
        for module in self._schedule.upcoming(len(self.uses)):
            by_rows = self.plan.tables if module in self.tables else frozenset[str]()
            for name in self.uses[module]:
                if name not in seen and name not in by_rows:
                    seen.add(name)
                    yield name

    def next_uses(self) -> dict[str, int]:
        """How soon each chunk is used again, as far as one can tell."""
        return next_uses(self._chunks(list(self._schedule.upcoming(2 * len(self.uses)))))

    def _change(self, **attributes: Any) -> None:
        """Another plan for these attributes; if there is none, they stay as they were."""
        before = {name: getattr(self, name) for name in attributes}
        self._set(attributes)
        try:
            self.plan = self._make_plan()
        except BaseException:
            self._set(before)
            raise
        self._planned_version = self._schedule.version

    def _set(self, attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    def _make_plan(self, limit: Limit | None = None) -> ResidencyPlan:
        needs, cycle, before = self._planned()
        return plan_residency(needs, limit or self.limit, cycle, before)

    def _planned(self) -> tuple[Needs, list[str], list[str]]:
        """What a plan is made for: the needs, and the chunks in the cycle and before it."""
        before, cycle = self._schedule.cycle()
        needs = replace(self._needs, fixed=self._needs.fixed | self._forced, tables=self._tables_now())
        return needs, self._chunks(cycle), self._chunks(before)

    def _tables_now(self) -> frozenset[str]:
        return self._needs.tables - self._forced - self._whole

    def _chunks(self, modules: Collection[str]) -> list[str]:
        """The chunks that modules use, in order; not those that stay anyway, and not tables that are looked up in."""
        tables = self._tables_now()
        return [
            name
            for module in modules
            for name in self.uses[module]
            if name not in self._needs.fixed and not (module in self.tables and name in tables)
        ]
