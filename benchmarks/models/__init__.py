"""Benchmarks of whole training steps, one family a file."""
