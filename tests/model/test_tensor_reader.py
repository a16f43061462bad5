"""Reading by position: every type to every type, pieces of any size, damage in each of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fiddler.errors import CheckpointError
from fiddler.models import tensor_reader
from fiddler.models.tensor_reader import StoredFile, read_bytes, read_numbers

TYPES = [torch.float32, torch.bfloat16, torch.float16]
BEGIN = 13  # not aligned to anything


def stored(path: Path, numbers: torch.Tensor) -> StoredFile:
    path.write_bytes(b"\0" * BEGIN + numbers.view(torch.uint8).numpy().tobytes() + b"\xff" * 8)
    return StoredFile(path)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("piece", [8, 64, 1 << 20])
@pytest.mark.parametrize("to", TYPES)
@pytest.mark.parametrize("kind", TYPES)
def test_numbers_arrive(
    kind: torch.dtype,
    to: torch.dtype,
    piece: int,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensor_reader, "PIECE", piece)
    monkeypatch.setattr(tensor_reader, "PIECE_ELSEWHERE", piece)
    numbers = torch.randn(7, 11).to(kind)
    file = stored(tmp_path / "file", numbers.flatten())
    out = torch.full((9, 11), 5.0, dtype=to, device=device)
    assert read_numbers(file, BEGIN, out[1:8], kind)
    assert torch.equal(out[1:8].cpu(), numbers.to(to))
    assert (out[0] == 5).all() and (out[8] == 5).all()
    file.close()


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("to", TYPES)
@pytest.mark.parametrize("kind", TYPES)
def test_whatever_is_not_finite_is_found_wherever_it_is(
    kind: torch.dtype, to: torch.dtype, bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_reader, "PIECE", 16)
    for signs in (1.0, -1.0):  # maxima of numbers that are all of one sign
        for place in (0, 7, 8, 20):
            numbers = (signs * torch.rand(21)).to(kind)
            numbers[place] = bad
            file = stored(tmp_path / "file", numbers)
            assert not read_numbers(file, BEGIN, torch.empty(21, dtype=to), kind)
            file.close()


@pytest.mark.parametrize("kind", TYPES)
def test_the_largest_and_smallest_numbers_are_finite(kind: torch.dtype, tmp_path: Path) -> None:
    limits = torch.finfo(kind)
    numbers = torch.tensor([limits.max, limits.min, limits.tiny, -limits.tiny, 0.0, -0.0]).to(kind)
    file = stored(tmp_path / "file", numbers)
    out = torch.empty(6, dtype=kind)
    assert read_numbers(file, BEGIN, out, kind) and torch.equal(out, numbers)
    if kind == torch.float32:  # too large for the others
        assert not read_numbers(file, BEGIN, torch.empty(6, dtype=torch.bfloat16), kind)
    file.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bytes_arrive(device: str, tmp_path: Path) -> None:
    wanted = torch.randint(0, 256, (100,), dtype=torch.uint8)
    file = stored(tmp_path / "file", wanted)
    out = torch.zeros(100, dtype=torch.uint8, device=device)
    on_host = read_bytes(file, BEGIN, out)
    assert torch.equal(out.cpu(), wanted) and np.array_equal(on_host, wanted.numpy())
    file.close()


def test_a_file_that_ends_early_or_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    file = stored(tmp_path / "file", torch.ones(10))
    with (tmp_path / "file").open("r+b") as other:
        other.truncate(BEGIN + 20)
    with pytest.raises(CheckpointError, match="has become shorter"):
        read_numbers(file, BEGIN, torch.empty(10), torch.float32)
    file.close()
    file.close()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_numbers(file, BEGIN, torch.empty(10), torch.float32)
