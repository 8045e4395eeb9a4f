"""A package, because its files are named after the families as those of `tests/ops` are."""
