"""The named shapes are the published models: their parameter counts are known."""

from math import prod

import pytest
import torch

from fiddler.errors import ConfigError
from fiddler.models.manifest import all_parts
from fiddler.models.shapes import SHAPES, load_shape

PUBLISHED_BILLIONS = {
    "mixtral-8x7b": 46.7,
    "olmoe-1b-7b": 6.92,
    "qwen2-57b-a14b": 57.4,
    "qwen3-30b-a3b": 30.5,
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_as_many_as_published(name: str) -> None:
    count = sum(prod(part.shape) for part in all_parts(load_shape(name)))
    assert count / 1e9 == pytest.approx(PUBLISHED_BILLIONS[name], rel=3e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_the_oracle_has_as_many_parameters(name: str) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(**SHAPES[name])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(prod(part.shape) for part in all_parts(load_shape(name)))


def test_an_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="mixtral-8x7b"):
        load_shape("mixtral-8x7")
