"""Checkpoints as other programs write them, packed nibble by nibble after their documents.

Each writer quantises a matrix simply and returns the tensors of the file and the numbers that they
stand for, computed from the codes before these are packed.

N rows (outputs), K columns (inputs), G groups of a row.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Written = tuple[Tensors, np.ndarray]
# routers and what is one row
KEPT = ("lm_head", "embed_tokens", "mlp.gate.", "block_sparse_moe.gate.", "shared_expert_gate")
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def grid(w_NK: np.ndarray, group: int, bits: int, has_zeros: bool) -> tuple[np.ndarray, ...]:
    """Codes [N, K], float16 scales and zero points [N, G]."""
    num_rows, cols = w_NK.shape
    w_NGL = w_NK.reshape(num_rows, cols // group, group)
    top = (1 << bits) - 1
    if has_zeros:
        low_NG, high_NG = np.minimum(w_NGL.min(2), 0), np.maximum(w_NGL.max(2), 0)
        scales_NG = ((high_NG - low_NG) / top).astype(np.float16).astype(np.float32)
        zeros_NG = np.rint(-low_NG / scales_NG)
    else:
        largest_NG = np.abs(w_NGL).max(2)
        scales_NG = (largest_NG / (top // 2)).astype(np.float16).astype(np.float32)
        zeros_NG = np.full(scales_NG.shape, float((top + 1) // 2))
    codes_NGL = np.rint(w_NGL / scales_NG[:, :, None]) + zeros_NG[:, :, None]
    codes_NK = np.clip(codes_NGL, 0, top).reshape(num_rows, cols)
    return codes_NK.astype(np.int64), scales_NG, zeros_NG.astype(np.int64)


def numbers(codes_NK: np.ndarray, scales_NG: np.ndarray, zeros_NG: np.ndarray) -> np.ndarray:
    group = codes_NK.shape[1] // scales_NG.shape[1]
    found = np.empty(codes_NK.shape, np.float32)
    for k in range(codes_NK.shape[1]):
        found[:, k] = (codes_NK[:, k] - zeros_NG[:, k // group]) * scales_NG[:, k // group]
    return found


def words(codes: np.ndarray, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Pack along the last dimension: code ``order[i]`` of each run goes to bits ``i * bits``."""
    per_word = 32 // bits
    order = order or list(range(per_word))
    found = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // per_word)), np.uint32)
    for word in range(found.shape[-1]):
        for i, place in enumerate(order):
            if word * per_word + place < codes.shape[-1]:
                code = codes[..., word * per_word + place].astype(np.uint32)
                found[..., word] |= code << np.uint32(i * bits)
    return torch.from_numpy(found.view(np.int32))


def gptq(
    w_NK: np.ndarray, *, group: int, bits: int = 4, sym: bool = True, version: int = 1
) -> Written:
    codes_NK, scales_NG, zeros_NG = grid(w_NK, group, bits, has_zeros=not sym)
    stored_NG = (zeros_NG - 1) % (1 << bits) if version == 1 else zeros_NG
    tensors = {
        "qweight": words(codes_NK, bits).T.contiguous(),
        "qzeros": words(np.ascontiguousarray(stored_NG.T), bits),
        "scales": torch.from_numpy(scales_NG.T.copy()).half(),
        "g_idx": torch.arange(w_NK.shape[1], dtype=torch.int32) // group,
    }
    return tensors, numbers(codes_NK, scales_NG, zeros_NG)


def awq(w_NK: np.ndarray, *, group: int) -> Written:
    codes_NK, scales_NG, zeros_NG = grid(w_NK, group, 4, has_zeros=True)
    tensors = {
        "qweight": words(np.ascontiguousarray(codes_NK.T), 4, AWQ_ORDER),
        "qzeros": words(np.ascontiguousarray(zeros_NG.T), 4, AWQ_ORDER),
        "scales": torch.from_numpy(scales_NG.T.copy()).half(),
    }
    return tensors, numbers(codes_NK, scales_NG, zeros_NG)


