"""Tokens: invalid ones are refused, and errors do not show them."""

import os
from pathlib import Path

import pytest

from surfw.errors import ConfigurationError
from surfw.settings import TOKEN_VARIABLE, read_token


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty, expected a token; put one in, or unset it"),
        (b" \n", "is empty, expected a token; put one in, or unset it"),
        (b"s3cret two", "holds no token, expected one word of printable ASCII characters"),
        (b"s3cret\r\nX: y", "holds no token, expected one word of printable ASCII characters"),
        (b"s3cret\xff", "holds no token, expected one word of printable ASCII characters"),
    ],
)
def test_what_is_no_token(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        _ = read_token(str(file))
    assert str(caught.value) == f"token_file {file} {said}"


def test_a_token_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="absent cannot be read: No such file or directory; name a file that"):
        _ = read_token(str(tmp_path / "absent"))
    monkeypatch.setenv(TOKEN_VARIABLE, "a b")
    with pytest.raises(ConfigurationError, match=r"^SURFW_TOKEN holds no token, expected one word") as caught:
        _ = read_token(None)
    assert "a b" not in str(caught.value)
    assert os.environ[TOKEN_VARIABLE] == "a b"
