"""The code of docs/nonlinear.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "nonlinear.md").read_text()
SNIPPETS = re.findall(r"^## ([^\n]*)\n[^#]*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", [code for _, code in SNIPPETS], ids=[title for title, _ in SNIPPETS])
def test_snippet_runs(code, capsys):
    exec(compile(code, "docs/nonlinear.md", "exec"), {})
    printed = capsys.readouterr().out
    if "QFP8Error" in code:
        assert len(printed.splitlines()) == 4


def test_all_snippets_are_found():
    assert len(SNIPPETS) == TEXT.count("```python")
