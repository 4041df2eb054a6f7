"""The public interface: one complete, sorted, documented list, and fast imports."""

import ast
import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import surfw
from surfw import errors

STUB = Path(surfw.__file__).with_suffix(".pyi")

READ_ONLY = {
    "Advice",
    "Manifest",  # storage/FORMAT.md describes the contents of a model's manifest
    "Metrics",
    "Progress",
    "ResidencyPlan",
    "Statistics",  # a dictionary, whose keys COMMANDS.md documents
}
"""Classes that public calls return and nobody constructs; their documented attributes are read."""


def listed() -> list[str]:
    """The names in the stub, in its order."""
    imports = (node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom))
    return [alias.name for node in imports for alias in node.names]


def test_the_one_list_is_all_there_is() -> None:
    assert sorted(listed()) == surfw.__all__ == sorted(set(surfw.__all__))
    assert set(surfw.__all__) <= set(dir(surfw))
    for name in surfw.__all__:
        assert getattr(surfw, name).__name__ == name
    with pytest.raises(AttributeError, match="No surfw attribute StreamingNothing"):
        surfw.StreamingNothing  # type: ignore[attr-defined]  # noqa: B018


def test_the_list_is_sorted_by_home_and_name() -> None:
    imports = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    order = [(node.module or "", node.names[0].name) for node in imports]
    assert order == sorted(order)
    assert all(len(node.names) == 1 and node.names[0].asname == node.names[0].name for node in imports)


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(surfw.__all__)
    defined = {
        name for name, one in vars(errors).items() if isinstance(one, type) and one.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)
    assert all(issubclass(vars(errors)[name], surfw.SurfwError) for name in defined if name.endswith("Error"))


@pytest.mark.parametrize("name", surfw.__all__)
def test_a_public_name_is_documented_with_all_it_has(name: str) -> None:
    one = getattr(surfw, name)
    assert len(inspect.getdoc(one) or "") > 20
    for method, function in members(one):
        assert inspect.getdoc(function), f"{name}.{method} has no docstring"


@pytest.mark.parametrize("name", surfw.__all__)
def test_what_a_public_signature_mentions_is_public(name: str) -> None:
    one = getattr(surfw, name)
    for method, function in [(name, one), *members(one)] if inspect.isfunction(one) else members(one):
        for where, kind in hints(function).items():
            for found in mentioned(kind):
                assert found in surfw.__all__ or found in READ_ONLY, f"{name}.{method} mentions {found} in {where}"


def members(one: Any) -> list[tuple[str, Any]]:
    """A class's own public methods and properties, and its constructor."""
    if not isinstance(one, type):
        return []
    found = []
    for method, raw in vars(one).items():
        function = raw.fget if isinstance(raw, property) else getattr(raw, "__func__", raw)
        if inspect.isfunction(function) and (not method.startswith("_") or method in {"__init__", "__call__"}):
            found.append((method, function))
    return found


def hints(function: Any) -> dict[str, Any]:
    """The types of a function's parameters and of its result."""
    return typing.get_type_hints(inspect.unwrap(function))


def mentioned(kind: Any) -> set[str]:
    """surfw's classes in a type, however deeply nested."""
    if isinstance(kind, type) and typing.is_typeddict(kind) and kind.__name__.endswith("Options"):
        return {name for inner in typing.get_type_hints(kind).values() for name in mentioned(inner)}
    found = {name for part in typing.get_args(kind) for name in mentioned(part)}
    if isinstance(kind, type) and kind.__module__.startswith("surfw"):
        found.add(kind.__name__)
    return found


def test_importing_surfw_loads_nothing_heavy_and_each_name_only_what_it_needs() -> None:
    code = (
        "import json, sys, surfw\n"
        "def heavy(): return sorted({n.partition('.')[0] for n in sys.modules} & "
        "{'torch', 'transformers', 'numpy', 's3fs', 'websockets', 'fsspec'})\n"
        "found = [heavy()]\n"
        "surfw.RetryPolicy, surfw.SurfwError, surfw.Settings; found.append(heavy())\n"
        "surfw.WeightServer; found.append(heavy())\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    alone, light, server = json.loads(done.stdout)
    assert alone == light == []
    assert server == ["fsspec", "websockets"]


def test_the_library_is_silent(tmp_path: Path) -> None:
    code = (
        "import asyncio, surfw\n"
        "surfw.ModelChunker(surfw.demo_checkpoint(), 'store').chunk_model_sync()\n"
        "async def main():\n"
        "    async with surfw.WeightServer(model_path='store', port=0) as server:\n"
        "        async with surfw.StreamingModel(server.url, cache_size=2) as model:\n"
        "            assert [t async for t in model.stream('Weight streaming is', max_new_tokens=3)]\n"
        "            try: await model.warmup([99])\n"
        "            except surfw.SurfwError: pass\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")
