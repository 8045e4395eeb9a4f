"""Benchmarks of single ops, one family a file."""
