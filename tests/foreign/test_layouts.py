"""Single matrices of each layout, bit by bit; what fp8 loses on its way to int8."""

from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels.packed_layout import dequantise
from fiddler.models.foreign.fp8 import E4M3, Fp8Blocks
from fiddler.models.foreign.int_words import Awq, Gptq, PackQuantized
from fiddler.models.foreign.layout import Layout, Matrix, StoredPart
from fiddler.models.foreign.mxfp4 import unpack
from tests.foreign import writers


class Tensors:
    """A reader of tensors in memory."""

    def __init__(self, tensors: writers.Tensors) -> None:
        self._tensors = {f"x.{name}": tensor for name, tensor in tensors.items()}

    def has(self, part: StoredPart) -> bool:
        return part.name in self._tensors

    def bits(self, part: StoredPart) -> Any:
        tensor = self._tensors[part.name]
        assert tuple(tensor.shape) == part.shape
        words = {1: np.uint8, 4: np.uint32}[tensor.itemsize]
        return tensor.view(torch.uint8 if tensor.itemsize == 1 else torch.int32).numpy().view(words)

    def floats(self, part: StoredPart) -> Any:
        assert tuple(self._tensors[part.name].shape) == part.shape
        return self._tensors[part.name].float().numpy()


def weights(num_rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, cols)).astype(np.float32)


INTEGERS: list[tuple[Layout, Any, dict[str, Any]]] = [
    (Gptq(4, 32, False), writers.gptq, {"group": 32}),
    (Gptq(4, 64, True), writers.gptq, {"group": 64, "sym": False}),
    (Gptq(4, 64, True, zero_offset=0), writers.gptq, {"group": 64, "sym": False, "version": 2}),
    (Gptq(8, 64, True), writers.gptq, {"group": 64, "bits": 8, "sym": False}),
    (Gptq(4, 256, False), writers.gptq, {"group": 256}),
    (Awq(4, 64, True), writers.awq, {"group": 64}),
    (Awq(4, 0, True), writers.awq, {"group": 256}),
    (PackQuantized(4, 64, True), writers.pack_quantized, {"group": 64, "sym": False}),
    (PackQuantized(8, 32, True), writers.pack_quantized, {"group": 32, "sym": False, "bits": 8}),
    (PackQuantized(4, 0, False), writers.pack_quantized, {"group": 0}),
]


@pytest.mark.parametrize(("layout", "writer", "options"), INTEGERS)
def test_integers_are_read_exactly(layout: Layout, writer: Any, options: dict[str, Any]) -> None:
    """In codes of a kind and as numbers, some rows or all; a group may span several of ours."""
    w_NK = weights(40, 256)
    tensors, wanted = writer(w_NK, **options)
    reader, matrix = Tensors(tensors), Matrix("x", 40, 256)
    kind = layout.kind("bfloat16" if writer is writers.pack_quantized else "float16")
    for rows in (slice(0, 40), slice(16, 32), slice(32, 40)):
        found = layout.codes(reader, matrix, rows, kind)
        assert found.scales_NG.shape == (rows.stop - rows.start, 256 // kind.group)
        assert (dequantise(kind, *found) == wanted[rows]).all()
        assert (layout.numbers(reader, matrix, rows) == wanted[rows]).all()


def test_a_word_of_awq_by_hand() -> None:
    """AutoAWQ's order 0, 2, 4, 6, 1, 3, 5, 7: the second nibble is the third row's."""
    word = np.array([[0x76543210 - (1 << 32) * (0x76543210 >> 31)]], np.int32).repeat(32, 0)
    tensors = {
        "qweight": torch.from_numpy(word),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8).half(),
    }
    found = Awq(4, 32, True).numbers(Tensors(tensors), Matrix("x", 8, 32), slice(0, 8))
    assert found[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_zero_points_of_gptq_are_one_less_modulo_16() -> None:
    tensors = {
        "qweight": torch.zeros(4, 8, dtype=torch.int32),
        "qzeros": torch.from_numpy(np.array([[0x7654321F]], np.uint32).view(np.int32)),
        "scales": torch.ones(1, 8).half(),
    }
    found = Gptq(4, 32, True).numbers(Tensors(tensors), Matrix("x", 8, 32), slice(0, 8))
    assert (-found[:, 0]).tolist() == [0, 2, 3, 4, 5, 6, 7, 8]


def test_e4m3_is_torchs() -> None:
    wanted = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3, wanted, equal_nan=True)


@pytest.mark.parametrize("size", [1e-6, 0.02, 30.0])
def test_int8_keeps_what_fp8_left(size: float) -> None:
    """Steps are coarser than 16 bits of scale where weights are all tiny, and that is all."""
    w_NK = weights(300, 200) * np.float32(size)
    w_NK[7, 128:] = 0
    tensors, wanted = writers.fp8(w_NK)
    layout, matrix = Fp8Blocks((128, 128)), Matrix("x", 300, 200)
    kind = layout.kind("float32")
    found = layout.codes(Tensors(tensors), matrix, slice(0, 300), kind)
    numbers = dequantise(kind, *found)
    error = np.linalg.norm(numbers - wanted) / np.linalg.norm(wanted)
    already = np.linalg.norm(wanted - w_NK) / np.linalg.norm(w_NK)
    print(f"weights of {size}: fp8 {already:.4f}, int8 of it {error:.4f}")
    assert (numbers[7, 128:] == 0).all()
    assert error < (0.006 if size > 1e-5 else 0.7) and already < 0.03
    assert (layout.numbers(Tensors(tensors), matrix, slice(0, 300)) == wanted).all()


def test_large_numbers_of_a_group_are_exact() -> None:
    """Those above an eighth of the group's largest power of two: four of the fifteen powers."""
    codes = torch.tensor([0x7E, 0x70, 0x6B, 0x60, 0xF9, 0xE4], dtype=torch.uint8).repeat(128)[:128]
    tensors = {
        "weight": codes.view(torch.float8_e4m3fn)[None],
        "weight_scale_inv": torch.full((1, 1), 2.0**-9),
    }
    layout, matrix = Fp8Blocks((128, 128)), Matrix("x", 1, 128)
    found = layout.codes(Tensors(tensors), matrix, slice(0, 1), layout.kind("float32"))
    wanted = codes.view(torch.float8_e4m3fn).float().numpy() * 2.0**-9
    assert (dequantise(layout.kind("float32"), *found)[0] == wanted).all()


def test_all_codes_and_exponents_of_mxfp4() -> None:
    nibbles = np.arange(16, dtype=np.uint8)
    bytes_NGX = np.broadcast_to(nibbles | nibbles[::-1] << 4, (255, 1, 16))
    found = unpack(bytes_NGX, np.arange(255, dtype=np.uint8)[:, None])
    values = [*writers.E2M1, *(-x for x in writers.E2M1)]
    codes = [code for low in range(16) for code in (low, 15 - low)]
    for exponent in (0, 1, 100, 127, 130, 254):
        numbers = (found.codes_NK[exponent].astype(float) - 128) * float(
            found.scales_NG[exponent, 0]
        )
        assert numbers.tolist() == [values[code] * 2.0 ** (exponent - 127) for code in codes]
