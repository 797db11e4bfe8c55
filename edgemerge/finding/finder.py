"""Where a model is: a path, a folder of models, the hub's cache, the hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from edgemerge.errors import RecipeError, RuntimeFailure
from edgemerge.finding import cache
from edgemerge.finding.files import choose_files, list_choices, list_names
from edgemerge.finding.names import HubName, read_hub_name
from edgemerge.remote.stand_ins import is_address
from edgemerge.sizes import format_size
from edgemerge.suggestions import suggest_path
from edgemerge.types import Progress

__all__ = ["Finder"]

EXTRA = "pip install 'edgemerge[hub]'"


def _show_nothing(_label: str) -> AbstractContextManager[Progress]:
    return nullcontext(lambda _done, _total: None)


def _say_nothing(_sentence: str) -> None:
    pass


@dataclass(frozen=True)
class Finder:
    """Finds models by path or by their name on the hub; fetches nothing unless it may.

    Attributes
    ----------
    folder : Path, optional
        Where models lie as `ORG/NAME`, as `NAME`, or as the recipe's own paths.
    download : bool
        Whether a model of the hub may be fetched without a question.
    ask : callable, optional
        Else asks its user, in one sentence, whether a model may be fetched.
    show_progress : callable
        Called with what is fetched; gives a context whose value is told bytes done and bytes in all.
    streams : bool
        Whether models at addresses are read from where they are; else such an address is refused.
    spill, keep : Path, optional
        As of `edgemerge.finding.streaming.Streamer`.
    say : callable
        Called with a sentence where what is found may not be what was meant.
    """

    folder: Path | None = None
    download: bool = False
    ask: Callable[[str], bool] | None = None
    show_progress: Callable[[str], AbstractContextManager[Progress]] = _show_nothing
    streams: bool = False
    spill: Path | None = None
    keep: Path | None = None
    say: Callable[[str], None] = _say_nothing
    _settled: dict[HubName, Path] = field(default_factory=dict, compare=False, repr=False)

    def find_path(self, name: str, folders: Collection[Path] = (Path(),)) -> Path | None:
        """Look for a file or folder in some folders, then in that of the models; no links are followed.

        Raises
        ------
        RecipeError
            The folder of the models has several GGUF of that name.
        """
        plain = os.path.expanduser(name)  # unlike Path's, it never raises
        for folder in folders:
            if os.path.exists(folder / plain):  # unlike Path.exists, False for what can be no name
                return folder / plain
        if self.folder is None:
            return None
        hub = read_hub_name(name)
        if hub is None:
            return self.folder / plain if os.path.exists(self.folder / plain) else None
        if hub.revision is not None:  # a folder has none
            return None
        places = (self.folder / hub.repo, self.folder / hub.repo.partition("/")[2])
        return next((found for place in places if (found := _choose(hub, place))), None)

    def find_model(self, text: str) -> Path:
        """Find a model that a command names: a path, or `org/name[@revision][:TYPE]`.

        Raises
        ------
        RecipeError, RuntimeFailure
            As of `find_on_hub`.
        """
        return self.find_path(text) or self.find_on_hub(text) or Path(text)

    def find_on_hub(self, text: str, revision: str | None = None) -> Path | None:
        """Find a model by its name in the hub's cache, or fetch it; None where the text is no such name.

        Parameters
        ----------
        text : str
            `org/name[:TYPE][@REVISION]`, or an address as of `edgemerge.finding.streaming`.
        revision : str, optional
            A branch, tag or commit, where the text has none.

        Returns
        -------
        Path or None
            The snapshot's folder in the cache, or the GGUF in it; what stands for a model at an address.

        Raises
        ------
        RecipeError
            It is not on this machine and may not, or cannot, be fetched; the sentence has the remedy.
        FormatError
            A server does not give what is at an address.
        RuntimeFailure
            The process that talks to the hub could not be started, or ended without an answer.
        """
        if is_address(text):
            return self._stream(text, revision)
        name = read_hub_name(text, revision)
        if name is None:
            return None
        if not cache.has_client():
            hint = suggest_path(text) or f"; if it is a model of the hub, {EXTRA} finds it there"
            raise RecipeError(f"no file or folder {text!r}{hint}")
        if found := cache.find_cached(name):
            doubt = cache.find_doubt(name, found)
            if doubt is None:
                return found
            if name not in self._settled:  # a search and slices name a model many times
                self._settled[name] = self._settle(name, found, doubt)
            return self._settled[name]
        self._check_may_fetch(name, text)
        return self._fetch(name)

    def _settle(self, name: HubName, found: Path, doubt: str) -> Path:
        """Fetch what the hub has beyond the cache at the same commit, if it may be asked; else say so."""
        if cache.is_offline() or not cache.is_linked(found):
            self.say(doubt)
            return found
        if not self.download:
            self.say(f"{doubt}; --download asks the hub for more")
            return found
        origin = cache.hub_origin(found)
        assert origin is not None
        pinned = name._replace(revision=origin.commit)
        try:
            return self._fetch(pinned)
        except (RecipeError, RuntimeFailure) as error:
            self.say(f"{doubt}, and {error}")
            return found

    def _stream(self, text: str, revision: str | None) -> Path:
        if not self.streams:
            from edgemerge.remote.any_address import refuse_address  # and all that reads URLs

            raise RecipeError(refuse_address(text))
        from edgemerge.finding.streaming import Streamer  # which loads TLS

        return Streamer(self.spill, self.keep, self.show_progress).find_model(text, revision)

    def _check_may_fetch(self, name: HubName, text: str) -> None:
        """Refuse what may not be fetched, and say which command does it."""
        if cache.is_offline():
            raise RecipeError(
                f"{name} is neither a file or folder nor in the hub's cache ({cache.cache_folder()}), and "
                "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to fetch it; unset it, or copy the "
                "model there"
            )
        if self.download:
            return
        if hint := suggest_path(text):
            raise RecipeError(f"no file or folder {text!r}{hint}")
        if self.ask is None or not self.ask(
            f"{name} is not on this machine. Fetch it from the hub?"
        ):
            raise RecipeError(
                f"no file or folder {text!r}, and the hub's cache has no whole model of that name; give "
                f"--download to fetch it, or run: {_command(name)}"
            )

    def _fetch(self, name: HubName) -> Path:
        """Fetch what is read of a model."""
        from edgemerge.finding.fetch import bytes_there, fetch_files, list_files

        commit, there = list_files(name)
        by_path = {file.path: file for file in there}
        files = [by_path[path] for path in choose_files(name, by_path)]
        total = sum(file.n_bytes for file in files)
        _check_disk(name, total - bytes_there(name, files))
        with self.show_progress(str(name)) as progress:
            folder = fetch_files(name, commit, files, progress)
        return folder / files[0].path if files[-1].path.endswith(".gguf") else folder


def _command(name: HubName) -> str:
    """Return huggingface_hub's command for a model."""
    revision = f" --revision {name.revision}" if name.revision else ""
    only = f" --include '*{name.file_type}*.gguf'" if name.file_type else ""
    return f"hf download {name.repo}{revision}{only}"


def _choose(name: HubName, folder: Path) -> Path | None:
    """Return the folder of a repository's files, or the GGUF in it that the name means."""
    if not folder.is_dir():
        return None
    there = list_names(folder)
    if not list_choices(name, there):
        return None if name.file_type else folder
    first, *others = choose_files(name, there)
    return folder / first if (others or [first])[-1].endswith(".gguf") else folder


def _check_disk(name: HubName, needed: int) -> None:
    folder = cache.cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise RecipeError(
            f"{name} needs {format_size(needed)} of disk, and {format_size(free)} are free in {folder}; "
            "free some, or set HF_HUB_CACHE to a folder on another disk"
        )
