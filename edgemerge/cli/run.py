"""`edgemerge run`: one prompt, one answer."""

from __future__ import annotations

import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from edgemerge.cli import generation, loading, request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.terminal import print_json, talks_plainly
from edgemerge.errors import RecipeError

if TYPE_CHECKING:
    from edgemerge.runtime.llama import Model

__all__ = ["run_command"]

MAX_PROMPT_BYTES = 16 << 20  # more than any context holds
PATIENCE = 2.0  # seconds that a pipe beside -p may be silent; ssh without -n leaves one open


@talks_plainly
def run_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.gguf", help="GGUF file, or org/name:TYPE.")
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--prompt",
            metavar="TEXT",
            help="Prompt; what comes on stdin follows it, and - stands for stdin alone.",
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Read the prompt from a file.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    system: generation.System = "",
    template: generation.TemplateFile = None,
    max_tokens: generation.MaxTokens = generation.MAX_TOKENS,
    temperature: generation.Temperature = 0.8,
    top_k: generation.TopK = 40,
    top_p: generation.TopP = 0.95,
    min_p: generation.MinP = 0.05,
    repeat_penalty: generation.RepeatPenalty = None,
    seed: generation.Seed = None,
    stop: generation.Stops = None,
    context: loading.ContextSize = None,
    threads: loading.Threads = None,
    gpu_layers: loading.GpuLayers = None,
    lora: loading.Loras = None,
    rpc: loading.Rpc = None,
    i_trust_this_network: loading.TrustNetwork = False,
    models_folder: ModelsFolder = None,
    download: Download = False,
    json_: request.Json = False,
) -> None:
    """Answer a prompt, or continue a text.

    A model with a chat template takes the prompt as the user's message; one without continues it.
    The text goes to stdout, its figures to stderr.
    """
    from edgemerge.errors import RecipeError
    from edgemerge.runtime.generate import Session, check_prompt, read_prompt

    if raw and (system or template):
        raise typer.BadParameter("--raw continues the text as it is: no --system, no --template")
    text = _read_text(prompt, file)
    if not text.strip():
        raise RecipeError("the prompt is empty: give the model at least one word to go on from")
    generation.check_text(system, "the system prompt")
    model = make_finder(models_folder, download, quiet=json_).find_model(str(model))
    workers = loading.parse_rpc(rpc, i_trust_this_network)
    with generation.load(model, threads, gpu_layers, lora, workers) as loaded:
        if not raw:
            text = _as_message(loaded, text, system, template)
        tokens = read_prompt(loaded, text)
        sampling = generation.read_sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed)
        n_wanted = len(tokens) + (max_tokens or loaded.n_ctx_train)
        n_ctx = generation.pick_context(loaded, context, n_wanted)
        check_prompt(tokens, n_ctx)
        with Session(loaded, n_ctx, sampling) as session:
            pieces = session.generate(
                tokens, max_tokens or None, stops=stop or (), progress=generation.show_progress
            )
            if json_:
                print_json(
                    {
                        "model": str(model),
                        "text": "".join(pieces),
                        "seed": sampling.seed,
                        **generation.figures_as_json(session),
                    }
                )
                return
            try:
                generation.say(pieces)
            finally:  # Ctrl-C ends the text, not its figures
                generation.clear_line()
                generation.tell_end(session)
                generation.tell(generation.format_figures(session))


def _read_text(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise typer.BadParameter("give the prompt with -p or with --file, not both")
    if file is not None:
        with file.open("rb") as stream:
            return _decode(_read_some(stream, str(file)), str(file))
    if prompt not in (None, "-"):
        parts = [generation.check_text(str(prompt), "the prompt"), _read_piped()]
        return "\n\n".join(filter(None, parts))
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise typer.BadParameter("give a prompt with -p TEXT, with --file, or on stdin")
    return _decode(_read_some(sys.stdin.buffer, "stdin"), "stdin")


def _read_piped() -> str:
    """Read the text that goes after a prompt, as of `cat report.txt | edgemerge run ... -p TEXT`."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    with suppress(OSError, ValueError):  # what stands in for stdin may be no file of the system's
        if not select.select([sys.stdin], [], [], PATIENCE)[0]:
            generation.note(
                "waiting for the text on stdin that goes after the prompt (none: </dev/null)"
            )
    return _decode(_read_some(sys.stdin.buffer, "stdin"), "stdin")


def _read_some(stream: BinaryIO, what: str) -> bytes:
    raw = stream.read(MAX_PROMPT_BYTES + 1)
    if len(raw) > MAX_PROMPT_BYTES:
        raise RecipeError(f"{what}: the prompt is longer than {MAX_PROMPT_BYTES >> 20} MiB")
    return raw


def _decode(raw: bytes, what: str) -> str:
    # An editor ends a file with a new line, which is no part of a text to go on with.
    text = raw.decode("utf-8", errors="surrogateescape").removesuffix("\n").removesuffix("\r")
    return generation.check_text(text, what)


def _as_message(model: Model, text: str, system: str, file: Path | None) -> str:
    """Put the prompt into the chat template; a model without one continues the text."""
    from edgemerge.errors import RuntimeFailure
    from edgemerge.runtime.template import load_template

    template = load_template(model, file)
    if template is None and system:
        raise RuntimeFailure(
            f"{model.path}: this model has no chat template and so no place for --system; "
            "put it into the prompt, or give a template with --template FILE"
        )
    if template is None:
        generation.note(f"{model.path} has no chat template: the text is continued; see --template")
        return text
    messages = [{"role": "system", "content": system}] if system else []
    return template.render([*messages, {"role": "user", "content": text}])
