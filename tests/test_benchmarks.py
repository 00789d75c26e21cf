"""The benchmark pages: latest rows, missing columns, markers, and that the committed pages are current."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from benchmarks import peers, quality_table, render, waterfall
from benchmarks.word_tokenizer import word_tokenizer

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


FALL = {
    "model": "m", "recipe": "bfloat16", "batch": 2, "prompt_len": 3, "step_us": 100.0, "gb_s": 1000.0, "tflops": 1.0,
    "machine": "M", "how": "h", "commit": "c", "date": "d",
    "parts": [
        {"part": "reads", "launches": 2, "us": 20.0, "bytes": 10_000_000, "flops": 1_000_000},
        {"part": "adds", "launches": 1, "us": 40.0, "bytes": 1_000_000, "flops": 30_000_000},
    ],
}  # fmt: skip


def test_a_waterfall_adds_up_to_the_step():
    parts = waterfall.parts_of(FALL)
    assert parts == [("reads", 40.0, 20.0), ("adds", 40.0, 30.0), (waterfall.REST, 20.0, 0.0)]
    assert sum(us for _, us, _ in parts) == FALL["step_us"]
    assert "floor 0.05 of 0.10 ms" in waterfall.waterfall_section([FALL])
    assert waterfall.waterfall_section([]) == ""
    ElementTree.fromstring(waterfall.plot(FALL))


def test_the_last_waterfall_of_a_model_and_batch_is_drawn(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({**FALL, "step_us": us}) + "\n" for us in (100.0, 90.0)))
    assert [row["step_us"] for row in waterfall.read(tmp_path)] == [90.0]
    (tmp_path / "b.jsonl").write_text(json.dumps({**FALL, "recipe": "bfloat16, int4 g128"}) + "\n")
    names = [waterfall.name_of(row) for row in waterfall.read(tmp_path)]
    assert names == ["waterfall-m-bs2.svg", "waterfall-m-int4-g128-bs2.svg"]


def test_peers_stand_beside_rows_of_the_same_machine_and_shape(tmp_path):
    known = {"name": "P", "model": "m", "recipe": "r", "ms": {"1x5": 2.0}, "ttft_ms": {"5": 9.0}}
    path = tmp_path / "peers.json"
    path.write_text(json.dumps({"machine": "M", "peers": [known, {**known, "name": "Q", "ttft_ms": {}}]}))
    row = {"machine": "M", "model": "m", "recipe": "r", "batch": 1, "prompt_len": 5}
    others = [{**row, key: "other"} for key in ("machine", "model", "recipe")] + [{**row, "batch": 2}]
    peers.add_peers(rows := [row, *others], path)
    assert (row["peer_ms"], row["peer_ttft_ms"]) == ("P 2.0, Q 2.0", "P 9.0")
    assert [r["peer_ms"] for r in rows[1:]] == [None] * 4


def test_quality_tables_show_the_latest_of_each_scheme(tmp_path):
    change = {"value": 0.0142, "low": 0.0118, "high": 0.0167}
    row = {"model": "m", "scheme": "int4 g128", "windows": 96, "change": change, "kl_mean": {"value": 0.0284}}
    against = {"perplexity": change, "kl_mean": {"value": -0.0062, "low": -0.0065, "high": -0.0058}}
    rows = [{**row, "windows": 8}, {**row, "scheme": "new", "against_rtn": against}, row]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    first, second = quality_table.section(tmp_path).splitlines()[-2:]
    assert first == "| int4 g128, to nearest | 96 | +1.42% (+1.18 to +1.67) | 0.0284 | – | – |"
    assert second.endswith("| +1.42% (+1.18 to +1.67) | -0.0062 (-0.0065 to -0.0058) |")
    with pytest.raises(ValueError, match=r"quantization.md lacks"):
        quality_table.fill("no markers", tmp_path)


def test_every_token_of_the_stand_in_has_text_and_every_text_tokens():
    made = word_tokenizer(300)
    assert made.get_vocab_size() == 300
    assert all(made.decode([token]) for token in range(256, 300))
    assert made.decode(made.encode("Grüße, 5!").ids) == "Grüße, 5!"
    with pytest.raises(ValueError, match="255 tokens are fewer"):
        word_tokenizer(255)
