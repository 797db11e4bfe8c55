"""Special tokens and chat templates: `SpecialVocab` of llama.cpp's gguf-py/gguf/vocab.py.

Its reading of post-processors is crude and its order of preference has grown over years; both are
kept: a BOS more or less is the difference between a model that answers and one that babbles.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.json_file import read_object, read_text

__all__ = ["chat_templates", "special_tokens"]

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
Json = dict[str, Any]


def special_tokens(
    tokenizer_json: Json | None, tokenizer_config: Json | None, config: Json, n_vocab: int | None
) -> tuple[dict[str, int], dict[str, bool]]:
    """Return the ids of special tokens and whether each is added to a prompt, both by kind (`bos`).

    Parameters
    ----------
    tokenizer_json, tokenizer_config, config : dict or None
        The files of these names; config.json's ids count where the others name no token.
    n_vocab : int or None
        Ids from here on are dropped.
    """
    names = dict(tokenizer_config) if tokenizer_config is not None else None
    kinds, adds = list(KINDS), dict[str, bool]()
    if tokenizer_json is not None:
        if names is not None:
            names["bos_token"] = names.get("bos_token") or names.get("cls_token")
            names["eos_token"] = names.get("eos_token") or names.get("sep_token")
        _read_post_processor(tokenizer_json.get("post_processor") or {}, names, kinds, adds)
    ids: dict[str, int] = {}

    def set_id(kind: str, value: object) -> None:
        if type(value) is int and kind not in ids and (n_vocab is None or value < n_vocab):
            if value < 0:
                raise ValueError(f"{kind}_token_id is {value}")
            ids[kind] = value

    if names is not None:
        added = (tokenizer_json or {}).get("added_tokens") or []
        for kind in kinds:
            if isinstance(names.get(f"add_{kind}_token"), bool):
                adds.setdefault(kind, names[f"add_{kind}_token"])
            content = _content(names.get(f"{kind}_token"))
            if content is not None:
                set_id(
                    kind, next((t.get("id") for t in added if t.get("content") == content), None)
                )
    for kind in kinds:
        set_id(kind, config.get(f"{kind}_token_id"))
    return ids, adds


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_post_processor(
    post: Json, names: Json | None, kinds: list[str], adds: dict[str, bool]
) -> None:
    """Learn from the post-processor what surrounds a text; writes to the other three."""
    for step in post.get("processors", [post]):
        match step.get("type"):
            case "ByteLevel":
                adds.setdefault("bos", False)
                adds.setdefault("eos", False)
            case "RobertaProcessing":
                adds |= {"bos": True, "eos": True, "sep": True}
                for kind in ("cls", "sep"):
                    if names is not None and not names.get(f"{kind}_token"):
                        names[f"{kind}_token"] = step[kind][0]
            case "TemplateProcessing":
                _read_template(step, names, kinds, adds)


def _read_template(step: Json, names: Json | None, kinds: list[str], adds: dict[str, bool]) -> None:
    known: Json = names if names is not None else {}
    single = step.get("single") or []
    first = _special(single[0]) if len(single) > 1 else None
    last = _special(single[-1]) if len(single) > 1 else None
    if first:
        if names is None:
            known["bos_token"] = first
        elif first not in (known.get("bos_token"), known.get("cls_token")):
            known["bos_token"] = known.get("bos_token") or first
            known["cls_token"] = known.get("cls_token") or first
        adds["bos"] = first in (known.get("bos_token"), known.get("cls_token"))
    if last:
        eos = known.get("eos_token")
        if names is not None and last != eos:
            # What ends a text is the EOS; the one named so far ends a turn.
            spare = next((kind for kind in ("eot", "eom") if kind not in kinds), None)
            if spare is not None:
                kinds.append(spare)
                known[f"{spare}_token"] = eos
        known["eos_token"] = last
        adds["eos"] = True
    _read_pair(step.get("pair") or [], first, last, known, names is not None, adds)


def _read_pair(
    pair: list[Json],
    first: str | None,
    last: str | None,
    known: Json,
    has_names: bool,
    adds: dict[str, bool],
) -> None:
    """Find out from the template of two texts, A [sep] [eos] B, whether a separator is added."""
    begin = 1 if pair and first and _special(pair[0]) == first else 0
    end = -1 if pair and last and _special(pair[-1]) == last else None
    pair = pair[begin:end]
    if not pair or _sequence(pair[0]) != "A" or _sequence(pair[-1]) != "B" or not pair[1:-1]:
        return
    middle = [_special(item) for item in pair[1:-1]]
    separators = (known.get("sep_token"), known.get("eos_token"))
    add = bool(middle[0]) and middle[0] in separators and not last
    if len(middle) == 2 and middle[1] and middle[1] in separators:
        add = True
    adds["sep"] = add
    if add and not known.get("sep_token") and has_names:
        known["sep_token"] = known.get("eos_token")


def _special(item: Json) -> str | None:
    token: str | None = item.get("SpecialToken", {}).get("id")
    return token


def _sequence(item: Json) -> str | None:
    sequence: str | None = item.get("Sequence", {}).get("id")
    return sequence


def chat_templates(path: Path, tokenizer_config: Json | None) -> dict[str, bytes]:
    """Return the `chat_template` keys, encoded; templates are copied and never rendered.

    chat_template.jinja counts more than an older one in tokenizer_config.json, as in transformers.
    """
    template = (tokenizer_config or {}).get("chat_template")
    if template is None or (path / "chat_template.jinja").is_file():
        template = _template_files(path)
    if isinstance(template, str):
        return {"chat_template": encode_value(template, "str")}
    if not isinstance(template, list):
        return {}
    keys: dict[str, bytes] = {}
    default: str | None = None
    for choice in template:
        allowed = ascii_letters + digits
        name = "".join(c if c in allowed else "_" for c in choice.get("name", ""))
        text = choice.get("template")
        if name == "default":
            default = text
        elif name and text is not None:
            keys[f"chat_template.{name}"] = encode_value(text, "str")
    if keys:
        # The converter lists a Python set; the order of the file keeps our bytes the same.
        names = [key.removeprefix("chat_template.") for key in keys]
        keys["chat_templates"] = encode_value(names, "[str]")
    if default is not None:
        keys["chat_template"] = encode_value(default, "str")
    return keys


def _template_files(path: Path) -> Any:
    """Read the template from files of its own, where transformers puts it nowadays."""
    if (path / "chat_template.jinja").is_file():
        template = read_text(path / "chat_template.jinja")
        others = sorted((path / "additional_chat_templates").glob("*.jinja"))
        if not others:
            return template
        named = [{"name": other.stem, "template": read_text(other)} for other in others]
        return [{"name": "default", "template": template}, *named]
    if (path / "chat_template.json").is_file():
        return read_object(path / "chat_template.json").get("chat_template")
    return None
