"""`edgemerge publish`: a registry in a folder, whose every file is vouched for."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.cli import request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.registry import State
from edgemerge.cli.terminal import plain, print_json, progress_bar, speaks_plainly

if TYPE_CHECKING:
    from edgemerge.fleet.registry.folder import RegistryFolder
    from edgemerge.fleet.registry.roots import Keys

__all__ = ["publish_command"]

_DAYS = re.compile(r"([1-9]\d{0,3})d", re.ASCII)
_KEY = re.compile(r"[0-9a-f]{32}", re.ASCII)


@speaks_plainly
def publish_command(
    registry: Annotated[Path, typer.Argument(metavar="REGISTRY", help="Folder of the registry.")],
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="Delta, LoRA adapter or model to publish, in one GGUF file.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What it is called there.")
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(
            "--version", metavar="VERSION", help="Higher than that name ever had, e.g. 3 or 1.2."
        ),
    ] = None,
    key: Annotated[
        list[Path] | None,
        typer.Option(
            "--key", metavar="PRIVATE.pem", help="Publisher's key; see keygen. May be repeated."
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--licence", metavar="TEXT", help="Licence [default: what the file states]."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Check that this is the base of the file."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores", metavar="EVAL.json", help="Figures of the file, from eval --json."
        ),
    ] = None,
    expires: Annotated[
        str,
        typer.Option("--expires", metavar="DAYS", help="How long readers take the index, e.g. 7d."),
    ] = "90d",
    init: Annotated[bool, typer.Option("--init", help="Make the registry.")] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Sign the index anew, before it is past its date.")
    ] = False,
    remove: Annotated[
        str | None,
        typer.Option("--remove", metavar="NAME@VERSION", help="Take a version out of the index."),
    ] = None,
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate", help="Change keys, or renew the root: --key and others are added."
        ),
    ] = False,
    root_key: Annotated[
        list[Path] | None,
        typer.Option(
            "--root-key",
            metavar="PRIVATE.pem",
            help="Key of the root, for --init and --rotate alone; keep it offline. May be repeated.",
        ),
    ] = None,
    new_root_key: Annotated[
        list[Path] | None,
        typer.Option(
            "--new-root-key", metavar="PRIVATE.pem", help="With --rotate: another key of the root."
        ),
    ] = None,
    publisher: Annotated[
        list[Path] | None,
        typer.Option(
            "--publisher",
            metavar="PUBLIC.pem",
            help="With --init or --rotate: a further key that may publish.",
        ),
    ] = None,
    refresher: Annotated[
        list[Path] | None,
        typer.Option(
            "--refresher",
            metavar="PUBLIC.pem",
            help="With --init or --rotate: a key that may do --refresh and nothing else.",
        ),
    ] = None,
    retire: Annotated[
        list[str] | None,
        typer.Option(
            "--retire",
            metavar="PUBLIC.pem | KEY",
            help="With --rotate: a key that may sign no longer, its file or its name.",
        ),
    ] = None,
    threshold: Annotated[
        int | None,
        typer.Option(
            "--threshold",
            min=1,
            max=16,
            metavar="N",
            help="With --init or --rotate: keys that publishing takes [default: 1].",
        ),
    ] = None,
    root_threshold: Annotated[
        int | None,
        typer.Option(
            "--root-threshold",
            min=1,
            max=16,
            metavar="N",
            help="With --init or --rotate: keys of the root that --rotate takes [default: 1].",
        ),
    ] = None,
    root_expires: Annotated[
        str | None,
        typer.Option(
            "--root-expires",
            metavar="DAYS",
            help="With --init or --rotate: how long readers take the root [default: 730d].",
        ),
    ] = None,
    trust: Annotated[
        Path | None,
        typer.Option(
            "--trust",
            metavar="ROOT.json",
            help="Root to check the folder by [default: the first that this machine saw there].",
        ),
    ] = None,
    models_folder: ModelsFolder = None,
    download: Download = False,
    state: State = None,
    json_: request.Json = False,
) -> None:
    """Publish deltas, adapters and models, signed, in a folder that any web server or USB stick carries."""
    from edgemerge.fleet.registry.client import require_tuf

    asks = {
        "--init": init,
        "--refresh": refresh,
        "--rotate": rotate,
        "--remove": remove,
        "FILE": file,
    }
    of_file: dict[str, Any] = {"--name": name, "--version": version, "--licence": licence}
    of_file |= {"--base": base, "--scores": scores, "--models": models_folder}
    of_file |= {"--download": download or None}
    of_roots: dict[str, Any] = {
        "--root-key": root_key,
        "--publisher": publisher,
        "--refresher": refresher,
    }
    of_roots |= {"--threshold": threshold, "--root-threshold": root_threshold}
    of_roots |= {"--root-expires": root_expires}
    given = [word for word, value in asks.items() if value]
    if len(given) != 1:
        raise typer.BadParameter(f"give one of {', '.join(asks)}")
    _check_belongs(of_file, "FILE", given)
    _check_belongs(of_roots, "--init and --rotate", given)
    _check_belongs({"--new-root-key": new_root_key, "--retire": retire}, "--rotate", given)
    if file is not None and (name is None or version is None):
        raise typer.BadParameter("give --name and --version of the file")
    if (init or rotate) and not root_key:
        raise typer.BadParameter("give the --root-key")
    if not key and not init:
        raise typer.BadParameter("give the publisher's --key")
    lasts, root_lasts = _days(expires, "--expires"), _days(root_expires or "730d", "--root-expires")
    require_tuf()
    from edgemerge.fleet.registry.folder import RegistryFolder
    from edgemerge.fleet.registry.keys import read_publishers, read_signers
    from edgemerge.fleet.registry.roots import Keys

    folder = RegistryFolder(registry, read_signers(key or ()), lasts, trust=trust, state=state)
    if init or rotate:
        keys = Keys(
            read_signers(root_key or ()),
            read_signers(new_root_key or ()),
            read_publishers(publisher or ()),
            read_publishers(refresher or ()),
            frozenset(_key_name(text) for text in retire or ()),
            threshold,
            root_threshold,
            root_lasts,
        )
        document = _make_root(folder, keys, init=init)
    elif file is not None:
        assert name is not None
        assert version is not None
        base_path = None
        if base is not None:
            base_path = make_finder(models_folder, download, quiet=json_).find_model(base)
        document = _publish(folder, file, (name, version), licence, base_path, scores, quiet=json_)
    else:
        document = _change(folder, remove)
    document |= {"registry": str(registry), "expires": folder.until.isoformat()}
    if folder.index_until is not None:
        document["index_expires"] = folder.index_until.isoformat()
    if folder.root_until is not None:
        document["root_expires"] = folder.root_until.isoformat()
    if json_:
        print_json(document)
    else:
        _print(document)


def _check_belongs(options: dict[str, Any], to: str, given: list[str]) -> None:
    """Refuse options that would be without effect."""
    for option, value in options.items():
        if value is not None and given[0] not in to:
            raise typer.BadParameter(f"{option} belongs to {to}")


def _make_root(folder: RegistryFolder, keys: Keys, *, init: bool) -> dict[str, Any]:
    from edgemerge.fleet.registry.roots import create, rotate

    path = create(folder, keys) if init else rotate(folder, keys)
    until = folder.now + keys.lasts
    return {
        "did": "init" if init else "rotate",
        "root": str(path),
        "root_expires": until.isoformat(),
    }


def _publish(
    folder: RegistryFolder,
    file: Path,
    called: tuple[str, str],
    licence: str | None,
    base: Path | None,
    scores: Path | None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    from dataclasses import asdict

    from edgemerge.fleet.registry.offers import base_checksum, read_scores
    from edgemerge.fleet.registry.publishing import Asked, publish

    checksum = None if base is None else base_checksum(base)
    figures = {} if scores is None else read_scores(scores)
    asked = Asked(*called, licence, checksum, figures)
    with progress_bar(f"publish {file.name}", quiet=quiet) as progress:
        entry = publish(folder, file, asked, progress)
    return {"did": "publish", "entry": asdict(entry)}


def _change(folder: RegistryFolder, removed: str | None) -> dict[str, Any]:
    from edgemerge.fleet.registry.publishing import refresh, remove

    if removed is None:
        refresh(folder)
        return {"did": "refresh"}
    name, at, version = removed.partition("@")
    if not at or not version:
        raise typer.BadParameter(f"--remove {removed}: give NAME@VERSION")
    remove(folder, name, version)
    return {"did": "remove", "name": name, "version": version}


def _days(text: str, option: str) -> timedelta:
    match = _DAYS.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{option} {text}: give days, as in 90d")
    return timedelta(days=int(match[1]))


def _key_name(text: str) -> str:
    from edgemerge.provenance.keys import key_id, read_public_key

    return text if _KEY.fullmatch(text) else key_id(read_public_key(text))


def _print(document: dict[str, Any]) -> None:
    from edgemerge.sizes import format_size

    registry, until = plain(document["registry"]), document["expires"][:10]
    match document["did"]:
        case "publish":
            entry = document["entry"]
            size = format_size(entry["n_bytes"])
            print(f"{registry}  {entry['name']} {entry['version']}: {entry['kind']}, {size}")
            print(f"  sha256 {entry['sha256']}")
            if entry["base"]:
                print(f"  base {entry['base']}")
            print(f"  licence {plain(entry['licence']) or 'not stated'}")
        case "init" | "rotate":
            print(f"{plain(document['root'])}  lasts until {document['root_expires'][:10]}")
            if document["did"] == "init":
                print("  give it to whoever fetches, by a way that they trust")
        case "remove":
            print(f"{registry}  without {document['name']} {document['version']}")
        case "refresh":
            print(f"{registry}  signed anew")
    print(
        f"  readers take the index until {until}; before that, publish --refresh{_by_whom(document)}"
    )
    if document["root_expires"] < document["expires"]:
        root_until = document["root_expires"][:10]
        print(
            f"note: readers take the root until {root_until} alone; renew it with publish --rotate"
        )


def _by_whom(document: dict[str, Any]) -> str:
    """Say when a refresher's key is not enough: it makes the index last no longer than publishers said."""
    index_until = document.get("index_expires", document["expires"])
    if index_until <= document["expires"]:
        return " with a publisher's key"
    return f", with a publisher's key before {index_until[:10]}"
