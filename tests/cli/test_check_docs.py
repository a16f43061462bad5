"""The README's generated parts: written once, checked from then on."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from fiddler.cli import COMMANDS
from fiddler.cli.options import ENGINE_OPTIONS
from scripts.check_docs import generated, main, options_table

NAMES = ["engine-options", "help:fiddler", *(f"help:{name}" for name in COMMANDS)]


def document(*names: str) -> str:
    parts = "".join(f"<!-- {name} -->\nold\n<!-- end -->\n\ntext\n" for name in names)
    return f"# Title\n\n{parts}"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_write_makes_the_check_pass(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(document(*NAMES))
    code, diff, err = run(str(path))
    assert code == 1
    assert "-old" in diff
    assert "--write" in err
    assert run("--write", str(path))[0] == 0
    assert run(str(path)) == (0, "", "")
    written = path.read_text()
    assert "old\n" not in written
    assert written.startswith("# Title\n\n<!-- engine-options -->\n| flag |")
    assert written.count("\ntext\n") == len(NAMES)


def test_a_changed_line_is_found(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(document("help:chat"))
    run("--write", str(path))
    path.write_text(path.read_text().replace("--no-history", "--no-memory"))
    code, diff, _ = run(str(path))
    assert code == 1
    assert "-  --no-memory" in diff
    assert "+  --no-history" in diff


@pytest.mark.parametrize("text", [document("help:nothing"), "<!-- help:chat -->\nno end\n"])
def test_bad_markers_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    assert run("--write", str(path))[0] == 2
    assert path.read_text() == text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_what_the_command_prints(name: str) -> None:
    assert f"Usage: fiddler {name} " in generated(f"help:{name}")


def test_the_table_has_every_option() -> None:
    lines = options_table().splitlines()
    assert len(lines) == 2 + len(ENGINE_OPTIONS)
    assert all(line.count(" | ") == 3 for line in lines[2:])


ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link
