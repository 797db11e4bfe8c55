"""A file that appears whole or not at all, and what is needed to go on after a stop."""
