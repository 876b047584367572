"""Where ``tokenizers/raster.py`` was; its names are still found here."""

from var_env.tokenizers.raster import RasterTokenizer

__all__ = ["RasterTokenizer"]
