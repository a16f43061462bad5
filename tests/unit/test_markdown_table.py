"""Tables for people: Markdown where it fits, a record for each row where it does not."""

from hypothesis import given
from hypothesis import strategies as st

from fiddler.markdown_table import markdown_table

HEADINGS = ["model", "test", "t/s"]
cells = st.text("abc 1.", max_size=9).map(str.strip)
rows_of_cells = st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=4)


@given(rows=rows_of_cells, width=st.integers(17, 60))
def test_a_table_that_does_not_fit_keeps_its_cells(rows: list[list[str]], width: int) -> None:
    """All that is told above the table is told of each row, and so is each of the records.

    From 17 columns on, in which each cell fits beside its name.
    """
    table = markdown_table(HEADINGS, rows, left={"model"})
    found = markdown_table(HEADINGS, rows, left={"model"}, width=width)
    if len(table[0]) <= width:
        assert found == table
        return
    *records, last = [part.split("\n") for part in "\n".join(found).split("\n\n")]
    if not last[0].startswith("|"):
        assert told([*records, last]) == [cell for row in rows for cell in cells_of(row)]
        return
    assert all(len(line) <= width for line in last)
    shared = told(records)
    assert last[0].strip("| "), "a table of no columns"
    heads, _, *bodies = [[c.strip() for c in line.split("|")[1:-1]] for line in last]
    for row, body in zip(rows, bodies, strict=True):
        named = [(h, c) for h, c in zip(heads, body, strict=True) if c]
        assert sorted([*shared, *named]) == sorted(cells_of(row))


def cells_of(row: list[str]) -> list[tuple[str, str]]:
    return [(h, c) for h, c in zip(HEADINGS, row, strict=True) if c]


def told(records: list[list[str]]) -> list[tuple[str, str]]:
    return [
        (name, cell.strip())
        for record in records
        for name, _, cell in (line.partition(" ") for line in record if line)
    ]


def test_what_all_rows_share_stands_above_them() -> None:
    rows = [["a long name", "pp512", "1.5"], ["a long name", "tg128", "22"]]
    assert markdown_table(HEADINGS, rows, left={"test"}, width=20) == [
        "model  a long name",
        "",
        "| test  | t/s |",
        "| ----- | --: |",
        "| pp512 | 1.5 |",
        "| tg128 |  22 |",
    ]


def test_records_are_columns_of_names_and_values() -> None:
    rows = [["tiny", "pp512", "1.5"], ["tiny", "", "22"]]
    assert markdown_table(HEADINGS, rows, left=(), width=10) == [
        "model  tiny",
        "test   pp512",
        "t/s    1.5",
        "",
        "model  tiny",
        "t/s    22",
    ]


def test_a_long_cell_of_a_record_is_broken_at_blanks() -> None:
    rows = [["tiny float32, experts bfloat16", "pp512", "1.5"]]
    assert markdown_table(HEADINGS, rows, left=(), width=20) == [
        "model  tiny float32,",
        "       experts",
        "       bfloat16",
        "test   pp512",
        "t/s    1.5",
    ]
