"""A third-party package that is found by a dotted path or an entry point."""

from typing import Any

from tests.storage.dict_backend import DictBackend


class Found(DictBackend):
    """Records its arguments."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__()
        self.url = url
        self.options = options


class Placeless(DictBackend):
    """Takes no URL."""

    def __init__(self) -> None:
        super().__init__()


def fail(url: str) -> None:
    raise ValueError("no such place")


def nothing(url: str) -> str:
    return url


NOT_CALLABLE = 5
