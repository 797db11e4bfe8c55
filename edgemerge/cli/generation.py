"""What `run` and `chat` have in common: options of the draw, text on the terminal, figures."""

from __future__ import annotations

import os
import secrets
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.cli import loading
from edgemerge.cli.terminal import plain

if TYPE_CHECKING:
    from edgemerge.runtime.engine.messages import Sampling
    from edgemerge.runtime.generate import Session
    from edgemerge.runtime.llama import Model

__all__ = [
    "MAX_TOKENS",
    "MaxTokens",
    "MinP",
    "RepeatPenalty",
    "Seed",
    "Stops",
    "System",
    "Temperature",
]
__all__ += ["TemplateFile", "TopK", "TopP", "check_text", "clean", "clear_line"]
__all__ += ["figures_as_json", "format_figures", "load", "note", "pick_context", "read_sampling"]
__all__ += ["say", "show_progress", "tell", "tell_end"]

MAX_TOKENS = 512  # of an answer, unless asked for more
LONG = 128  # tokens of a prompt that take a moment to read

System = Annotated[str, typer.Option("--system", metavar="TEXT", help="System prompt.")]
TemplateFile = Annotated[
    Path | None,
    typer.Option(
        "--template", metavar="FILE", help="Chat template (Jinja) instead of the model's own."
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        "--temp",
        min=0.0,
        metavar="X",
        help="Higher is more varied; 0 takes the likeliest token.",
    ),
]
TopK = Annotated[
    int,
    typer.Option("--top-k", min=0, metavar="N", help="Draw from the N likeliest tokens; 0: all."),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        metavar="X",
        help="Draw from the likeliest tokens that have X together.",
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p",
        min=0.0,
        max=1.0,
        metavar="X",
        help="Draw from tokens at least X times as likely as the first.",
    ),
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option(
        "--repeat-penalty",
        min=0.01,
        metavar="X",
        help="Penalty on the last 64 tokens; 1: none [default: what the model asks for, else 1].",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        max=2**32 - 2,
        metavar="N",
        help="Seed of the draw; with the same -t it repeats an answer [default: by chance].",
    ),
]
Stops = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", metavar="TEXT", help="End the answer before this text; may be repeated."
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option(
        "-n",
        "--max-tokens",
        min=0,
        metavar="N",
        help="Most tokens of an answer; 0: as many as the context holds.",
    ),
]


def read_sampling(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float | None,
    seed: int | None,
) -> Sampling:
    """Take the options of the draw; without a seed, one by chance.

    Without a penalty, the engine takes what the model's authors ask for in its metadata.
    """
    from edgemerge.runtime.engine.draw import MAX_SEED
    from edgemerge.runtime.engine.messages import Sampling

    return Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=secrets.randbelow(MAX_SEED + 1) if seed is None else seed,
    )


def check_text(text: str, what: str) -> str:
    """Refuse text that came in as bytes of another encoding.

    Raises
    ------
    RecipeError
        It is not UTF-8.
    """
    from edgemerge.errors import RecipeError

    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecipeError(f"{what} is not UTF-8 text: convert it first") from error
    return text


def load(
    path: Path,
    threads: int | None,
    gpu_layers: int | None,
    loras: list[str] | None,
    rpc: tuple[str, ...],
) -> Model:
    """Load a model; say so where the machine has less than it takes, or than is asked for."""
    if not rpc:  # its weights are the workers'
        _warn_of_memory(path)
    n_processors = len(os.sched_getaffinity(0))
    if threads is not None and threads > n_processors:
        note(f"{threads} threads share {_count(n_processors, 'processor')}: fewer are faster")
    model = loading.load(path, threads, gpu_layers, loras, rpc)
    if gpu_layers and not model.library.has_device():
        note("this llama.cpp was built without GPU support: all layers run on the processor")
    return model


def _warn_of_memory(path: Path) -> None:
    from edgemerge.runtime.board.device import read_memory
    from edgemerge.runtime.model_files import model_files
    from edgemerge.sizes import format_size

    available = read_memory().available
    size = sum(file.stat().st_size for file in model_files(path))
    if 0 < available < size:
        note(
            f"the model has {format_size(size)} and {format_size(available)} of memory are free: "
            "it will be read from disk again for each token; a smaller type is faster"
        )


