"""What `--explain` shows: a model's memory and limits, in rows of a name and a text."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from surfw.cli import render
from surfw.cli.infer_summary import place_of
from surfw.cli.status import percent
from surfw.config import GB, count, format_size
from surfw.settings import SettingOrigin

if TYPE_CHECKING:
    from surfw.models.explain import Explanation

_SHOWN_NAMES = 3
_PLACES = {"link": "over the link", "server": "from the server", "disk": "from storage", "storage": "from storage"}


def facts(explanation: "Explanation", origins: Mapping[str, SettingOrigin]) -> dict[str, Any]:
    """Return what `--json` prints; `limited_from` is `argument`, `variable`, `file` or `default`."""
    return asdict(explanation) | {"ceiling": explanation.ceiling, "limited_from": _origin(explanation, origins).kind}


def show(explanation: "Explanation", origins: Mapping[str, SettingOrigin], console: Console) -> None:
    """Print an explanation: a table on a terminal, plain lines elsewhere."""
    rows = explanation_rows(explanation, _origin(explanation, origins))
    if console.is_terminal:
        console.print(render.pair_table("", rows))
        return
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        console.print(f"{name:<{width}}  {text}", soft_wrap=True)


def _origin(explanation: "Explanation", origins: Mapping[str, SettingOrigin]) -> SettingOrigin:
    """Return the origin of the setting that limits memory: `cache_layers`, `device_memory` or `memory_budget`."""
    return origins["memory_budget" if explanation.limited_by == "default" else explanation.limited_by]


def explanation_rows(one: "Explanation", origin: SettingOrigin) -> list[tuple[str, str]]:
    """Return all rows; each follows from those before it."""
    return [*_memory_rows(one, origin), *_speed_rows(one)]


def _memory_rows(one: "Explanation", origin: SettingOrigin) -> list[tuple[str, str]]:
    is_device = one.host_budget_bytes is not None
    rows = [("memory budget", _budget(one, origin)), ("stays in memory", _kept(one))]
    if is_device:
        rows = [("device", one.device), ("device memory", _budget(one, origin)), ("stays on the device", _kept(one))]
    if one.ring_buffers:
        ring = f"a ring of {count(one.ring_buffers, 'buffer')} of {format_size(one.ring_bytes)}"
        rows.append(("the rest passes through", ring + (" (policy lru)" if one.policy == "lru" else "")))
    if one.shared_bytes:
        rows.append(("shared by layers that recur", format_size(one.shared_bytes)))
    if one.by_rows:
        rows.append(("read by rows", render.list_names(one.by_rows, _SHOWN_NAMES)))
    beside = f"{format_size(one.overhead_bytes)}, and {format_size(one.reserved_bytes)} for the KV cache"
    rows += [
        ("beside the weights", beside),
        ("peak", f"{format_size(one.peak_bytes)}; with {format_size(one.least_budget_bytes)} it runs from any source"),
        ("outside of the budget", f"{format_size(one.base_bytes)} of the process itself, and activations"),
    ]
    if is_device:
        takes = f"{format_size(one.host_peak_bytes or 0)} of {format_size(one.host_budget_bytes or 0)}"
        coded = f", {one.host_coded_layers} of them coded" if one.host_coded_layers else ""
        stay = f"{count(one.host_kept_layers or 0, 'layer')} that the device lacks stay there{coded}"
        rows[-1] = ("host memory", f"{takes}; {stay}")
    return rows


def _budget(one: "Explanation", origin: SettingOrigin) -> str:
    if one.budget_bytes is not None:
        return f"{format_size(one.budget_bytes)}, {_said(one.limited_by, origin)}"
    return f"none: {count(one.cache_layers or 0, 'layer')} and one more in flight, {_said(one.limited_by, origin)}"


def _said(limited_by: str, origin: SettingOrigin) -> str:
    """Say where the limit comes from."""
    if limited_by == "default":
        return "which is what memory there is, less a headroom"
    if origin.kind == "argument":
        return f"as --{limited_by.replace('_', '-')} says"
    return f"as {origin.name} says"


def _kept(one: "Explanation") -> str:
    beside = f" and {count(one.other_parts, 'other part')}" if one.other_parts else ""
    if not (one.ring_buffers or one.by_rows):
        return f"everything: {count(one.layers, 'layer')}{beside}, {format_size(one.pinned_bytes)}; nothing is streamed"
    return f"{one.kept_layers} of {count(one.layers, 'layer')}{beside}, {format_size(one.pinned_bytes)}"


def _speed_rows(one: "Explanation") -> list[tuple[str, str]]:
    rows = []
    if one.reading_ceiling is not None and one.bytes_per_second is not None:
        place = _PLACES[place_of(one.source)]
        coded = "" if one.codec == "none" else f" ({one.codec})"
        how = f"measured just now over {format_size(one.measured_bytes or 0)}"
        read = f"{format_size(one.bytes_per_pass)}{coded}, {place} at {_rate(one.bytes_per_second)} ({how})"
        rows += [
            ("read in a pass", read),
            ("ceiling by reading", f"{_speed(one.reading_ceiling, one)} (bandwidth ÷ bytes in a pass)"),
        ]
    if one.bus_ceiling is not None and one.bus_bytes_per_second is not None:
        coded = " (lossless)" if one.host_coded_layers else ""
        copied = f"{format_size(one.bus_bytes_per_pass)}{coded} at {_rate(one.bus_bytes_per_second)} (measured)"
        rows += [("copied in a pass", copied), ("ceiling by copying", _speed(one.bus_ceiling, one))]
    rows.append(("ceiling by computing", _computing(one)))
    rows.append(("what limits it", _limit(one)))
    if one.more_bytes_per_pass is not None:
        rows.append(("with 1 GB more", _more(one)))
    if one.ceiling is not None:
        rows.append(("how sure that is", "measured in a few seconds; other work on this machine lowers it"))
    return rows


def _computing(one: "Explanation") -> str:
    if one.computing_ceiling is None or one.compute_seconds is None:
        return "not known: it could not be measured in a few seconds"
    part = "" if one.compute_share >= 1 else f" on {percent(one.compute_share)} of the weights"
    took = f"{render.seconds(one.compute_seconds)} in a pass, measured just now{part}"
    return f"{_speed(one.computing_ceiling, one)} ({took})"


def _limit(one: "Explanation") -> str:
    other = {"compute": "computing", "bus": "copying to the device"}
    what = other.get(one.bottleneck) or f"reading {_PLACES[place_of(one.source)]}"
    return what if one.ceiling is None else f"{what}; the ceiling is {_speed(one.ceiling, one)}"


def _more(one: "Explanation") -> str:
    verb = "read" if one.host_budget_bytes is None else "copied"
    if one.more_bytes_per_pass == 0:
        reads = f"nothing is {verb} any more"
    else:
        reads = f"{format_size(one.more_bytes_per_pass or 0)} {verb} in a pass"
    return reads if one.more_ceiling is None else f"{reads}; the ceiling is {_speed(one.more_ceiling, one)}"


def _speed(per_second: float, one: "Explanation") -> str:
    unit = "tok" if one.unit == "tokens" else one.unit
    return f"{per_second:.{2 if per_second < 100 else 0}f} {unit}/s"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / GB:.2f} GB/s" if bytes_per_second >= GB / 10 else f"{format_size(bytes_per_second)}/s"
