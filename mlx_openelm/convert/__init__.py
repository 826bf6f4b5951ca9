"""From any form of OpenELM weights to one MLX folder."""

from .adapters import AdapterConversion, convert_adapter, open_adapter
from .conversion import Conversion, convert
from .sources import open_source

__all__ = ["AdapterConversion", "Conversion", "convert", "convert_adapter", "open_adapter", "open_source"]
