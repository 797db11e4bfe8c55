from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import pytest

from edgemerge.errors import FormatError
from edgemerge.runtime.template import Template, load_template
from tests.runtime import chat_templates

pytestmark = pytest.mark.llama  # Jinja comes with llama-cpp-python

FILE = Path("model.gguf")
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hi <b>"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
IM = "<|im_start|>{}\n{}<|im_end|>\n"
IM_TALK = IM.format("user", "Hi <b>") + IM.format("assistant", "Hello.") + IM.format("user", "Bye")
IM_END = "<|im_start|>assistant\n"

# What transformers 5's apply_chat_template gives, with <s> and </s> as the tokens.
EXPECTED = {
    "CHATML": IM.format("system", "You are a helpful assistant") + IM_TALK + IM_END,
    "LLAMA_3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi <b><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "GEMMA_2": (
        "<s><start_of_turn>user\nHi <b><end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    ),
    "MISTRAL": "<s>[INST] Hi <b> [/INST]Hello.</s>[INST] Bye [/INST]",
    "QWEN": IM.format("system", "You are Qwen, created by Alibaba Cloud.") + IM_TALK + IM_END,
    "PHI_3": (
        "<s><|user|>\nHi <b><|end|>\n<|assistant|>\nHello.<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n"
    ),
}
EXPECTED_SYSTEM = {
    "CHATML": IM.format("system", "Be brief.") + IM_TALK + IM_END,
    "LLAMA_3": EXPECTED["LLAMA_3"].replace(
        "<s>", "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    ),
    "GEMMA_2": EXPECTED["GEMMA_2"].replace("Hi", "Be brief.\n\nHi"),
    "MISTRAL": EXPECTED["MISTRAL"].replace("Hi", "Be brief.\n\nHi"),
    "QWEN": IM.format("system", "Be brief.") + IM_TALK + IM_END,
    "PHI_3": EXPECTED["PHI_3"].replace("Hi", "Be brief.\n\nHi"),
}


def make(source: str) -> Template:
    return Template(source, FILE, bos="<s>", eos="</s>")


@pytest.mark.parametrize("name", EXPECTED)
def test_published_templates(name: str) -> None:
    template = make(getattr(chat_templates, name))
    assert template.render(TALK) == EXPECTED[name]
    assert template.render([SYSTEM, *TALK]) == EXPECTED_SYSTEM[name]


def test_a_system_prompt_goes_where_the_template_has_a_place_for_it() -> None:
    takes = {name for name in EXPECTED if make(getattr(chat_templates, name)).takes_system}
    assert takes == {"CHATML", "LLAMA_3", "QWEN"}


@pytest.mark.parametrize(
    ("talk", "as_gemma_reads_it"),
    [
        ([SYSTEM], [("user", "Be brief.")]),
        ([SYSTEM, SYSTEM, TALK[0]], [("user", "Be brief.\n\nBe brief.\n\nHi <b>")]),
        (
            [SYSTEM, *TALK[1:]],
            [("user", "Be brief."), ("model", "Hello."), ("user", "Bye")],
        ),
        (
            [*TALK[:2], SYSTEM, TALK[2]],
            [("user", "Hi <b>"), ("model", "Hello."), ("user", "Be brief.\n\nBye")],
        ),
    ],
    ids=["alone", "two", "before an answer", "later"],
)
def test_no_system_prompt_is_lost_where_the_template_has_no_place_for_it(
    talk: list[dict[str, str]], as_gemma_reads_it: list[tuple[str, str]]
) -> None:
    """Fault: one alone was a ValueError, and of two the first was given to the second."""
    turn = "<start_of_turn>{}\n{}<end_of_turn>\n"
    turns = "".join(turn.format(role, text) for role, text in as_gemma_reads_it)
    text = make(chat_templates.GEMMA_2).render(talk)
    assert text == f"<s>{turns}<start_of_turn>model\n"


def test_blocks_leave_no_lines_or_indents() -> None:
    source = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}"
    )
    assert make(source).render(TALK) == "Hi <b>\nHello.\nBye\n"


def test_loops_can_be_left_and_what_is_for_training_is_passed_through() -> None:
    source = (
        "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }};{% endgeneration %}{% endfor %}"
    )
    assert make(source).render(TALK) == "Hi <b>;Hello.;"


def test_json_is_not_written_for_html() -> None:
    content = {"role": "user", "content": "<é> & '\""}
    assert json.loads(make("{{ messages[0] | tojson }}").render([content])) == content
    assert make("{{ messages[0].content | tojson }}").render([content]) == '"<é> & \'\\""'
    written = make("{{ messages[0] | tojson(indent=2) }}").render([content])
    assert written == json.dumps(content, indent=2, ensure_ascii=False)


def test_the_date_and_absent_tools() -> None:
    source = "{{ strftime_now('%Y') }} {{ tools is none }} {{ documents is none }}"
    assert make(source).render(TALK) in {f"{datetime.now().year + i} True True" for i in (0, -1)}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('only one turn,\nplease') }}", "only one turn,"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", "is unsafe"),
        ("{% include 'x' %}", "no loader for this environment"),
    ],
)
def test_a_template_that_fails_is_one_sentence(source: str, reason: str) -> None:
    with pytest.raises(FormatError) as caught:
        make(source).render(TALK)
    message = str(caught.value)
    assert message.startswith("model.gguf: its chat template does not work (")
    assert message.endswith("); give another with --template FILE")
    assert reason in message
    assert "\n" not in message


def test_a_template_from_a_file_takes_the_models_place(tmp_path: Path, tiny_gguf: Path) -> None:
    from edgemerge.runtime.llama import Model

    file = tmp_path / "chat.jinja"
    with Model(tiny_gguf) as model:
        assert load_template(model) is None
        file.write_text(
            "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}é", encoding="utf-8"
        )
        template = load_template(model, file)
        assert template is not None
        assert template.render(TALK) == "<s>Hi <b></s>é"
        file.write_bytes(b"\xff")
        with pytest.raises(FormatError, match=r"chat\.jinja: not UTF-8"):
            load_template(model, file)
        file.write_text("{% nonsense %}")
        with pytest.raises(FormatError, match=r"chat\.jinja: its chat template does not work"):
            load_template(model, file)
        file.write_text("# Read me\nHello {{ name }}.")
        with pytest.raises(FormatError, match=r"chat\.jinja: it never uses 'messages', so it is"):
            load_template(model, file)
        for name in EXPECTED:
            file.write_text(getattr(chat_templates, name), encoding="utf-8")
            assert load_template(model, file) is not None


def test_braces_that_never_close_are_read_in_one_pass(tmp_path: Path, tiny_gguf: Path) -> None:
    """Fault: each was searched to the file's end, minutes for the longest template that is taken."""
    from edgemerge.runtime.llama import Model

    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}{#" + "{" * 60_000 + "#}")
    with Model(tiny_gguf) as model:
        start = time.process_time()  # of this process: the template's own has a limit
        assert load_template(model, file) is not None
        assert time.process_time() - start < 2.0
