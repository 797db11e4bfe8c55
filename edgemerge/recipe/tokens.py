"""What a recipe says of tokens: `tokenizer_source`, or mergekit's table `tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemerge.recipe.values import ValueReader, brief, is_utf8
from edgemerge.token_rows import TokenRule

__all__ = ["MAX_ROWS", "TOKENIZER_KEYS", "TokenizerReader"]

TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
RULE_KEYS = ("source", "force")
KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
MAX_ROWS = 1 << 24  # of padding; no vocabulary has a sixteenth of that


class TokenizerReader(ValueReader):
    """Reads the part of a recipe that is about tokens."""

    def tokenizer(
        self, document: Mapping[str, Any]
    ) -> tuple[str | None, dict[str, TokenRule], int | None]:
        """Read where the tokens come from, what is said of single ones, and the padding."""
        source, table = document.get("tokenizer_source"), document.get("tokenizer")
        if table is None:
            return self.tokenizer_source(source, "tokenizer_source"), {}, None
        if source is not None:
            self.fail("has both tokenizer_source and tokenizer; keep one of the two", "tokenizer")
        table = self.mapping(table, "tokenizer")
        self.check_keys(table, TOKENIZER_KEYS, "tokenizer")
        return (
            self.tokenizer_source(table.get("source", "union"), "tokenizer.source"),
            dict(self.token_rules(table.get("tokens"))),
            self.multiple(table.get("pad_to_multiple_of"), "tokenizer.pad_to_multiple_of"),
        )

    def tokenizer_source(self, value: Any, where: str) -> str | None:
        """Return base, union, or the path of a model; older recipes also write `model:PATH`."""
        if value is None or value in ("base", "union"):
            return value if value is None else str(value)
        if isinstance(value, str):
            value = value.removeprefix("model:")
        return str(self.model_path(value, where))

    def token_rules(self, value: Any) -> Mapping[str, TokenRule]:
        """Read the rules for single tokens, by their texts."""
        table = self.mapping(value or {}, "tokenizer.tokens")
        for text in table:
            if not isinstance(text, str) or not text or not is_utf8(text):
                self.fail(f"tokenizer.tokens names {brief(text)}, which is no text", "tokenizer")
        return {text: self.token_rule(entry, text) for text, entry in table.items()}

    def token_rule(self, entry: Any, text: str) -> TokenRule:
        """Read one rule: a model, `kind: zero`, or `kind: model_token`."""
        where = f"tokenizer.tokens.{text}"
        entry = self.mapping(entry, where)
        self.check_keys(entry, RULE_KEYS, where)
        source, force = (
            entry.get("source"),
            self.switch(entry.get("force", False), f"{where}.force"),
        )
        if source is None:
            if force:
                self.fail(f"{where} has force without a source; name one", where)
            return TokenRule("default")
        kind = source.get("kind") if isinstance(source, dict) else None
        if kind is None:
            return TokenRule("model", self.model_path(source, f"{where}.source"), None, force)
        if not isinstance(kind, str) or kind not in KINDS:
            self.fail(f"{where} has the kind {brief(kind)}; choose zero or model_token", where)
        self.check_keys(source, KINDS[kind], f"{where}.source")
        if kind == "zero":
            return TokenRule("zero", force=force)
        token, token_id = source.get("token"), source.get("token_id")
        if (token is None) == (token_id is None):
            self.fail(f"{where} needs either token or token_id, one of the two", where)
        if token is not None and (not isinstance(token, str) or not is_utf8(token)):
            self.fail(f"{where} has the token {brief(token)}, which is no text", where)
        if token is None and (type(token_id) is not int or token_id < 0):
            self.fail(f"{where} has the token_id {brief(token_id)}, which is no number", where)
        model = self.model_path(source.get("model"), f"{where}.model")
        return TokenRule("model", model, token_id if token is None else token, force)

    def multiple(self, value: Any, where: str) -> int | None:
        """Read the number whose multiple the rows are to be; 0 stands for none, as in mergekit."""
        if value is None or value == 0:
            return None
        if type(value) is not int or not 0 < value <= MAX_ROWS:
            self.fail(f"{where} is {brief(value)}; it must be a whole number from 1 on", where)
        return value
