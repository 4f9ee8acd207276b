"""The tables of formats in the documents say what happens: `support/format_tables.py` makes them."""

from __future__ import annotations

import pytest

from support.format_tables import TABLES, between


@pytest.mark.backend("tensorflow", reason="the tables are those of the TensorFlow backend")
@pytest.mark.parametrize("marks", TABLES)
def test_the_documents_have_these_tables(marks: str) -> None:
    path, make = TABLES[marks]
    found = between(marks).search(path.read_text())
    assert found is not None
    assert found[1] == f"\n{make()}\n\n"
