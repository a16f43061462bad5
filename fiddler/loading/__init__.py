"""From settings to a running engine; :mod:`fiddler.loading.load` is the way there."""

from fiddler.loading.load import LoadedModel, load_model
from fiddler.loading.model_files import ModelFiles, Progress, find_model
from fiddler.loading.opened import open_weights

__all__ = ["LoadedModel", "ModelFiles", "Progress", "find_model", "load_model", "open_weights"]
