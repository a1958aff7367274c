from peft_pst import format_table


def test_table():
    table = format_table(("a", "long header"), [("x", 1), ("yy", 22)])
    assert table.splitlines() == [
        "| a  | long header |",
        "|----|-------------|",
        "| x  | 1           |",
        "| yy | 22          |",
    ]
