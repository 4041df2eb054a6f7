"""The process that renders a chat template: a standalone script that imports nothing of surfw.

Reads one JSON document from stdin. Writes to stdout: `T` and the text; `E` and why the template refused; or `M` if
memory ran out. The system kills it at its CPU limit. It imports only transformers' rendering module, without the rest
of the package, which takes much longer to import.
"""

import importlib
import json
import os
import resource
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

_MODULE = "transformers.utils.chat_template_utils"


def _renderer(folder: str) -> Any:
    """Import transformers' `render_jinja_template`."""
    parts = {"transformers": folder, "transformers.utils": f"{folder}/utils"}
    for name, path in parts.items():
        package = ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    try:
        return importlib.import_module(_MODULE).render_jinja_template
    except Exception:  # noqa: BLE001 - another release may need the whole package
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        return importlib.import_module(_MODULE).render_jinja_template


def _limit(what: int, soft: int, hard: int) -> None:
    with suppress(ValueError, OSError):  # a stricter limit is already set
        resource.setrlimit(what, (soft, hard))


def _main() -> None:
    work = json.load(sys.stdin.buffer)
    sys.path[:] = work["path"]
    render = _renderer(work["transformers"])
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _limit(resource.RLIMIT_CORE, 0, 0)
    _limit(resource.RLIMIT_CPU, int(used) + work["cpu_seconds"], int(used) + work["cpu_seconds"] + 1)
    _limit(resource.RLIMIT_AS, work["memory_bytes"], work["memory_bytes"])
    try:
        (text,), _ = render(
            conversations=[work["messages"]],
            chat_template=work["template"],
            **{"add_generation_prompt": True} | work["variables"],
        )
        said = b"T" + text.encode(errors="surrogatepass")
    except MemoryError:
        said = b"M"
    except Exception as exc:  # noqa: BLE001 - a template is an untrusted program and may raise anything
        said = f"E{type(exc).__name__}: {str(exc)[:200]}".encode(errors="replace")
    os.write(1, said[:1])
    sys.stdout.buffer.write(said[1:])
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
