"""Read a pickle as inert data: nothing that it names is imported, and nothing in it is called.

Python's unpickler calls whatever a pickle names. This one supports only the few operations that torch's metadata needs.
Instead of creating an object, it records the object's name, arguments and state. It fails on names that the caller does
not expect, on other operations, and on dict keys other than strings and objects.
"""

import io
import pickle
from collections.abc import Callable, Collection
from typing import Any, ClassVar

from surfw.config import quote


class ForeignNameError(ValueError):
    """A pickle contains a global name that is not expected; loading it would import that, and might call it."""


class Named:
    """A global in a pickle: a class, a function or a constant, as `module.name`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Made:
    """An object that the pickle would create.

    Attributes:
        name: the class or function, as `module.name`; empty for a persistent id, which refers outside of the pickle.
        args: the arguments of the call.
        state: the state that would be set afterwards; None if the pickle sets no state.
    """

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args
        self.state: Any = None


def read_pickle(data: bytes, expected: Collection[str]) -> Any:
    """Read a pickle's contents: numbers, strings, tuples, lists, dicts, `Named` and `Made`.

    Args:
        data: the pickle.
        expected: the global names that it may contain, as `module.name`.

    Raises:
        ForeignNameError: it contains another name.
        ValueError: it is damaged, or has other contents.
    """
    try:
        return _Reader(data, expected).load()
    except ForeignNameError:
        raise
    except Exception as exc:
        raise ValueError("it is no pickle of such a table") from exc


_OPERATIONS = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT,
    pickle.BINGET, pickle.LONG_BINGET, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1,
    pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND,
    pickle.APPENDS, pickle.EMPTY_DICT, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID,
)  # fmt: skip
"""Operations taken from Python's own unpickler, which yield plain data."""

_MOST_PARTS = 16_000_000
"""The most dicts, lists, tuples, objects and memo entries, of some 100 bytes each, that a pickle may create."""

_COUNTED = (
    pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.NEWOBJ,
    pickle.REDUCE, pickle.BINPERSID, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.MEMOIZE, pickle.BINPUT,
    pickle.LONG_BINPUT,
)  # fmt: skip


def _count(operation: Callable[["_Reader"], None]) -> Callable[["_Reader"], None]:
    """Wrap an operation so that it counts towards `_MOST_PARTS`."""

    def run(reader: "_Reader") -> None:
        reader.parts += 1
        if reader.parts > _MOST_PARTS:
            raise ValueError("it holds too much")
        operation(reader)

    return run


class _Reader(pickle._Unpickler):  # noqa: SLF001 - the Python version, whose operations can be restricted
    """Reads one pickle."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes, expected: Collection[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._expected = expected
        self.parts = 0

    def find_class(self, module: str, name: str) -> Named:
        """Return the name of an expected global, without looking it up."""
        if (full := f"{module}.{name}") not in self._expected:
            raise ForeignNameError(quote(full))
        return Named(full)

    def persistent_load(self, pid: Any) -> Made:
        """Keep a persistent id, which refers outside of the pickle."""
        return Made("", pid if isinstance(pid, tuple) else (pid,))

    def _make(self) -> None:
        args, named = self.stack.pop(), self.stack.pop()
        if not isinstance(named, Named) or not isinstance(args, tuple):
            raise TypeError("something else is called")
        self.append(Made(named.name, args))

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, Made):
            raise TypeError("something else has a state")
        made.state = state

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set(self, items: list[Any]) -> None:
        table, keys = self.stack[-1], items[::2]
        if type(table) is not dict or not all(isinstance(key, str | Made) for key in keys):
            raise TypeError("a table has other keys")  # hashing a nested tuple can take forever
        table.update(zip(keys, items[1::2], strict=True))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPERATIONS},  # noqa: SLF001
        pickle.NEWOBJ[0]: _make, pickle.REDUCE[0]: _make, pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items,
    }  # fmt: skip
    for _code in _COUNTED:
        dispatch[_code[0]] = _count(dispatch[_code[0]])
