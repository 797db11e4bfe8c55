"""`python -m edgemerge`."""

from edgemerge.cli import main

main()
