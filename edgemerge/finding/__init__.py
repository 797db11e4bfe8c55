"""From the name of a model to its files: on this machine, in the hub's cache, or fetched into it."""
