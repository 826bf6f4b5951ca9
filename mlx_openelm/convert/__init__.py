"""From any form of OpenELM weights to one MLX folder."""

from .conversion import Conversion, convert
from .sources import open_source

__all__ = ["Conversion", "convert", "open_source"]
