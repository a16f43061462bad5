"""Resident experts for many tokens: grouped matrix products over pairs sorted by slot.

Launches: two group the pairs (``expert_grouping``), one computes gate, up and activation, one the
down projection, one adds each token's choices up in their order. No host sync, no atomics.

Experts whose weights lie in several places, or come one after the other, share one grouping: their
slots are numbered through, :func:`grouped_products` runs for one range of them at a time, and the
choices are added up once, after the last range. So sums do not depend on how slots were divided.
Shapes: T tokens, K choices of a token, P = T * K pairs, E experts, S slots, H hidden, I width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gpu_kernels.expert_config import ExpertConfig, prefill_config
from gpu_kernels.expert_grouping import Grouping, group_pairs
from gpu_kernels.expert_reference import experts_reference
from gpu_kernels.expert_weights import ExpertLayer, check_routing, matrix_views
from gpu_kernels.grouped_tile import grouped_kernel
from gpu_kernels.sum_choices import sum_choices_of_tokens
from gpu_kernels.tile_spec import Matrix, TileConfig, tile_spec
from gpu_kernels.whole_numbers import next_power_of_2

ALIGNED = 16  # bytes: what Triton asks of an address to load several numbers at once


@dataclass(frozen=True, slots=True)
class GroupedWorkspace:
    """Scratch between the launches, in x's dtype; one per stream.

    Rows of ``act_PI`` are pairs in the grouping's order, those of ``part_PH`` pairs in their own.
    """

    act_PI: Tensor
    part_PH: Tensor

    @classmethod
    def make(
        cls, layer: ExpertLayer, num_pairs: int, dtype: torch.dtype = torch.bfloat16
    ) -> GroupedWorkspace:
        """For up to ``num_pairs`` pairs of layers of this one's sizes, x of ``dtype``."""
        device = layer.device
        return cls(
            torch.empty((num_pairs, layer.width), dtype=dtype, device=device),
            torch.empty((num_pairs, layer.hidden), dtype=dtype, device=device),
        )


