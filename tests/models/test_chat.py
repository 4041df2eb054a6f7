"""Chat templates give the same text as in transformers; endless templates are stopped."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from surfw.errors import ConfigurationError
from surfw.models import chat
from surfw.models.chat import encode_chat
from tests.checkpoints import save_llama

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, é\n<s> \U0001f600"}]

TEMPLATES = {
    "plain": "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}",
    "prompt": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "tools": "{%- if tools is not none %}{{ tools | tojson }}{% endif %}{{ messages | tojson(indent=2) }}\n\n",
    "namespace": "{% set ns = namespace(found=false) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.found = true %}{% if loop.first %}{{ bos_token }}{% endif %}{% continue %}{% endfor %}{{ ns.found }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "default of several": "{{ messages[-1].content ~ 'x' * 3 }}",
    "date": "{{ strftime_now('%Y') }} {{ messages[0].content }}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_llama(tmp_path_factory.mktemp("model"), layers=1))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_are_those_of_transformers(name: str, tokenizer: Any) -> None:
    template = TEMPLATES[name]
    tokenizer.chat_template = {"default": template, "tool_use": "x"} if name == "default of several" else template
    expected = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    found = encode_chat(tokenizer, MESSAGES, where="m")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert found["input_ids"].shape[1] > 1


def test_a_text_that_no_encoding_has_comes_back(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content | length }}"
    found = encode_chat(tokenizer, [{"role": "user", "content": "\ud800\u00e9"}], where="m")
    assert tokenizer.decode(found["input_ids"][0]) == "2"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ 'a' * 10**9 }}", "needs more than 1.0 GB of memory"),
        ("{{ 'x' | center(10**9) }}", "needs more than 1.0 GB of memory"),
        ("{{ '%1000000000d' % 1 }}", "needs more than 1.0 GB of memory"),
        ("{{ [0] * 10**9 }}", "needs more than 1.0 GB of memory"),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "needs more than 1.0 GB of memory",
        ),
        ("{{ 'a' * (16000000 + 1) }}", "makes more than 16.0 MB of text"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses the prompt (RecursionError: "),
        ("{{ range(10**9) }}", "refuses the prompt (OverflowError: Range too big"),
        ("{{ ''.__class__.__mro__ }}", "refuses the prompt (SecurityError: access to attribute '__class__'"),
        ("{{ raise_exception('no ' ~ messages[0].role) }}", "refuses the prompt (TemplateError: no system)"),
        ("{% if %}", "refuses the prompt (TemplateSyntaxError: "),
    ],
)
def test_a_template_without_an_end_is_one_clear_error(template: str, complaint: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ConfigurationError) as caught:
        encode_chat(tokenizer, MESSAGES, where="m")
    assert str(caught.value).startswith(f"the chat template of m {complaint}")
    assert str(caught.value).endswith("give the prompt as it is (raw)")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("python", ["", "/nowhere/python"])
def test_where_no_process_can_be_started_is_one_clear_error(
    python: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = "x"
    monkeypatch.setattr("sys.executable", python)
    said = (
        rf"^the chat template of m could not be rendered: no process of Python \({python!r}\) can be started for it: "
    )
    with pytest.raises(ConfigurationError, match=said) as caught:
        encode_chat(tokenizer, MESSAGES, where="m")
    assert str(caught.value).endswith("; give the prompt as it is (raw)")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% for i in range(99999) %}{{ lipsum(n=99999)[:0] }}{% endfor %}",
    ],
)
def test_a_template_that_computes_for_ever_is_ended(
    template: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_CPU_SECONDS", 1)
    tokenizer.chat_template = template
    with pytest.raises(ConfigurationError, match=r"^the chat template of m was not done after 1 s of"):
        encode_chat(tokenizer, MESSAGES, where="m")


def test_a_process_that_does_not_compute_is_ended_too(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 0.0)
    tokenizer.chat_template = TEMPLATES["plain"]
    start = time.monotonic()
    with pytest.raises(ConfigurationError, match="was not done after 5 s of computing"):
        encode_chat(tokenizer, MESSAGES, where="m")
    assert time.monotonic() - start < 60


def test_a_process_that_cannot_render_says_so(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr(chat, "_RENDERER", tmp_path / "broken.py")
    tokenizer.chat_template = TEMPLATES["plain"]
    text = "could not be rendered: the process that does it ended with exit code 7; give the prompt as it is (raw)"
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        encode_chat(tokenizer, MESSAGES, where="m")
