"""Export to ONNX: a merged model becomes a folder that optimum's `ORTModelFor…` opens."""

from .exporting import Export, export, load

__all__ = ["Export", "export", "load"]
