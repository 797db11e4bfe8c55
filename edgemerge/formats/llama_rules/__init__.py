"""What llama.cpp asserts of a model: found from the header, before llama.cpp has to.

llama.cpp checks much of a file with GGML_ASSERT and GGML_ABORT, which end the process. Some of these checks
run only when the first odd character is tokenised. A server then dies with all its models. So the same
questions are asked here first. Every rule names the place in llama.cpp 0c1e57098 that it answers for.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgemerge.formats.llama_rules.hyper_parameters import check_hyper_parameters
from edgemerge.formats.llama_rules.tensors import check_tensors
from edgemerge.formats.llama_rules.violation import Violation
from edgemerge.formats.llama_rules.vocabulary import check_vocabulary
from edgemerge.types import TensorSpec

__all__ = ["Violation", "find_violations"]


def find_violations(
    metadata: Mapping[str, bytes], specs: Mapping[str, TensorSpec], architecture: str
) -> list[Violation]:
    """List what llama.cpp would abort at, or fail at without a word of use.

    What it says well itself (a missing key, a tensor of another shape) is left to it.

    Parameters
    ----------
    metadata : mapping of GGUF key to typed value
        Of the whole model.
    specs : mapping of GGUF name to TensorSpec
        All its tensors, with the types that they are stored in.
    architecture : str
        GGUF's general.architecture.
    """
    return [
        *check_vocabulary(metadata),
        *check_hyper_parameters(metadata, specs, architecture),
        *check_tensors(specs),
    ]
