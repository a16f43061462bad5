"""Pages and pictures: whole XML, nothing outside or on top of each other, figures that are true."""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler.benchmark.roofline import roofs_of
from fiddler.config import EngineConfig
from fiddler.models.shapes import load_shape
from fiddler.planning import plan_model
from fiddler.report.entropy import entropy_line
from fiddler.report.heatmap import LEVELS, Heatmap, heatmap_svg, levels
from fiddler.report.memory_map import Memory, Part, memory_map, memory_svg
from fiddler.report.page import Section, Table, page, style
from fiddler.report.pages import bench_page, plan_page, profile_page
from fiddler.report.roofline import Point, Roof, roofline_svg
from fiddler.report.svg import WIDTH, Box, text_box
from offload.hardware import Hardware
from offload.limits import Peaks
from offload.popularity import Popularity
from tests.unit.test_profiling_picture import result

GIB = 1 << 30
SVG = "{http://www.w3.org/2000/svg}"
GPU = Peaks(cpu_read_gbps=126, joint_gbps=155, pcie_gbps=55, gpu_read_gbps=4200, gemm_tflops=650)
NO_GPU = Peaks(cpu_read_gbps=20, joint_gbps=20, pcie_gbps=0, gpu_read_gbps=0, gemm_tflops=0.2)


def parsed(svg: str) -> ET.Element:
    """The picture, which has a title, a description and a size."""
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg" and root.get("role") == "img"
    assert root[0].tag == f"{SVG}title" and root[0].text
    assert root[1].tag == f"{SVG}desc" and root[1].text
    assert root.get("viewBox", "").startswith(f"0 0 {WIDTH} ")
    return root


def words(root: ET.Element) -> list[tuple[Box, str]]:
    return [
        (
            text_box(
                float(e.get("x", "")),
                float(e.get("y", "")),
                e.text or "",
                e.get("text-anchor", "start"),
            ),
            e.text or "",
        )
        for e in root.iter(f"{SVG}text")
    ]


def check_layout(root: ET.Element) -> None:
    """No text outside the picture, none on top of another; no rectangle outside."""
    height = float(root.get("viewBox", "").split()[3])
    placed = words(root)
    for box, said in placed:
        assert box.left >= -1 and box.right <= WIDTH + 1, said
        assert box.top >= -1 and box.bottom <= height + 1, said
    for n, (box, said) in enumerate(placed):
        for other, also in placed[:n]:
            assert not box.overlaps(other), (said, also)
    for rect in root.iter(f"{SVG}rect"):
        x, y, wide, high = (float(rect.get(k, "0")) for k in ("x", "y", "width", "height"))
        assert wide > 0 and x >= 0 and y >= 0
        assert x + wide <= WIDTH + 0.1 and y + high <= height + 0.1


# --- heatmap ---


def a_heatmap(rows: int, experts: int, *, has_gpu: bool = True, seed: int = 0) -> Heatmap:
    rng = np.random.default_rng(seed)
    shares_ME = rng.dirichlet(np.full(experts, 0.5), rows)
    residents = rng.integers(1, experts + 1, rows) if has_gpu else np.zeros(rows, int)
    return Heatmap(
        layers=tuple(range(1, rows + 1)),
        shares_ME=shares_ME,
        residents_M=tuple(residents.tolist()),
        hits_M=tuple(rng.random(rows).tolist()),
        bits_M=tuple((-(shares_ME * np.log2(shares_ME + 1e-9)).sum(axis=1)).clip(0).tolist()),
    )


@pytest.mark.parametrize("has_gpu", [True, False])
@pytest.mark.parametrize(("rows", "experts"), [(1, 2), (4, 16), (48, 128), (94, 512)])
def test_heatmaps_are_laid_out(rows: int, experts: int, has_gpu: bool) -> None:
    svg = heatmap_svg(a_heatmap(rows, experts, has_gpu=has_gpu), "Use")
    root = parsed(svg)
    check_layout(root)
    assert len(svg) < 40 * rows * experts + 20_000
    assert ("hits on the GPU" in svg) is has_gpu is ("edge" in svg)


def test_bars_of_entropy_are_parts_of_even_use() -> None:
    shown = replace(a_heatmap(2, 16, has_gpu=False), bits_M=(1.0, 4.0))
    root = parsed(heatmap_svg(shown, "Use"))
    groups = [g for g in root.iter(f"{SVG}g") if len(g) == 2 and g[0].tag == f"{SVG}title"]
    assert [g[0].text for g in groups] == [
        "layer 1: entropy 1.00 bits of 4.00",
        "layer 2: entropy 4.00 bits of 4.00",
    ]
    quarter, whole = (float(g[1].get("width", "")) for g in groups)
    assert quarter == pytest.approx(whole / 4)
    assert {"entropy, bits", "1.00", "4.00"} <= {said for _, said in words(root)}


