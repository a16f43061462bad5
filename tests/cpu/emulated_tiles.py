"""AMX's tiles in memory: a plugin of pytest that lets a CPU with AVX-512 run the code for them.

One thread at a time, since all share the tiles; and Numba's cache must not be that of other runs.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from cpu_kernels import amx
from cpu_kernels import vector_ir as v

ROW, TILE, ROWS = 64, 1024, 16  # bytes of a row and of a tile, and rows
NAME = "emulated_tiles"

call = v.call


def tile_rows(builder: Any, number: Any) -> list[Any]:
    """Addresses of a tile's rows."""
    room = ir.ArrayType(v.I8, 8 * TILE)
    found = builder.module.globals.get(NAME)
    if found is None:
        found = ir.GlobalVariable(builder.module, room, NAME)
        found.linkage, found.initializer = "internal", ir.Constant(room, None)
    base = builder.ptrtoint(found, v.I64)
    return [v.offset(builder, base, number.constant * TILE + r * ROW) for r in range(ROWS)]


def transfer(builder: Any, number: Any, place: Any, stride: Any, *, loads: bool) -> None:
    first = builder.ptrtoint(place, v.I64)
    for r, row in enumerate(tile_rows(builder, number)):
        there = builder.add(first, builder.mul(stride, v.I64(r)))
        source, to = (there, row) if loads else (row, there)
        v.store(builder, v.load(builder, source, v.I32, ROWS), to)


def multiply(builder: Any, total: Any, a: Any, b: Any) -> None:
    """total[m, n] += a[m, k] b[k, n] for pairs k of bf16, as float32."""
    first = tile_rows(builder, a)[0]
    with cgutils.for_range(builder, v.I64(ROWS), intp=v.I64) as loop:
        row = builder.mul(loop.index, v.I64(ROW))
        place = builder.add(tile_rows(builder, total)[0], row)
        sums = v.load(builder, place, v.F32, ROWS)
        for k, row_b in enumerate(tile_rows(builder, b)):
            at = v.offset(builder, builder.add(first, row), 4 * k)
            pair = v.splat(builder, v.load(builder, at, v.I32, 1), ROWS)
            sums = add_pair(builder, pair, v.load(builder, row_b, v.I32, ROWS), sums)
        v.store(builder, sums, place)


def add_pair(builder: Any, a: Any, b: Any, total: Any) -> Any:
    floats, high = v.wide(v.F32, ROWS), v.constant(v.I32, ROWS, 16)
    for part in (
        lambda pairs: builder.shl(pairs, high),
        lambda pairs: builder.and_(pairs, v.constant(v.I32, ROWS, -65536)),
    ):
        left, right = (builder.bitcast(part(side), floats) for side in (a, b))
        total = v.multiply_add(builder, left, right, total)
    return total


def emulated_call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Of LLVM's intrinsics those for tiles by other means."""
    if name in ("llvm.x86.ldtilecfg", "llvm.x86.tilerelease"):
        return None
    if name == "llvm.x86.tdpbf16ps":
        return multiply(builder, *arguments)
    if name in ("llvm.x86.tileloadd64", "llvm.x86.tilestored64"):
        return transfer(builder, *arguments, loads="load" in name)
    return call(builder, name, result, *arguments)


v.call = emulated_call
amx.may_use_tiles = lambda: True  # type: ignore[assignment]
