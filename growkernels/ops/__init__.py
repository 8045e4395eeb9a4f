"""Floor 1: the ops. Importing this package loads the compiled op library."""

from growkernels.ops.library import load_library

load_library()
