"""Adapter for the detection transformers of Hugging Face's ``transformers``."""

from crosskd.adapters.transformers.detr import TransformersDetr

__all__ = ["TransformersDetr"]
