"""What a request may ask for: the fields that routes have in common, and their bounds."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator

from edgemerge.runtime.engine.messages import Sampling
from edgemerge.runtime.serve.errors import Refusal

__all__ = ["CHAT", "COMPLETIONS", "EMBEDDINGS", "MODEL_ROUTES", "RELOAD", "RERANK", "RESPONSES"]
__all__ += [
    "ADMIN",
    "CHANGE_ROUTES",
    "Body",
    "Generating",
    "Inputs",
    "StreamOptions",
    "check_json",
    "read_json",
    "split_inputs",
]

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"
ADMIN = "/admin"
RELOAD = f"{ADMIN}/reload"
# POST routes that change the device's folder, or what is served of it: there must be a key
CHANGE_ROUTES = tuple(
    f"{ADMIN}/{name}" for name in ("plan", "merge", "compare", "cancel", "promote", "rollback")
)
# POST routes that use a model, and therefore wait for their turn
MODEL_ROUTES = (COMPLETIONS, CHAT, RESPONSES, EMBEDDINGS, RERANK, "/tokenize", "/detokenize")

MAX_ALTERNATIVES = 20  # OpenAI's limit for chats
_MAX_STOPS = 16
_MAX_CHOICES = 16
_MAX_DEPTH = 32  # of nested JSON; a chat with tools has about ten
_MAX_TOKEN = 2**31 - 1
_SEEDS = 2**32 - 1  # llama.cpp's; one more is its word for a seed by chance
_DEFAULT = Sampling()
_SAID = ("messages", "prompt", "input", "instructions", "query", "documents")


class Body(BaseModel):
    """A request's JSON: null is what the client leaves open, what is not known is ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())
    # Names that would change the answer if they were not ignored, and why this server does not.
    refused: ClassVar[dict[str, str]] = {}
    nullable: ClassVar[frozenset[str]] = frozenset()  # names for which null is a value of its own

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        check_json(given)
        for name, why in cls.refused.items():
            if given.get(name) not in (None, [], {}, ""):
                raise ValueError(f"{name}: {why}")
        return {k: v for k, v in given.items() if v is not None or k in cls.nullable}

    def said(self) -> dict[str, Any]:
        """Give what people wrote, for a log."""
        return self.model_dump(include=set(_SAID), exclude_unset=True)


Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Token = Annotated[int, Field(ge=0, le=_MAX_TOKEN)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=_MAX_STOPS),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
]


Tokens = list[StrictInt]
Inputs = str | Tokens | list[str] | list[Tokens]  # a text, its tokens, or several of either


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class Generating(Body):
    """What all routes that write have in common."""

    refused: ClassVar[dict[str, str]] = {
        "grammar": "not taken, since some never end; see response_format",
        "mirostat_mode": "this server has temperature, top_p, min_p and top_k",
    }

    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = _DEFAULT.temperature
    top_p: Probability = _DEFAULT.top_p
    min_p: Probability = _DEFAULT.min_p
    top_k: Annotated[int, Field(ge=0, le=_MAX_TOKEN)] = _DEFAULT.top_k
    repeat_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[Token, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=1024
    )
    seed: int | None = None
    stop: Stops = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[StrictInt, Field(ge=1, le=_MAX_CHOICES)] = 1

    def sampling(self, n_vocab: int, *, grammar: str = "") -> list[Sampling]:
        """Say how tokens are drawn, for each of the n answers.

        Raises
        ------
        Refusal
            400: `logit_bias` names a token that the model has not.
        """
        if max(self.logit_bias, default=0) >= n_vocab:
            raise Refusal(400, f"logit_bias: a token is not 0 to {n_vocab - 1}")
        return [
            Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                min_p=self.min_p,
                top_k=self.top_k,
                repeat_penalty=self.repeat_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                # so that the answers to one question differ
                seed=None if self.seed is None else (self.seed + i) % _SEEDS,
                bias=tuple(self.logit_bias.items()),
                grammar=grammar,
            )
            for i in range(self.n)
        ]


def split_inputs(given: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Cut what a request gives into single texts."""
    if isinstance(given, str):
        return [given]
    tokens = [item for item in given if isinstance(item, int)]
    return [tokens] if tokens else [item for item in given if not isinstance(item, int)]


def read_json(text: str) -> Any:
    """Read JSON that stands in a text of a request.

    Raises
    ------
    ValueError
        It is no JSON; as of `check_json`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None
    check_json(value)
    return value


def check_json(value: Any, depth: int = _MAX_DEPTH) -> None:
    """Refuse what is nested too deep, and halves of characters, which no text may have.

    Raises
    ------
    ValueError
        There is such a thing in it.
    """
    if isinstance(value, str):
        value.encode()
        return
    if not isinstance(value, dict | list):
        return
    if depth == 0:
        raise ValueError(f"the request is nested deeper than {_MAX_DEPTH} levels")
    for item in value:
        check_json(item, depth - 1)
    for item in value.values() if isinstance(value, dict) else ():
        check_json(item, depth - 1)
