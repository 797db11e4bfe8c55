"""`edgemerge chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemerge.cli import generation, loading
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.generation import tell
from edgemerge.cli.terminal import SignalReceived, plain, talks_plainly

if TYPE_CHECKING:
    from edgemerge.runtime.conversation import Conversation
    from edgemerge.runtime.llama import Model
    from edgemerge.runtime.template import Template

__all__ = ["chat_command"]

CONTEXT = 4096  # tokens
PROMPT = "> "
HELP = """\
/help          this list
/clear         forget what was said, but not the system prompt
/system TEXT   set the system prompt; without TEXT, show it
/retry         answer the last message again
/stats         speed and memory of the last answer
/save FILE     write the conversation as JSON; over a file of something else: /save! FILE
/load FILE     go on with one that was saved
/quit, /exit   leave, as Ctrl-D does
Ctrl-C stops an answer. A message that begins with / is sent with a space before it."""


@talks_plainly
def chat_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.gguf", help="GGUF file, or org/name:TYPE.")
    ],
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
) -> None:
    """Talk with a model; /help lists what else can be said.

    Each line is a message. From a pipe, each line is answered on stdout.
    """
    from edgemerge.runtime.conversation import Conversation
    from edgemerge.runtime.generate import Session

    model = make_finder(models_folder, download).find_model(str(model))
    workers = loading.parse_rpc(rpc, i_trust_this_network)
    with generation.load(model, threads, gpu_layers, lora, workers) as loaded:
        its_template = _need_template(loaded, template)
        sampling = generation.read_sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed)
        n_ctx = generation.pick_context(loaded, context, CONTEXT)
        with Session(loaded, n_ctx, sampling) as session:
            conversation = Conversation(
                session,
                its_template,
                system=generation.check_text(system, "the system prompt"),
                max_tokens=max_tokens or None,
                stops=stop or (),
            )
            chat = _Chat(conversation)
            if chat.is_terminal:
                name = plain(loaded.metadata.get("general.name") or loaded.path.stem)
                drawn = f", seed {sampling.seed}" if sampling.temperature > 0 else ""
                tell(f"{name}, context {n_ctx} tokens{drawn}; /help")
            chat.talk()
            if session.figures.n_prompt:  # something was asked
                tell(generation.format_figures(session))


def _need_template(model: Model, file: Path | None) -> Template:
    from edgemerge.errors import RuntimeFailure
    from edgemerge.runtime.template import load_template

    template = load_template(model, file)
    if template is None:
        raise RuntimeFailure(
            f"{model.path}: this model has no chat template; continue a text with "
            "edgemerge run --raw, or give a template with --template FILE"
        )
    return template


class _Chat:
    """Reads lines, answers messages, obeys commands.

    In a terminal an error is told and the talk goes on; from a pipe it ends the command.
    """

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._files: set[Path] = set()  # saved or loaded, and so ours to replace
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/system": self._system,
            "/retry": self._retry,
            "/stats": self._stats,
            "/save": self._save,
            "/save!": self._save_over,
            "/load": self._load,
        }

    def talk(self) -> None:
        from edgemerge.errors import EdgemergeError

        for line in self._lines():
            if line.startswith("/") and line.split()[0] in ("/quit", "/exit"):
                return
            try:
                self._take(line)
            except SignalReceived as error:
                if not self._is_ctrl_c(error):
                    raise
                generation.clear_line()
                generation.note("stopped")
            except (EdgemergeError, OSError) as error:
                if not self.is_terminal or isinstance(error, BrokenPipeError):
                    raise
                _tell_error(error)

    def _is_ctrl_c(self, stopped: SignalReceived) -> bool:
        return self.is_terminal and stopped.number == signal.SIGINT

    def _lines(self) -> Iterator[str]:
        """Lines that are not empty; Ctrl-D, or Ctrl-C twice in a row, ends them."""
        if sys.stdin is None:
            return
        read = self._line_reader()
        n_interrupts = 0
        while n_interrupts < 2:
            try:
                line = read()
            except EOFError:
                break
            except SignalReceived as error:
                if not self._is_ctrl_c(error):
                    raise
                n_interrupts += 1
                tell("\n(Ctrl-C again or Ctrl-D leaves)" if n_interrupts < 2 else "")
                continue
            n_interrupts = 0
            if line.strip():
                yield line
        if self.is_terminal and n_interrupts < 2:
            tell("")

    def _line_reader(self) -> Callable[[], str]:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
        if self.is_terminal and sys.stdout is not None and sys.stdout.isatty():
            with suppress(ImportError):  # a Python may be built without it
                import readline  # noqa: F401 (gives input() its history and keys)
            return lambda: input(PROMPT)

        def read() -> str:
            if self.is_terminal:
                tell(PROMPT, end="")
            if line := sys.stdin.readline():
                return line.rstrip("\r\n")
            raise EOFError

        return read

    def _take(self, line: str) -> None:
        generation.check_text(line, "the message")
        if not line.startswith("/"):
            message = line.removeprefix(" ") if line.startswith(" /") else line
            self._answer(self.conversation.ask(message, progress=generation.show_progress))
            return
        from edgemerge.errors import RecipeError

        name, _, rest = line.strip().partition(" ")
        if name in self._commands:
            self._commands[name](rest.strip())
        else:  # from a pipe too, the lines after it can be answered
            _tell_error(RecipeError(f"there is no command {name}; /help lists them"))

    def _answer(self, pieces: Generator[str, None, None]) -> None:
        if self.conversation.n_forgotten:
            generation.note(
                f"the context is full; turns forgotten, oldest first: {self.conversation.n_forgotten}"
            )
        with closing(pieces):
            if not generation.say(pieces):
                generation.note("the model said nothing")
        generation.tell_end(self.conversation.session)

    def _help(self, _rest: str) -> None:
        tell(HELP)

    def _clear(self, _rest: str) -> None:
        self.conversation.turns = []

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = text
        else:
            tell(generation.clean(self.conversation.system) or "(no system prompt)")

    def _retry(self, _rest: str) -> None:
        from edgemerge.errors import RecipeError

        if not self.conversation.turns:
            raise RecipeError("nothing was said yet")
        self._answer(self.conversation.retry(progress=generation.show_progress))

    def _stats(self, _rest: str) -> None:
        session = self.conversation.session
        if not session.figures.n_prompt:
            tell("nothing was said yet")
            return
        tell(generation.format_figures(session))
        n_used = session.figures.n_prompt + session.figures.n_generated
        tell(f"context {n_used} of {session.n_ctx} tokens, turns {len(self.conversation.turns)}")

    def _save(self, name: str) -> None:
        from edgemerge.errors import OutputError

        path = self._name_file(name)
        if path.is_file() and path not in self._files:
            raise OutputError(
                f"exists already; choose another name or say /save! {path}", path=path
            )
        self._save_over(name)

    def _save_over(self, name: str) -> None:
        from edgemerge.runtime.conversation import write_messages

        path = self._name_file(name)
        write_messages(self.conversation.messages, path, force=True)
        self._files.add(path)
        generation.note(f"{path} is written")

    def _load(self, name: str) -> None:
        from edgemerge.runtime.conversation import read_messages

        path = self._name_file(name)
        system = self.conversation.system
        self.conversation.messages = read_messages(path)
        self._files.add(path)
        replaced = "" if self.conversation.system == system else "; the system prompt is the file's"
        generation.note(f"turns loaded: {len(self.conversation.turns)}{replaced}")

    def _name_file(self, name: str) -> Path:
        from edgemerge.errors import RecipeError

        if not name or "\0" in name:
            raise RecipeError("give the name of a file, as in /save talk.json")
        try:
            return Path(name).expanduser()
        except RuntimeError as error:  # "~stranger/talk.json"
            raise RecipeError(f"{name}: whose home that is, this machine does not know") from error


def _tell_error(error: Exception) -> None:
    sentence = str(error)
    if isinstance(error, OSError) and error.strerror:
        sentence = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    tell(f"edgemerge: {plain(sentence)}")
