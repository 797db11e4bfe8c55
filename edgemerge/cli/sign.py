"""`edgemerge keygen` and `edgemerge sign`: a pair of keys, and the signature of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemerge.cli.terminal import progress_bar, speaks_plainly

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["keygen_command", "sign_command", "sign_output"]


@speaks_plainly
def keygen_command(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="NAME.pem and NAME.pub.pem are made.")
    ],
) -> None:
    """Make a pair of Ed25519 keys, to sign models and to check signatures."""
    from edgemerge.provenance.keys import create_keys, key_id, read_public_key

    if name.endswith("/"):
        raise typer.BadParameter(f"{name} is a folder; give the name of a key in it")
    private, public = create_keys(Path(name))
    print(f"{private}  signs; keep it where only you can read it")
    print(f"{public}  checks; give it to whoever gets your models")
    print(f"key {key_id(read_public_key(public))}")


@speaks_plainly
def sign_command(
    model: Annotated[
        Path, typer.Argument(metavar="FILE", help="Model or LoRA adapter; of a split, any part.")
    ],
    key: Annotated[
        Path, typer.Option("--key", metavar="PRIVATE.pem", help="Key to sign with; see keygen.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing signature.")] = False,
) -> None:
    """Sign every byte of a model: FILE.sig is written beside it."""
    from edgemerge.formats.files import real_path
    from edgemerge.output.file import check_output
    from edgemerge.provenance.keys import key_id, read_private_key
    from edgemerge.provenance.signature import signature_path

    check_output(signature_path(model), (real_path(key),), force=True)
    private = read_private_key(key)
    target = sign_output(model, private, force=force, quiet=False)
    print(f"{target}  signed with the key {key_id(private.public_key())}")


def sign_output(model: Path, key: Ed25519PrivateKey, *, force: bool, quiet: bool) -> Path:
    """Sign under a progress bar, which `quiet` leaves out; return the signature's path."""
    from edgemerge.provenance.signature import sign_model

    with progress_bar(f"sign {model.name}", quiet=quiet) as progress:
        return sign_model(model, key, force=force, progress=progress)
