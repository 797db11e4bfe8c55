"""Merges on the server's page: plan, merge, compare, promote and roll back, beside the models that answer."""