def test_entropies_are_a_sentence() -> None:
    """Of layers that have experts: 8 used alike are 3 bits, of one alone hardly any."""
    counts = np.array([[1000] * 8, [0] * 8, [10**6, *[0] * 7], [2000] * 4 + [0] * 4])
    assert entropy_line(Popularity(counts), (0, 2, 3)) == (
        "Entropy of layers: 0.00 (layer 2) to 3.00 (layer 0) of 3.00 bits, median 2.01"
    )


def test_every_cell_is_drawn_once_in_its_shade() -> None:
    shown = a_heatmap(7, 20)
    root = parsed(heatmap_svg(shown, "Use"))
    drawn = np.full((7, 20), -1)
    for path in root.iter(f"{SVG}path"):
        level = re.fullmatch(r"level-(\d)", path.get("class", ""))
        for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path.get("d", "")):
            assert level is not None
            run = drawn[int(y), int(x) : int(x) + int(length)]
            assert (run == -1).all()
            run[:] = int(level[1])
    assert (drawn == levels(-np.sort(-shown.shares_ME, axis=1))).all()


def test_shades_are_relative_to_even_use() -> None:
    even, most = np.full((1, 8), 1 / 8), np.array([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    assert levels(even).tolist() == [[LEVELS // 2] * 8]
    assert levels(most).tolist() == [[LEVELS - 1, *[0] * 7]]


# --- memory ---


def memory_widths(root: ET.Element) -> dict[str, float]:
    return {
        (group[0].text or "").partition(":")[0]: float(group[1].get("width", "0"))
        for group in root.iter(f"{SVG}g")
    }


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    memories = [
        Memory("VRAM", (Part("dense", "dense", 3 << 30), Part("hot", "experts", 9 << 30))),
        Memory("RAM", (Part("cold", "experts", 48 << 30), Part("nothing", "unused", 0))),
        Memory("Disk", (Part("rest", "experts", 0),)),
    ]
    root = parsed(memory_svg(memories, "Memory"))
    check_layout(root)
    widths = memory_widths(root)
    assert set(widths) == {"dense", "hot", "cold"}
    assert widths["cold"] / widths["hot"] == pytest.approx(48 / 9, rel=0.02)
    said = [text for _, text in words(root)]
    assert "VRAM, 12.0 GiB" in said and not any("Disk" in text for text in said)


@given(
    st.lists(
        st.lists(st.integers(0, 1 << 40), min_size=8, max_size=8), min_size=1, max_size=3
    ).filter(lambda rows: any(map(any, rows)))
)
@settings(max_examples=40)
def test_memories_of_any_size_are_laid_out(sizes: list[list[int]]) -> None:
    kinds = ("experts", "dense", "kv", "workspace", "staging", "context", "margin", "unused")
    memories = [
        Memory(f"memory {n}", tuple(map(Part, (f"a part of {k}" for k in kinds), kinds, row)))
        for n, row in enumerate(sizes)
    ]
    for text_of in words(parsed(memory_svg(memories, "Memory"))):
        assert text_of[0].right <= WIDTH + 1


@pytest.mark.parametrize(("vram_gb", "has_gpu"), [(20, True), (20, False), (None, False)])
def test_a_plans_parts_add_up(vram_gb: float | None, has_gpu: bool) -> None:
    """All of the VRAM budget, and of RAM what the plan says it needs, whatever plays the GPU."""
    machine = Hardware(
        has_gpu=has_gpu,
        gpu_name="Test GPU" if has_gpu else "",
        vram_total_bytes=24 * GIB * has_gpu,
        vram_free_bytes=23 * GIB * has_gpu,
        cuda_context_bytes=GIB // 2 * has_gpu,
        ram_total_bytes=256 * GIB,
        ram_available_bytes=250 * GIB,
        physical_cores=8,
        cpu_name="Test CPU",
    )
    name = "qwen3-30b-a3b"
    config = load_shape(name)
    settings_ = EngineConfig(model=name, vram_gb=vram_gb)
    plan, _ = plan_model(settings_, config, machine, name=name, folder=None)
    *on_gpu, in_ram, on_disk = memory_map(plan, machine)
    assert [memory.num_bytes for memory in on_gpu] == ([20 * GIB] if has_gpu else [])
    assert in_ram.num_bytes == plan.ram_needed_bytes <= in_ram.limit_bytes
    assert on_disk.num_bytes == 0
    check_page(plan_page(name, plan, machine, range(48), 128))


# --- roofline ---


def dots(root: ET.Element) -> list[tuple[float, float]]:
    return [(float(c.get("cx", "0")), float(c.get("cy", "0"))) for c in root.iter(f"{SVG}circle")]


POINTS = [
    Point(name="pp512", kind="cpu", intensity=800, flops=3e13),
    Point(name="tg128, host", kind="cpu", intensity=1.0, flops=1.55e11),  # by CPU and PCIe
    Point(name="tg128, GPU", kind="gpu", intensity=1.0, flops=4.2e12),
]


def line_of(root: ET.Element, kind: str) -> list[list[float]]:
    (path,) = [
        e
        for e in root.iter(f"{SVG}path")
        if e.get("class") == f"roof roof-{kind}" and "L" in (e.get("d") or "")
    ]
    return [list(map(float, pair.split())) for pair in (path.get("d") or "")[1:].split("L")]


def test_a_point_at_its_roof_lies_on_its_line() -> None:
    root = parsed(roofline_svg(roofs_of(GPU), POINTS, "Roofline"))
    check_layout(root)
    for (x, y), kind in zip(dots(root)[1:], ("cpu", "gpu"), strict=True):
        (x0, y0), (x1, y1) = line_of(root, kind)[:2]
        assert y == pytest.approx(y0 + (x - x0) / (x1 - x0) * (y1 - y0), abs=0.2)
    # a decade is as long on every part of an axis
    (x, _), (host, _), _ = dots(root)
    (left, _), *_ = line_of(root, "gpu")
    assert (x - host) / math.log10(800) == pytest.approx(host - left, rel=0.01)


def test_without_a_gpu_there_is_one_roof() -> None:
    root = parsed(roofline_svg(roofs_of(NO_GPU), [], "Roofline"))
    check_layout(root)
    assert len(line_of(root, "cpu")) == 3
    assert "PCIe" not in ET.tostring(root, "unicode")


@given(
    st.lists(st.tuples(st.floats(1e-3, 1e6), st.floats(1e6, 1e16)), min_size=0, max_size=6),
    st.sampled_from([GPU, NO_GPU]),
)
@settings(max_examples=15, deadline=None)
def test_any_points_are_laid_out(found: Sequence[tuple[float, float]], peaks: Peaks) -> None:
    points = [
        Point(name=f"tg128 @ d{n}", kind="cpu", intensity=x, flops=y)
        for n, (x, y) in enumerate(found)
    ]
    root = parsed(roofline_svg(roofs_of(peaks), points, "Roofline"))
    check_layout(root)
    for x, y in dots(root):
        assert 0 <= x <= WIDTH and 0 <= y <= 430


def test_a_roof_without_a_ceiling_ends_at_the_edge() -> None:
    roofs = [Roof(name="memory", kind="cpu", bytes_per_s=1e11)]
    check_layout(parsed(roofline_svg(roofs, [], "Roofline")))


# --- pages ---


def check_page(text: str) -> ET.Element:
    """It is XML as well, needs nothing from elsewhere, and runs nothing."""
    assert text.startswith("<!DOCTYPE html>")
    assert "<script" not in text and "@import" not in text and "url(" not in text
    links = set(re.findall(r"https?://[^\s\"<]+", text))
    assert links <= {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in text
    return ET.fromstring(text.partition("\n")[2])


def test_what_is_written_is_escaped() -> None:
    nasty = "<b>&\"'"
    root = check_page(
        page(nasty, [nasty], [Section(nasty, nasty, table=Table((nasty,), ((nasty,),)))])
    )
    said = [e.text for e in root.iter() if e.text and "<b>" in e.text]
    assert len(said) == 7 and set(said) == {nasty}


def test_every_class_has_a_colour() -> None:
    pictures = [
        heatmap_svg(a_heatmap(20, 64), "Use"),
        roofline_svg(roofs_of(GPU), POINTS, "Roofline"),
    ]
    css = style()
    for name in {n for p in pictures for c in re.findall(r'class="([^"]+)"', p) for n in c.split()}:
        assert f".{name}" in css, name
    for n in range(LEVELS):
        assert css.count(f"--level-{n}: #") == 2


def test_a_profile_is_a_page() -> None:
    text = profile_page(result())
    root = check_page(text)
    assert len(list(root.iter(f"{SVG}svg"))) == 1
    assert "1,234 tokens" in text and "3 of 8" in text
    assert " of 2.00 bits, median " in text
    check_page(profile_page(result(num_resident=0)))


def test_a_benchmark_is_a_page() -> None:
    table = Table(("test", "t/s"), (("pp512", "3"),))
    text = bench_page("speed", ["CPU", "took 2.2 times as long"], roofs_of(GPU), POINTS, table)
    check_page(text)
    assert "took 2.2 times as long" in text
    assert "30,000.0 GFLOP/s" in text
