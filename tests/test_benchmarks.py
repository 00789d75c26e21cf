"""The benchmark pages: latest rows, missing columns, markers, and that the committed pages are current."""

from __future__ import annotations

import json

import pytest

from benchmarks import render

ROW = dict.fromkeys([*render.COLUMNS, "machine", "cores", "model"], 1) | {"recipe": "float32", "floor_percent": None}


def write(folder, *rows):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return render.read_rows(folder)


def test_the_latest_of_equal_configurations_is_shown(tmp_path):
    rows = write(tmp_path, {**ROW, "ms": 5}, {**ROW, "batch": 8}, {**ROW, "ms": 4})
    page = render.render(render.latest(rows), "# Intro\n")
    assert page.startswith("# Intro\n\n## 1 on 1, 1 cores\n\n| recipe |")
    assert page.count("| float32 |") == 2
    assert "| 5 |" not in page


def test_a_row_without_a_column_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl:2 lacks ms"):
        write(tmp_path, ROW, {k: v for k, v in ROW.items() if k != "ms"})


def test_readme_is_filled_between_its_markers(tmp_path):
    rows = write(tmp_path, ROW)
    filled = render.fill(f"a{render.BEGIN}old{render.END}b", rows)
    assert filled.startswith(f"a{render.BEGIN}\n\n| model |")
    assert filled.endswith(f"{render.END}b")
    assert "old" not in filled
    assert render.fill(filled, rows) == filled
    with pytest.raises(ValueError, match=r"README.md lacks"):
        render.fill("no markers", rows)


def test_the_committed_pages_are_current():
    assert render.main(["--check"]) == 0


def test_a_stale_page_fails_the_check(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "benchmarks.md"
    stale.write_text("old")
    monkeypatch.setattr(render, "PAGE", stale)
    assert render.main(["--check"]) == 1
    assert "benchmarks.md" in capsys.readouterr().err
