"""A stable place of the image folders' reader; it lives with the experiments that use it."""

from growkernels.experiments.images.folders import ImageData, load_images, stored_size

__all__ = ["ImageData", "load_images", "stored_size"]
