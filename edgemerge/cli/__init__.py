"""The command line: parse, call the library, print; only here is printed and an exit code picked.

Exit codes: 0 done; 1 an error, which is one sentence on stderr; 2 wrong usage; 3 `fleet status` found a
device that needs somebody; 129 the terminal was closed (SIGHUP); 130 Ctrl-C (SIGINT); 143 SIGTERM.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Annotated, Any

import typer

__all__ = ["COMMANDS", "main", "make_app", "settle_process"]

# Command -> its module here, whose function is NAME_command (with _ for -), or whose GROUP has commands of
# its own; in the order of --help.
COMMANDS = {
    "merge": "merge",
    "plan": "plan",
    "inspect": "inspect",
    "verify": "verify",
    "record": "record",
    "align": "align",
    "compare": "compare",
    "convert": "convert",
    "imatrix": "imatrix",
    "extract": "extract",
    "combine": "combine",
    "delta": "delta",
    "transplant": "transplant",
    "run": "run",
    "chat": "chat",
    "serve": "serve",
    "rpc-worker": "rpc_worker",
    "eval": "eval",
    "search": "search",
    "worker": "worker",
    "bench": "bench",
    "doctor": "doctor",
    "keygen": "sign",
    "sign": "sign",
    "publish": "publish",
    "fetch": "fetch",
    "update": "update",
    "rollback": "rollback",
    "fleet": "fleet",
    "demo": "demo",
}


def main() -> None:
    """Entry point of the `edgemerge` command."""
    settle_process()
    named = [word for word in sys.argv[1:2] if word in COMMANDS]
    try:
        make_app(named or COMMANDS)()
    finally:
        gc.freeze()  # the process ends: what is garbage need not be found


def settle_process() -> None:
    """Set what a process that is a command needs, before NumPy is imported."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names and metadata may hold what the terminal cannot show; that is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    # What computes is our own threads, as many as the plan says. No merge asks BLAS for anything; without
    # this line it would make its threads all the same.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    # Imports make a hundred thousand objects and no garbage, for which Python would look every 700. It stays
    # so: what twenty thousand objects hold is little beside a model.
    gc.set_threshold(20_000)


def make_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """Make the command line of some commands: reading the options of all takes longer than most of them."""
    app = _make_group(
        "Merge fine-tuned language models on the device, inside a memory budget, into one GGUF.",
        _root,
    )
    for name in names:
        module = import_module(f"edgemerge.cli.{COMMANDS[name]}")
        if hasattr(module, "GROUP"):
            inner = _make_group((module.__doc__ or "").partition(": ")[2], lambda: None)
            for inner_name, command in module.GROUP.items():
                _add(inner, inner_name, command, None)
            app.add_typer(inner, name=name)
            continue
        own = getattr(module, "CLASSES", {})
        _add(app, name, getattr(module, f"{name.replace('-', '_')}_command"), own.get(name))
    return app


def _make_group(help_text: str, callback: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(
        name="edgemerge",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=help_text,
    )
    app.callback()(callback)
    return app


def _add(app: typer.Typer, name: str, command: Callable[..., None], own: Any) -> None:
    summary = " ".join(
        (command.__doc__ or "").partition("\n\n")[0].split()
    )  # which is else cut off
    app.command(name, cls=own, short_help=summary)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("edgemerge"))
        raise typer.Exit


def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass
