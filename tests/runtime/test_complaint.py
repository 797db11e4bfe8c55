from __future__ import annotations

from edgemerge.runtime.complaint import find_complaint


def test_a_complaint_stands_after_notes_and_before_details() -> None:
    said = "note: it is old\nwarning: edgemerge: no\nedgemerge: m.gguf: is cut off\nllama.cpp\nlog"
    assert find_complaint(said) == ("m.gguf: is cut off", "llama.cpp\nlog")
    assert find_complaint("edgemerge: no\n") == ("no", "")
    assert find_complaint("edgemerge: first\nedgemerge: last") == ("last", "")
    assert find_complaint("Fatal error\nstack") is None
    assert find_complaint("") is None
