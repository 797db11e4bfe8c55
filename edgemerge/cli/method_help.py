"""The methods and their parameters at the end of `merge --help`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

__all__ = ["HelpWithMethods"]


class HelpWithMethods(TyperCommand):
    """A command whose help ends with the methods; they are imported when the help is asked for."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write each method with its parameters, a value being the default."""
        from edgemerge.methods.table import METHODS

        rows = []
        for method in METHODS.values():
            shown = [
                p.name if p.default is None else f"{p.name}={_word(p.default)}"
                for p in method.parameters
                if p.name != "int8_mask"
            ]
            parameters = f" ({', '.join(shown)})" if shown else ""
            rows.append((method.name, f"{method.summary}{parameters}"))
        with formatter.section("Methods (-m) and their parameters (-P)"):
            formatter.write_dl(rows)


def _word(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
