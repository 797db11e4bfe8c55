"""From the arguments of `merge` and `plan` to a `Recipe`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.remote.stand_ins import is_address
from edgemerge.types import Recipe

if TYPE_CHECKING:
    from edgemerge.finding.finder import Finder

__all__ = ["Base", "Force", "Json", "Memory", "Method", "Models", "Output", "Parameter", "Preset"]
__all__ += [
    "Align",
    "Ask",
    "Cluster",
    "Imatrix",
    "Neurons",
    "NoAsk",
    "Report",
    "Seed",
    "Sign",
    "Split",
]
__all__ += ["Disk", "Strict", "TensorTypes", "Threads", "Type"]
__all__ += ["Format", "read_request", "read_tensor_types", "split_weight", "with_format"]
__all__ += ["FactorType", "read_factor_type", "with_output"]

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE.yml | MODEL[=WEIGHT]...",
        help="One mergekit recipe, or with -m the models: GGUF files, Hugging Face directories, "
        "org/name[@revision][:TYPE] on the hub, or addresses (https://, hf://, s3://, sftp://); each perhaps "
        "with LoRA adapters, as MODEL+ADAPTER.",
        show_default=False,
    ),
]
Output = Annotated[
    str,
    typer.Option(
        "-o",
        "--output",
        metavar="OUT.gguf | OUT/",
        help="GGUF file to make, or with a / at its end a Hugging Face directory.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="gguf, or hf for a Hugging Face directory [default: what -o says].",
    ),
]
PlannedFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="gguf, or hf for a Hugging Face directory [default: what the recipe says, else gguf].",
    ),
]
Method = Annotated[
    str | None, typer.Option("-m", "--method", metavar="METHOD", help="Merge method.")
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="The model the others were tuned from."),
]
Type = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="TYPE",
        help="F16, Q8_0, Q5_K_M, Q4_K_M, IQ4_XS, Q3_K_M, Q2_K … or keep "
        "[default: F16 for unquantised inputs, else keep]. A directory: F32, F16 or BF16.",
    ),
]
TensorTypes = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        help="ggml type of the tensors whose GGUF name a regular expression finds, e.g. "
        "--tensor-type attn_v=Q8_0; may be repeated, the first match decides.",
    ),
]
Imatrix = Annotated[
    str | None,
    typer.Option(
        "--imatrix", metavar="FILE", help="Importance matrix to quantise by; see imatrix."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Budget of the process [default: 512MiB]."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="Workers [default: all cores].")
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, max=2**64 - 1, metavar="N", help="Seed of DARE and DELLA [default: 0]."
    ),
]
Parameter = Annotated[
    list[str] | None,
    typer.Option("-P", metavar="NAME=VALUE", help="Parameter of the method, e.g. -P density=0.5."),
]
Align = Annotated[
    str | None,
    typer.Option(
        "--align",
        metavar="HOW",
        help="hard, soft, full or off: bring attention heads into the base's order first; full also "
        "rotates values and matches neurons [default: hard for hierarchical, else off].",
    ),
]
Neurons = Annotated[
    bool,
    typer.Option("--neurons", help="Match feed-forward neurons too, for models trained apart."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="paper: the settings of arXiv 2511.13373; ramp: lambda from 0.6 in the first layer to 1.2 "
        "in the last.",
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split-max-size",
        metavar="SIZE",
        help="Write OUT-00001-of-0000N.gguf and so on, with at most so many bytes of tensors each "
        "[default: one file; in a directory 5 GB].",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Refuse unknown and duplicate keys of a recipe, instead of noting them."
    ),
]
Disk = Annotated[
    str | None,
    typer.Option(
        "--disk",
        metavar="SIZE",
        help="Disk that the stages of a recipe may take beside the output [default: what is free].",
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="ADDRESS",
        help="Have the workers of a Dask scheduler make the tensors: tcp://HOST:PORT, or local:N for N "
        "processes of this machine.",
    ),
]
EvalCluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="ADDRESS",
        help="Have the workers of a Dask scheduler answer: tcp://HOST:PORT, or local:N for N processes of "
        "this machine.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Report = Annotated[
    Path | None, typer.Option("--report", metavar="R.html", help="Also write a page with plots.")
]
Ask = Annotated[
    list[str] | None,
    typer.Option(
        "--ask",
        metavar="TEXT",
        help="Ask the inputs and the result this when done; may be repeated [default, where a terminal "
        "shows it: three questions of our own].",
    ),
]
NoAsk = Annotated[bool, typer.Option("--no-ask", help="Ask nothing when done.")]
Sign = Annotated[
    Path | None,
    typer.Option("--sign", metavar="PRIVATE.pem", help="Also sign the output; see keygen."),
]


def with_output(recipe: Recipe, output: str, out_format: str | None) -> tuple[Recipe, Path]:
    """Say in the recipe what kind of output is wanted, and return the path of that.

    Parameters
    ----------
    recipe : Recipe
        From `read_request`.
    output, out_format : str
        What -o and --format were given.

    Raises
    ------
    typer.BadParameter
        They contradict each other (exit code 2).
    """
    is_folder = output.endswith("/")
    if is_folder and out_format == "gguf":
        raise typer.BadParameter("-o with a / at its end is a directory; leave out --format gguf")
    recipe = with_format(recipe, "hf" if is_folder else out_format)
    if recipe.out_format == "hf" and not is_folder and output.endswith(".gguf"):
        raise typer.BadParameter("a Hugging Face directory is no .gguf; give another -o")
    return recipe, Path(output)


def with_format(recipe: Recipe, out_format: str | None) -> Recipe:
    """Take the format from the command line, where it states one.

    Raises
    ------
    RecipeError
        There is no such format.
    """
    from edgemerge.recipe.recipe import check_format

    return recipe if out_format is None else replace(recipe, out_format=check_format(out_format))


FactorType = Annotated[
    str, typer.Option("--type", metavar="TYPE", help="F32 or F16, of the factors.")
]


def read_factor_type(text: str) -> str:
    """Read the type of a LoRA adapter's factors.

    Raises
    ------
    typer.BadParameter
        It is neither F32 nor F16 (exit code 2).
    """
    if text.upper() not in ("F32", "F16"):
        raise typer.BadParameter(f"--type {text!r} must be F32 or F16")
    return text.upper()


def read_request(
    models: list[str],
    *,
    method: str | None,
    base: str | None,
    out_type: str | None,
    seed: int | None,
    align: str | None,
    neurons: bool,
    parameters: list[str] | None,
    preset: str | None,
    tensor_types: list[str] | None,
    imatrix: str | None,
    strict: bool,
    finder: Finder,
) -> Recipe:
    """Build the recipe that the arguments describe.

    Raises
    ------
    typer.BadParameter
        The arguments contradict each other (exit code 2).
    RecipeError
        What they ask for does not exist or is not possible.
    """
    from edgemerge.recipe.presets import with_preset
    from edgemerge.recipe.recipe import check_alignment, find_imatrix, load_recipe, make_recipe
    from edgemerge.recipe.stages import with_settings

    pairs = read_tensor_types(tensor_types)
    if method is None:
        if len(models) != 1 or not models[0].endswith((".yml", ".yaml")):
            raise typer.BadParameter("give one RECIPE.yml, or a method with -m and its models")
        if base is not None or parameters:
            raise typer.BadParameter("--base and -P go with -m; a recipe file has its own")
        recipe = load_recipe(models[0], strict=strict, finder=finder)
        if out_type is not None:
            recipe = replace(recipe, out_type=out_type)
        if seed is not None:
            recipe = with_settings(recipe, seed=seed)
        if align is not None:
            recipe = with_settings(recipe, align=check_alignment(align))
        if neurons:
            recipe = with_settings(recipe, neurons=True)
        if pairs:
            recipe = replace(recipe, tensor_types=pairs)
        if imatrix is not None:
            recipe = replace(recipe, imatrix=find_imatrix(imatrix))
    elif any(text.endswith((".yml", ".yaml")) for text in models):
        raise typer.BadParameter(
            "a recipe file names its own method and models: leave out -m, or give models instead"
        )
    else:
        recipe = make_recipe(
            method,
            [split_weight(text) for text in models],
            base=base,
            parameters=_parameters(parameters or []),
            out_type=out_type,
            seed=seed or 0,
            align=align,
            neurons=neurons,
            tensor_types=pairs,
            imatrix=imatrix,
            finder=finder,
        )
    return recipe if preset is None else with_preset(recipe, preset)


def read_tensor_types(texts: list[str] | None) -> tuple[tuple[str, str], ...]:
    """Split what --tensor-type was given into patterns and types.

    Raises
    ------
    typer.BadParameter
        One is not PATTERN=TYPE.
    """
    pairs = []
    for text in texts or []:
        pattern, _, dtype = text.rpartition("=")
        if not pattern or not dtype:
            raise typer.BadParameter(
                f"--tensor-type {text!r} must be PATTERN=TYPE, e.g. --tensor-type attn_v=Q8_0"
            )
        pairs.append((pattern, dtype))
    return tuple(pairs)


def split_weight(text: str) -> tuple[str, float | None]:
    """Split MODEL=WEIGHT; a name that exists, and the query of an address, may have the sign in it.

    Raises
    ------
    typer.BadParameter
        The weight is no number.
    """
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists() or (is_address(text) and "?" in text):
        return text, None
    try:
        return path, float(weight)
    except ValueError:
        if is_address(text):  # whose login may have the sign in it
            return text, None
        raise typer.BadParameter(f"{text!r}: the weight {weight!r} is no number") from None


def _parameters(texts: list[str]) -> dict[str, Any]:
    from edgemerge.cli.tasks import refuse_twins

    pairs = [_parameter(text) for text in texts]
    refuse_twins("NAME of -P", [name for name, _ in pairs])
    return dict(pairs)


def _parameter(text: str) -> tuple[str, Any]:
    from edgemerge.errors import RecipeError
    from edgemerge.formats.yaml_file import read_value

    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"-P {text!r} must be NAME=VALUE, e.g. -P density=0.5")
    try:
        return name.strip(), read_value(value)
    except RecipeError:
        raise typer.BadParameter(f"-P {text!r}: the value is no number, word or list") from None
