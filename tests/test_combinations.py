"""The page docs/combinations.md says what is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_pst import PSTConfig
from peft_pst.config import BUDGETS
from peft_pst.importance import IMPORTANCES

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "combinations.md").read_text()


def rows(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


GRID, REFUSED = (rows(part) for part in PAGE.split("What is not there is refused"))


def test_the_page_is_what_its_command_writes(tmp_path):
    script = tmp_path / "combinations.py"
    script.write_text((DOCS / "combinations.py").read_text())
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    assert (tmp_path / "combinations.md").read_text() == PAGE


@pytest.mark.parametrize("row", GRID[2:], ids=lambda row: row[0])
def test_what_is_not_in_the_grid_is_refused_with_an_error_of_the_page(row):
    assert [name.strip("`") for name in GRID[0][1:]] == list(IMPORTANCES)
    errors = {error for _, error in REFUSED[2:]}
    for importance, cell in zip(IMPORTANCES, row[1:], strict=True):
        assert cell == "no" or set(cell.split(", ")) <= set(BUDGETS)
        for budget in BUDGETS:
            choices = {"pattern": row[0].strip("`"), "importance": importance, "budget": budget}
            if budget in cell.split(", "):
                PSTConfig(**choices)
            else:
                with pytest.raises(ValueError) as error:
                    PSTConfig(**choices)
                assert str(error.value) in errors


@pytest.mark.parametrize("row", REFUSED[2:], ids=lambda row: row[0])
def test_each_refusal_is_raised_and_says_what_to_do(row):
    arguments, message = row
    with pytest.raises(ValueError, match=re.escape(message)):
        eval(f"PSTConfig({arguments.strip('`')})")
    assert re.search(r": .*(leave|set|choose|keep|lower|give)", message)
