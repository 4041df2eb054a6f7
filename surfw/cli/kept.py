"""Show, save, compare and report the results of benchmarks.

A benchmark returns one or several results; `keeps_results` adds the options `--save`, `--compare` and `--report`, and
applies them.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surfw.errors import ConfigurationError

if TYPE_CHECKING:
    from surfw.bench.compare import Comparison
    from surfw.bench.result import Result

REGRESSION = 3
"""The exit code if a ratio is worse than in the file of `--compare`."""
_REPORTS = (".html", ".md")
_Save = Annotated[Path | None, typer.Option(metavar="FILE", help="Save the result to this file, as JSON.")]
_Compare = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Compare ratios with those saved in this file; exit with code 3 if one is worse."
    ),
]
_Report = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write a self-contained page with plots: FILE.html or FILE.md."),
]


def keeps_results(command: Callable[..., "Result | Sequence[Result]"]) -> Callable[..., None]:
    """Give a benchmark the options `--save`, `--compare` and `--report`."""

    @wraps(command)
    def run(*, save: Path | None, compare: Path | None, report: Path | None, **given: Any) -> None:
        before = _prepare(save, compare, report, command.__name__.removeprefix("bench_"))
        found = command(**given)
        results: Sequence[Result] = list(found) if isinstance(found, Sequence) else [found]
        _keep(results, save=save, compare=compare, before=before, report=report, json=given["json"])

    signature = inspect.signature(command)
    shown = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in signature.parameters.values()]
    at = next(place for place, one in enumerate(shown) if one.name == "json")
    kept = {"save": _Save, "compare": _Compare, "report": _Report}
    shown[at:at] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in kept.items()
    ]
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {one.name: one.annotation for one in shown}
    return run


def _prepare(save: Path | None, compare: Path | None, report: Path | None, benchmark: str) -> "dict[str, Result]":
    """Refuse unusable files before anything is measured; return the earlier results, if any are compared."""
    from surfw.bench.compare import read_results

    if report is not None and report.suffix not in _REPORTS:
        raise typer.BadParameter(f"{report.name!r} is neither a .html nor a .md file", param_hint="--report")
    for option, path in (("--save", save), ("--report", report)):
        if path is None:
            continue
        try:
            is_folder, has_parent = path.is_dir(), path.absolute().parent.is_dir()
        except OSError as exc:  # such as a name that is too long
            raise ConfigurationError(f"{path} ({option}) cannot be written: {exc.strerror}; name another file") from exc
        if not has_parent:
            raise ConfigurationError(f"{path} ({option}) cannot be written: there is no folder {path.parent}; make it")
        if is_folder:
            raise ConfigurationError(f"{path} ({option}) cannot be written: it is a folder; name a file in it")
    if compare is None:
        return {}
    before = read_results(compare)
    if benchmark != "everything":
        _expect_result(before, benchmark, compare)
    return before


def _expect_result(before: "dict[str, Result]", benchmark: str, file: Path) -> "Result":
    """Return the earlier result of a benchmark.

    Raises:
        ConfigurationError: the file holds none.
    """
    if benchmark not in before:
        held = ", ".join(before) or "none"
        raise ConfigurationError(f"{file} holds no result of bench {benchmark}, only: {held}; name a file that does")
    return before[benchmark]


def _keep(
    results: "Sequence[Result]", *, save: Path | None, compare: Path | None, before: "dict[str, Result]",
    report: Path | None, json: bool,
) -> None:  # fmt: skip
    from surfw.bench.compare import compare as compare_results
    from surfw.bench.compare import save_results
    from surfw.bench.report import write_report

    if save is not None:
        save_results(results, save)  # saved first, before anything else can fail: measuring took minutes
    comparisons: list[Comparison] = []
    if compare is not None:
        earlier = [_expect_result(before, one.benchmark, compare) for one in results]
        comparisons = [compare_results(one, now, file=str(compare)) for one, now in zip(earlier, results, strict=True)]
    _show(results, comparisons, json=json)
    if report is not None:
        write_report(report, results, comparisons)
    worse = [(result, one) for result, found in zip(results, comparisons, strict=False) for one in found.worse]
    for result, one in worse:
        what = f"bench {result.benchmark}: {one.name} is {-(one.change or 0):.0%} slower than in {compare}"
        print(f"surfw: {what}, against its baseline".replace("%", " %"), file=sys.stderr)
    if worse:
        raise typer.Exit(REGRESSION)


def _show(results: "Sequence[Result]", comparisons: "Sequence[Comparison]", *, json: bool) -> None:
    from surfw.cli import bench_view, render

    if json:
        documents = [asdict(result) for result in results]
        for document, comparison in zip(documents, comparisons, strict=False):
            document["comparison"] = asdict(comparison)
        render.print_json(documents[0] if len(documents) == 1 else {"results": documents})
        return
    for place, result in enumerate(results):
        if len(results) > 1:
            render.out.print(f"bench {result.benchmark}", style="bold")
        bench_view.show_rows(result)
        for one in comparisons[place : place + 1]:
            bench_view.show_changes(one)
