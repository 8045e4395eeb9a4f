"""Benchmarks of growkernels against eager PyTorch, `torch.compile` and the papers' authors' way.

Run everything with `make bench`, one family with `growkernels bench FAMILY`. A family is one file
`benchmarks/*/bench_FAMILY.py` that declares FAMILY, CASES, TABLE and one `bench_*` function.
"""
