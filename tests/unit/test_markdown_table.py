"""Tables for people: Markdown where it fits, a record for each row where it does not."""

from hypothesis import given
from hypothesis import strategies as st

from fiddler.markdown_table import markdown_table

HEADINGS = ["model", "test", "t/s"]
cells = st.text("abc 1.", max_size=9).map(str.strip)
rows_of_cells = st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=4)


@given(rows=rows_of_cells, width=st.integers(1, 60))
def test_a_table_that_does_not_fit_becomes_records_of_the_same_cells(
    rows: list[list[str]], width: int
) -> None:
    table = markdown_table(HEADINGS, rows, left={"model"})
    found = markdown_table(HEADINGS, rows, left={"model"}, width=width)
    if len(table[0]) <= width:
        assert found == table
        return
    records = [record.splitlines() for record in "\n".join(["", *found]).split("\n\n")]
    told = [line.split(maxsplit=1) for record in records for line in record if line]
    assert told == [[h, c] for row in rows for h, c in zip(HEADINGS, row, strict=True) if c]


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