def pick_context(model: Model, given: int | None, wanted: int) -> int:
    """Take the context that is asked for, or as much of a wanted one as model and memory allow."""
    from edgemerge.runtime.context_size import choose_context

    if given is None:
        return choose_context(model, wanted)
    if given > model.n_ctx_train:
        note(
            f"the model was trained on {model.n_ctx_train} tokens and may lose its way after that many"
        )
    return given


def tell(text: str, end: str = "\n") -> None:
    """Write on stderr, if there is one; print(file=None) would write on stdout."""
    if sys.stderr is not None:
        print(text, end=end, file=sys.stderr, flush=True)


def note(sentence: str) -> None:
    """Say something beside the text, on stderr."""
    tell(f"note: {plain(sentence)}")


def clean(text: str) -> str:
    """Keep a model's text from moving the cursor: of control characters, lines and tabs pass."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def say(pieces: Iterable[str]) -> str:
    """Print text on stdout as it comes, end its line, and give back what was said."""
    said = []
    shown = ""
    try:
        for piece in pieces:
            said.append(piece)
            if now := clean(piece):
                print(now, end="", flush=True)
                shown = now
    finally:
        if shown and not shown.endswith("\n"):
            print(flush=True)
    return "".join(said)


def show_progress(done: int, total: int) -> None:
    """Show on stderr, while it is a terminal, how much of a long prompt is read."""
    if sys.stderr is None or not sys.stderr.isatty():
        return
    if total - done >= LONG:
        tell(f"\rreading: {done} of {total} tokens", end="")
    elif done == total:
        clear_line()


def clear_line() -> None:
    """Take back what stands on the terminal's line: progress, or the ^C that ended it."""
    if sys.stderr is not None and sys.stderr.isatty():
        tell("\r\x1b[K", end="")


def format_figures(session: Session) -> str:
    """Write speed, memory and seed of the last text in one line."""
    from edgemerge.machine.process import read_process
    from edgemerge.sizes import format_size

    figures, buffers = session.figures, session.context.buffers
    reused = f" ({figures.n_reused} kept)" if figures.n_reused else ""
    parts = [
        f"prompt {_count(figures.n_prompt, 'token')}{reused}{_rate(figures.prompt_rate)}",
        f"answer {_count(figures.n_generated, 'token')}{_rate(figures.rate)}",
    ]
    if figures.first_token_seconds is not None:
        parts.append(f"first token after {figures.first_token_seconds:.2f} s")
    sizes = f"weights {format_size(buffers.weights)}, KV cache {format_size(buffers.kv)}"
    rss = format_size(read_process().rss)
    if buffers.device:
        place = "workers" if session.model.has_workers else "the GPU"
        parts.append(f"memory {rss}; {sizes}, on {place} {format_size(buffers.device)}")
    else:
        parts.append(f"memory {rss}, of it {sizes}")
    if session.sampling.temperature > 0:
        parts.append(f"seed {session.sampling.seed}")
    return "; ".join(parts)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _rate(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f", {tokens_per_second:.1f} tokens/s"


def tell_end(session: Session) -> None:
    """Say so where a limit ended the last text, not the model."""
    from edgemerge.runtime.generate import End

    if session.figures.end is End.CONTEXT:
        note(f"the answer was cut off: the context of {session.n_ctx} is full")
    elif session.figures.end is End.LENGTH:
        note("the answer was cut off at --max-tokens; more with -n N, or -n 0 for all that fits")
    elif session.figures.end is End.LOOP:
        note("the answer was ended, as it repeated itself; try --repeat-penalty 1.1")


def figures_as_json(session: Session) -> dict[str, Any]:
    """Speed and memory of the last text; seconds, bytes."""
    from edgemerge.machine.process import read_process

    figures, buffers = session.figures, session.context.buffers
    return {
        "end": figures.end.value,
        "prompt_tokens": figures.n_prompt,
        "prompt_seconds": figures.prompt_seconds,
        "prompt_tokens_per_second": figures.prompt_rate,
        "generated_tokens": figures.n_generated,
        "tokens_per_second": figures.rate,
        "first_token_seconds": figures.first_token_seconds,
        "context": session.n_ctx,
        "threads": session.model.threads.generate,
        "prompt_threads": session.model.threads.prompt,
        "memory": {
            "rss_bytes": read_process().rss,
            "weights_bytes": buffers.weights,
            "kv_bytes": buffers.kv,
            "compute_bytes": buffers.compute,
        },
    }
