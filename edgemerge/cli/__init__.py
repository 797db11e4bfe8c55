"""The command line: parse, call the library, print; only here is printed and an exit code picked.

Exit codes: 0 done; 1 an error of ours, one sentence on stderr; 2 usage; 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from edgemerge.cli.align import align_command
from edgemerge.cli.bench import bench_command
from edgemerge.cli.chat import chat_command
from edgemerge.cli.convert import convert_command
from edgemerge.cli.demo import demo_command
from edgemerge.cli.doctor import doctor_command
from edgemerge.cli.eval import eval_command
from edgemerge.cli.inspect import inspect_command
from edgemerge.cli.merge import merge_command, plan_command
from edgemerge.cli.run import run_command
from edgemerge.cli.serve import serve_command
from edgemerge.cli.sign import keygen_command, sign_command
from edgemerge.cli.verify import verify_command

__all__ = ["app", "main"]

app = typer.Typer(
    name="edgemerge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Merge fine-tuned language models on the device, inside a memory budget, into one GGUF.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("edgemerge"))
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


app.command("merge")(merge_command)
app.command("plan")(plan_command)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)
app.command("align")(align_command)
app.command("convert")(convert_command)
app.command("run")(run_command)
app.command("chat")(chat_command)
app.command("serve")(serve_command)
app.command("eval")(eval_command)
app.command("bench")(bench_command)
app.command("doctor")(doctor_command)
app.command("keygen")(keygen_command)
app.command("sign")(sign_command)
app.command("demo")(demo_command)


def main() -> None:
    """Entry point of the `edgemerge` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names and metadata may hold what the terminal cannot show; that is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    # What computes is our own threads, as many as the plan says; NumPy's would only spin beside them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    app()