def grouped_experts(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    slot_E: Tensor,
    layer: ExpertLayer,
    *,
    out: Tensor | None = None,
    workspace: GroupedWorkspace | None = None,
    config: ExpertConfig | None = None,
    num_slots: int | None = None,
) -> Tensor:
    """Return the sum over a token's resident experts of weight * expert(x), float32 ``[T, H]``.

    Arguments as for ``expert_decode``, for any number of tokens. An expert's output is rounded to
    x's dtype before the sum. ``num_slots``, at least the layer's: layers that name the same number
    share their compiled kernels (None: the layer's own).
    """
    check_routing(layer, x_TH, ids_TK, weights_TK, slot_E)
    num_pairs = ids_TK.numel()
    if out is None:
        out = torch.empty(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    assert out.shape == x_TH.shape and out.dtype == torch.float32 and out.stride(1) == 1
    if num_pairs == 0:
        return out
    if workspace is None:
        workspace = GroupedWorkspace.make(layer, num_pairs, x_TH.dtype)
    if config is None:
        config = prefill_config(layer, num_pairs, x_TH.dtype)
    groups = group_pairs(ids_TK, slot_E, num_slots or layer.num_slots)
    grouped_products(x_TH, ids_TK, groups, layer, workspace, config=config)
    sum_choices_of_tokens(workspace.part_PH, ids_TK, weights_TK, slot_E, out)
    return out


def grouped_products(
    x_TH: Tensor,
    ids_TK: Tensor,
    groups: Grouping,
    layer: ExpertLayer,
    workspace: GroupedWorkspace,
    *,
    config: ExpertConfig,
    first_slot: int = 0,
    num_slots: int | None = None,
    max_pairs: int | None = None,
) -> None:
    """Write rows of ``workspace.part_PH``: those of the pairs that belong to a range of slots.

    Slot ``first_slot + s`` of ``groups`` is slot s of ``layer``, for ``num_slots`` of them (None:
    all of the layer's). ``max_pairs`` is a bound on the pairs that they have (None: all pairs).
    Two calls for ranges that do not overlap may come in any order.
    """
    act, part = workspace.act_PI, workspace.part_PH
    num_pairs = ids_TK.numel()
    for scratch, cols in ((act, layer.width), (part, layer.hidden)):
        assert scratch.shape[0] >= num_pairs and scratch.shape[1] == cols
        assert scratch.dtype == x_TH.dtype and scratch.is_contiguous()
        assert scratch.device == x_TH.device
    count = layer.num_slots if num_slots is None else num_slots
    most = num_pairs if max_pairs is None else max_pairs
    assert 0 < count <= layer.num_slots
    assert 0 <= first_slot <= groups.first_S1.shape[0] - 1 - count
    gate_up, down = _products(layer, config)
    _launch(gate_up, x_TH, ids_TK, groups, act, first_slot, count, most)
    _launch(down, act, ids_TK, groups, part, first_slot, count, most)


def grouped_experts_reference(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, slot_E: Tensor, layer: ExpertLayer
) -> Tensor:
    """The same in plain torch, computed and returned in float32."""
    return experts_reference(x_TH, ids_TK, weights_TK, slot_E, layer)


@dataclass(frozen=True, slots=True)
class _Product:
    """One product of a layer's experts: what is the same for all pairs.

    Working it out takes Python longer than a launch, and a prompt has some 20 launches a layer.
    ``compiled`` has the kernel for each kind of arguments: to find it Triton looks at each of them
    and at all fields of SPEC and FEW, which takes longer than the launch as well.
    """

    weights: Tensor
    bias: Tensor | None
    stride_slot: int
    columns: int  # of a tile, of which a slot's last one may take ``few`` more
    few: int
    num_tiles: int  # of rows
    constants: dict[str, Any]  # of the kernel, as compiled
    launch: dict[str, Any]
    compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: ExpertLayer, matrix: Matrix, config: TileConfig) -> _Product:
        w13, w2 = matrix_views(layer.weights)
        weights, bias = (w13, layer.b13_SF) if matrix == "w13" else (w2, layer.b2_SH)
        spec = tile_spec(layer, matrix, config)
        few, num_tiles = max(config.columns // 4, 8), spec.num_tiles(spec.rows)
        constants = {
            "NUM_TILES": num_tiles,
            "NEAR": config.near,
            "SPEC": spec,
            # with 128 pairs each on average, half of the experts have a few more
            "FEW": replace(spec, columns=few),
        }
        fixed = weights, bias, weights.stride(0), config.columns, few, num_tiles
        return cls(*fixed, constants, config.launch)


def _products(layer: ExpertLayer, config: ExpertConfig) -> tuple[_Product, _Product]:
    """Those of w13 and w2, which stay with the layer: they hold its weights."""
    found: tuple[_Product, _Product] | None = layer.prepared.get(config)
    if found is None:
        found = _Product.of(layer, "w13", config.gate_up), _Product.of(layer, "w2", config.down)
        layer.prepared[config] = found
    return found


def _launch(
    product: _Product,
    x: Tensor,
    ids_TK: Tensor,
    groups: Grouping,
    out: Tensor,
    first_slot: int,
    num_slots: int,
    max_pairs: int,
) -> None:
    """One product for all pairs: rows of x are tokens for w13 and, for w2, pairs as grouped."""
    num_groups = most_groups(max_pairs, num_slots, product.columns, product.few)
    grid = num_groups * product.num_tiles, 1, 1
    bins, top_k, stride_x = max(16, next_power_of_2(num_slots)), ids_TK.shape[1], x.stride(0)
    arrays = x, groups.pair_P, groups.first_S1, product.weights, product.bias, out
    numbers = stride_x, product.stride_slot, first_slot, num_slots, num_groups
    changing = x, groups.pair_P, groups.first_S1, out
    # Triton compiles anew for other types, alignments and strides, and not for the last numbers;
    # its own settings, and the device, are those of the first launch
    kind = (bins, top_k, stride_x, x.dtype, *[array.data_ptr() % ALIGNED for array in changing])
    compiled = product.compiled.get(kind)
    if compiled is None:
        constants = {"BINS": bins, "TOP_K": top_k, **product.constants}
        product.compiled[kind] = grouped_kernel[grid](
            *arrays, *numbers, **constants, **product.launch
        )
    else:
        compiled[grid](*arrays, *numbers, bins, top_k, *product.constants.values())


def most_groups(num_pairs: int, num_slots: int, columns: int, few: int) -> int:
    """Tiles of columns at most, of which a slot's last takes ``few`` more: one slot has nearly all.

    The others have a pair each; a second tile needs more than ``columns + few`` pairs.
    """
    return min(num_slots, num_pairs) + max(0, num_pairs - num_slots - few) // columns
