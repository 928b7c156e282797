"""The code of docs/training.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is an extra")

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text()
SNIPPETS = re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("code", [code for _, code in SNIPPETS], ids=[title for title, _ in SNIPPETS])
def test_snippet_runs(code):
    exec(compile(code, "docs/training.md", "exec"), {})


def test_all_snippets_are_found():
    assert len(SNIPPETS) == TEXT.count("```python")
