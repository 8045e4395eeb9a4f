torch_version: str
cuda_version: str | None
cuda_architectures: tuple[str, ...]
cuda_families: tuple[str, ...]
cuda_note: str
compiler: str
search_space_blocks: int
