"""What SITE.yml comes to with the files of now: the inputs, the recipe, and a digest of all that decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgemerge.errors import RecipeError
from edgemerge.fleet.ingredients import FileHashes, Ingredient, role_of
from edgemerge.fleet.site_file import Site
from edgemerge.formats.adapters.reference import expand_inputs
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.recipe.words import recipe_document
from edgemerge.site.folder import SiteFolder
from edgemerge.site.record import Part
from edgemerge.types import Recipe

__all__ = ["Declared", "declare"]


@dataclass(frozen=True, slots=True)
class Declared:
    """A site's state, resolved.

    Attributes
    ----------
    site : Site
        The file.
    found : tuple of Ingredient
        Base and experts, the base first; those of a recipe.
    digest : str
        Of all that decides what an update comes to, but for the model that serves.
    beside : Ingredient or None
        The base that the site names beside a recipe, of which it may be no part.
    """

    site: Site
    found: tuple[Ingredient, ...]
    digest: str
    beside: Ingredient | None = None

    @property
    def base(self) -> Ingredient | None:
        """The base, with which the first model is compared; None of a recipe without one."""
        return self.beside or next((one for one in self.found if one.role == "base"), None)

    def settled_in(self, folder: SiteFolder) -> dict[str, Any] | None:
        """Return what the last update came to, if this one would come to the same: None where it would not.

        It would not where the model that serves was lost since.
        """
        settled = folder.settled()
        if settled is None or settled["digest"] != self.digest:
            return None
        if settled["outcome"] != "refused" and folder.current_id() is None:
            return None
        return None if folder.is_lost() and not settled.get("lost") else settled

    def needs_base(self, folder: SiteFolder) -> bool:
        """Tell whether the new model is compared with the base: none serves, nor is a lost one made again."""
        settled = folder.settled() or {}
        made_it = (settled.get("digest"), settled.get("id")) == (self.digest, folder.current_id())
        return folder.serving_id() is None and not (folder.is_lost() and made_it)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the record of the model says that it was made of."""
        return tuple(one.as_part() for one in self.found)

    @property
    def signed_by(self) -> str | None:
        """The keys that published the inputs, None where all of them are paths."""
        keys = dict.fromkeys(one.publisher for one in self.found if one.publisher)
        return " ".join(keys) or None

    def method(self) -> str:
        """Name the method."""
        return self.site.merge.method or self.recipe().title

    def settings(self) -> dict[str, Any]:
        """Return what the site says of the merge, in plain types."""
        merge = self.site.merge
        if merge.recipe is not None:
            return {"recipe": merge.recipe.name}
        said = {
            **merge.parameters,
            "type": merge.out_type,
            "seed": merge.seed or None,
            "align": merge.align,
            "imatrix": None if merge.imatrix is None else merge.imatrix.name,
            "weights": {one.name: one.weight for one in self.found if one.weight is not None}
            or None,
        }
        return {key: value for key, value in said.items() if value is not None}

    def with_files(self, found: Sequence[Ingredient]) -> Declared:
        """Return the same with inputs that were fetched."""
        return replace(self, found=tuple(found))

    def recipe(self) -> Recipe:
        """Build the recipe of the merge; all inputs must be here.

        Raises
        ------
        RecipeError
            It asks for what is not possible.
        """
        merge = self.site.merge
        if merge.recipe is not None:
            return load_recipe(merge.recipe, strict=True)
        base = self.base
        assert base is not None
        try:
            return make_recipe(
                merge.method,
                [(str(one.path), one.weight) for one in self.found if one is not base],
                base=str(base.path),
                parameters=merge.parameters,
                out_type=merge.out_type,
                seed=merge.seed,
                align=merge.align,
                imatrix=None if merge.imatrix is None else str(merge.imatrix),
            )
        except RecipeError as error:
            raise RecipeError(str(error), path=self.site.path, field=error.field) from None


def declare(site: Site, found: Sequence[Ingredient], hashes: FileHashes) -> Declared:
    """Resolve a site.

    Parameters
    ----------
    site : Site
        The file.
    found : sequence of Ingredient
        From `edgemerge.fleet.ingredients.find_all`; none where the site names a recipe.
    hashes : FileHashes
        Of files of this machine.

    Raises
    ------
    EdgemergeError
        A file cannot be read, or the recipe asks for what is not possible.
    """
    from importlib.metadata import version

    merge = site.merge
    document: Mapping[str, Any] = {}
    beside: Ingredient | None = None
    if merge.recipe is not None:
        recipe = load_recipe(merge.recipe, strict=True)
        base = _base_of(recipe)
        bases = [] if base is None else expand_inputs([base])[:1]  # it may have adapters
        inputs = expand_inputs(recipe.inputs())
        found = [_of_path(path, hashes, is_base=path in bases) for path in inputs]
        document = recipe_document(recipe)
        if site.base is not None and site.base.path is not None:
            beside = _of_path(site.base.path, hashes, is_base=True)
    decides = {
        "edgemerge": version("edgemerge"),
        "inputs": [(asdict(one.as_part()), one.weight) for one in found],
        "merge": {**asdict(merge), "memory": None, "imatrix": None, "recipe": None},
        "imatrix": None if merge.imatrix is None else hashes.of(merge.imatrix),
        "recipe": document,
        "beside": None if beside is None else beside.sha256,
        "questions": {name: hashes.of(path) for name, path in site.questions.items()},
        "texts": {name: hashes.of(path) for name, path in site.texts.items()},
        "rule": asdict(site.rule),
    }
    text = json.dumps(decides, sort_keys=True, default=str)
    return Declared(site, tuple(found), hashlib.sha256(text.encode()).hexdigest(), beside)


def _base_of(recipe: Recipe) -> Path | None:
    """Return the base of a recipe; where that is the result of a stage, the base of the stage."""
    if recipe.mixture is not None:
        return recipe.mixture.base
    stages = {Path(str(stage.name)): stage for stage in recipe.stages}
    base = recipe.base
    while base in stages:
        base = stages[base].base
    return base


def _of_path(path: Path, hashes: FileHashes, *, is_base: bool) -> Ingredient:
    n_bytes = path.stat().st_size if path.is_file() else 0
    role = "base" if is_base else role_of(path)
    return Ingredient(path.name, "", path, hashes.of(path), n_bytes, role)
