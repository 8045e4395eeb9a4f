"""Benchmarks of growkernels against eager PyTorch, `torch.compile` and the papers' authors' way.

Run everything with `make bench`, one family with `growkernels bench FAMILY`. A family is one file
`benchmarks/*/bench_FAMILY.py` that declares FAMILY, CASES, TABLE and one function
`bench_*(case, compare)`, which runs once for each of CASES. With `--device cuda` the cases are
those of GPU_CASES, in the order in which they matter: time may run out.
"""