def pack_quantized(
    w_NK: np.ndarray,
    *,
    group: int,
    bits: int = 4,
    sym: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Written:
    """A signed code is stored with half of the range added, and so is a zero point."""
    codes_NK, scales_NG, zeros_NG = grid(w_NK, group or w_NK.shape[1], bits, has_zeros=not sym)
    scales = torch.from_numpy(scales_NG).to(dtype)
    tensors = {
        "weight_packed": words(codes_NK, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(w_NK.shape),
    }
    if not sym:
        along_N = words(np.ascontiguousarray(zeros_NG.T), bits)
        tensors["weight_zero_point"] = along_N.T.contiguous()
    return tensors, numbers(codes_NK, scales.float().numpy(), zeros_NG)


def fp8(
    w_NK: np.ndarray, *, block: tuple[int, int] = (128, 128), name: str = "weight_scale_inv"
) -> Written:
    num_rows, cols = w_NK.shape
    rows, width = block[0], block[1] or cols
    scales = torch.empty(-(-num_rows // rows), -(-cols // width))
    codes = torch.empty(num_rows, cols, dtype=torch.float8_e4m3fn)
    found = np.empty(w_NK.shape, np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * width, (j + 1) * width)
            w = torch.from_numpy(w_NK[part])
            scales[i, j] = w.abs().max() / 448
            codes[part] = (w / scales[i, j]).to(torch.float8_e4m3fn)
            found[part] = (codes[part].float() * scales[i, j]).numpy()
    return {"weight": codes, name: scales}, found


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def mxfp4(w_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes [N, G, 16], exponents [N, G] and numbers."""
    num_rows, cols = w_NK.shape
    w_NGL = w_NK.reshape(num_rows, cols // 32, 32)
    exponents_NG = np.floor(np.log2(np.abs(w_NGL).max(2))).astype(np.int64) - 2
    scaled = w_NGL / np.exp2(exponents_NG)[:, :, None]
    codes = np.abs(np.abs(scaled)[..., None] - np.array(E2M1)).argmin(-1)
    found = np.sign(scaled) * np.array(E2M1)[codes] * np.exp2(exponents_NG)[:, :, None]
    codes = codes + 8 * (scaled < 0)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    bytes_NG = (exponents_NG + 127).astype(np.uint8)
    return packed, bytes_NG, found.reshape(num_rows, cols).astype(np.float32)


def mxfp4_packed(w_NK: np.ndarray) -> Written:
    packed, exponents, found = mxfp4(w_NK)
    tensors = {
        "weight_packed": torch.from_numpy(packed.reshape(len(packed), -1)),
        "weight_scale": torch.from_numpy(exponents),
    }
    return tensors, found


def write(
    source: Path,
    folder: Path,
    writer: Callable[[np.ndarray], Written],
    scheme: dict[str, Any],
    *,
    kept: tuple[str, ...] = KEPT,
) -> tuple[Path, Path]:
    """The model of ``source`` with its matrices written by ``writer``, and with their numbers."""
    stored: Tensors = {}
    plain: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.dim() != 2 or any(part in name for part in kept):
            stored[name] = plain[name] = tensor
            continue
        parts, found = writer(tensor.float().numpy())
        stem = name.removesuffix(".weight")
        stored |= {f"{stem}.{suffix}": part.contiguous() for suffix, part in parts.items()}
        plain[name] = torch.from_numpy(found)
    return _save(source, folder, stored, plain, scheme)


def write_stacked_mxfp4(
    source: Path, folder: Path, names: tuple[str, str, str], num_experts: int
) -> tuple[Path, Path]:
    """As gpt-oss: a layer's experts in one tensor, gate and up rows in turn, the rest plain."""
    stored = load_file(source / "model.safetensors")
    plain = dict(stored)
    gate = f".experts.0.{names[0]}.weight"
    for prefix in [name.removesuffix(gate) for name in stored if name.endswith(gate)]:
        both, down = [], []
        for expert in range(num_experts):
            parts = []
            for which in names:
                name = f"{prefix}.experts.{expert}.{which}.weight"
                packed, exponents, found = mxfp4(stored.pop(name).float().numpy())
                plain[name] = torch.from_numpy(found)
                parts.append((packed, exponents))
            turns = []
            for i in range(2):
                half = np.empty((2 * len(parts[0][i]), *parts[0][i].shape[1:]), np.uint8)
                half[0::2], half[1::2] = parts[0][i], parts[1][i]
                turns.append(half)
            both.append(turns)
            down.append(parts[2])
        for name, pairs in (("gate_up_proj", both), ("down_proj", down)):
            for i, suffix in enumerate(("blocks", "scales")):
                stacked = torch.from_numpy(np.stack([pair[i] for pair in pairs]))
                stored[f"{prefix}.experts.{name}_{suffix}"] = stacked
    return _save(source, folder, stored, plain, {"quant_method": "mxfp4"})


def _save(
    source: Path, folder: Path, stored: Tensors, plain: Tensors, scheme: dict[str, Any]
) -> tuple[Path, Path]:
    folders = folder / "stored", folder / "plain"
    for target, tensors in zip(folders, (stored, plain), strict=True):
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.name != "model.safetensors":
                (target / path.name).write_bytes(path.read_bytes())
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text())
    raw["quantization_config"] = scheme
    (folders[0] / "config.json").write_text(json.dumps(raw))
    return folders
