"""The model card of a directory: what it was made of, in words and as the recipe. No path, no date."""

from __future__ import annotations

import json
from collections.abc import Mapping

from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.gguf.split import whole_name
from edgemerge.formats.inspection import read_transplant
from edgemerge.recipe.words import describe_recipe, describe_stages
from edgemerge.types import Plan

__all__ = ["write_card"]

FRONT = """---
library_name: transformers
tags:
- merge
- edgemerge
{license}---
"""
TEXT = """
# {title}

edgemerge {version} made this model, and its weights say so. `edgemerge verify` compares them with their
checksums.

## Made of

{models}

## How

{how}

```json
{recipe}
```
"""


def write_card(the_plan: Plan, metadata: Mapping[str, bytes]) -> bytes:
    """Return README.md.

    Parameters
    ----------
    the_plan : Plan
        Of the merge.
    metadata : mapping of GGUF key to typed value
        The plan's, and `edgemerge.merging.record.provenance`.
    """
    recipe = json.loads(str(get_value(metadata, "edgemerge.recipe")))
    stages = describe_stages(str(get_value(metadata, "edgemerge.stages", "")))
    how = describe_recipe(recipe, read_transplant(metadata))
    stated = get_value(metadata, "general.license")
    # A plain word needs no quotes in YAML.
    is_plain = isinstance(stated, str) and stated.replace("-", "").replace(".", "").isalnum()
    front = FRONT.format(license=f"license: {stated}\n" if is_plain else "")
    text = TEXT.format(
        title=get_value(metadata, "general.name"),
        version=get_value(metadata, "edgemerge.version"),
        models="\n".join(f"- {whole_name(path)}" for path in the_plan.models),
        how="\n".join(f"- {line}" for line in (*stages, *how)),
        recipe=json.dumps(recipe, indent=2, sort_keys=True),
    )
    return (front + text).encode()
