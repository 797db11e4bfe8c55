"""Pictures and pages that tell people about merges, alignments and measurements."""
