"""Chat templates by name against the public formats, written out."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge.errors import EdgemergeError
from edgemerge.recipe.templates import CHAT_TEMPLATES
from edgemerge.runtime.template import Template

pytestmark = pytest.mark.llama  # Jinja comes with llama-cpp-python

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        f"<s>{HEAD.format('system')}Be brief.<|eot_id|>",
        f"{HEAD.format('user')}Hi<|eot_id|>{HEAD.format('assistant')}Yes.<|eot_id|>"
        f"{HEAD.format('user')}Why?<|eot_id|>{HEAD.format('assistant')}",
    ),
    "mistral": ("<s> [INST] Be brief.\n\n", "Hi [/INST] Yes.</s> [INST] Why? [/INST]"),
    "alpaca": (
        "Be brief.\n\n",
        "### Instruction:\nHi\n\n### Response:\nYes.\n\n### Instruction:\nWhy?\n\n### Response:\n",
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n",
        "[|user|]Hi\n[|assistant|]Yes.[|endofturn|]\n[|user|]Why?\n[|assistant|]",
    ),
}
WITHOUT_SYSTEM = {
    "chatml": "",
    "llama3": "<s>",
    "mistral": "<s> [INST] ",
    "alpaca": "\n\n",
    "exaone": "[|system|][|endofturn|]\n",
}


def make(name: str) -> Template:
    return Template(CHAT_TEMPLATES[name], Path("recipe.yml"), bos="<s>", eos="</s>")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_conversation_is_written_in_the_public_format(name: str) -> None:
    before, after = EXPECTED[name]
    assert make(name).render([SYSTEM, *TALK]) == before + after
    assert make(name).render(TALK) == WITHOUT_SYSTEM[name] + after


def test_mistral_refuses_speakers_out_of_turn() -> None:
    with pytest.raises(EdgemergeError, match="must take turns"):
        make("mistral").render([*TALK, TALK[0]])
