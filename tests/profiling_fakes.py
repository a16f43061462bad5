"""A model for profiling tests whose routing is a known function of the token."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from fiddler.models.config import ModelConfig, WeightNames
from fiddler.models.dtypes import Dtypes
from fiddler.outputs import CompletionOutput, RequestOutput
from fiddler.sampling_params import SamplingParams
from offload.placement import Placement

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
DENSE_LAYER = 1


def experts_of(token: int, layer: int) -> tuple[int, int]:
    """The two experts that ``layer`` routes ``token`` to."""
    first = (token * (layer + 1)) % NUM_EXPERTS
    return first, (first + 3) % NUM_EXPERTS


class FakeLLM:
    """Counts what it is asked; tokens are the bytes of the text."""

    model_name = "org/fake"
    revision = "r1"

    def __init__(self, *, context: int = 100, num_resident: int = 4) -> None:
        self.model_config = ModelConfig(
            model_type="fake",
            vocab_size=256,
            hidden_size=8,
            num_layers=NUM_LAYERS,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            num_experts=NUM_EXPERTS,
            top_k=TOP_K,
            expert_size=8,
            names=WeightNames(),
            dense_layers=frozenset({DENSE_LAYER}),
        )
        resident = Placement.of([range(num_resident), (), ()])
        self.plan: Any = SimpleNamespace(context_tokens=context, placement=resident)
        self.dtypes = Dtypes(compute="bfloat16", expert="bfloat16", kv="bfloat16")
        self.tokenizer: Any = SimpleNamespace(encode=lambda text: list(text.encode()))
        self.windows: list[list[int]] = []
        self.is_closed = False

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> list[int]:
        return list("".join(f"<{m['role']}>{m['content']}" for m in messages).encode())

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
        assert params.max_tokens == 1 and params.routed_experts
        self.windows += prompts
        return [self._output(ids) for ids in prompts]

    def close(self) -> None:
        self.is_closed = True

    def _output(self, ids: list[int]) -> RequestOutput:
        routes_TLK = np.full((len(ids), NUM_LAYERS, TOP_K), -1, dtype=np.int16)
        for t, token in enumerate(ids):
            for layer in set(range(NUM_LAYERS)) - {DENSE_LAYER}:
                routes_TLK[t, layer] = experts_of(token, layer)
        done = CompletionOutput(0, "", [0], "length", routed_experts=routes_TLK)
        return RequestOutput(None, ids, [done])
