"""From a model's name to a folder of its files: packaged, local, or pulled from the hub."""

from fiddler.hub.resolve import ModelFolder, ModelMetadata, fetch_metadata, resolve_model

__all__ = ["ModelFolder", "ModelMetadata", "fetch_metadata", "resolve_model"]
