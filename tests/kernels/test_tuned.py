"""The table of launch configurations: complete, and read by its own rules."""

import pytest

from gpu_kernels import tuned
from gpu_kernels.device import FAMILIES
from gpu_kernels.tuned import OLDER, TABLE, choose


def test_every_kernel_has_a_configuration_for_any_gpu_and_size() -> None:
    for kernel, by_family in TABLE.items():
        assert set(by_family) <= set(FAMILIES.values()), kernel
        limits, _ = by_family["sm80"][-1]
        assert limits == {}, kernel


PRETEND = {
    "sm80": [({"rows": 4}, {"num_warps": 1}), ({}, {"num_warps": 2})],
    "sm90": [({"rows": 8, "width": 64}, {"num_warps": 4})],
}


@pytest.mark.parametrize(
    ("family", "rows", "width", "expected"),
    [
        ("sm80", 4, 1, 1),
        ("sm80", 5, 1, 2),
        ("sm89", 4, 1, 1),
        ("sm90", 8, 64, 4),
        ("sm90", 8, 65, 2),
        ("sm90", 4, 65, 1),
        ("sm100", 1, 1, 4),
        ("sm120", 1, 1, 1),  # a consumer card: not as the data centre's
    ],
)
def test_the_first_entry_whose_limits_are_kept_counts(
    monkeypatch: pytest.MonkeyPatch, family: str, rows: int, width: int, expected: int
) -> None:
    monkeypatch.setitem(tuned.TABLE, "pretend", PRETEND)
    assert choose("pretend", family, rows=rows, width=width) == {"num_warps": expected}


def test_every_family_goes_back_to_the_oldest() -> None:
    assert set(OLDER) == set(FAMILIES.values())
    for family in OLDER:
        seen = [family]
        while (older := OLDER[seen[-1]]) is not None:
            seen.append(older)
        assert seen[-1] == "sm80" and len(seen) == len(set(seen))
