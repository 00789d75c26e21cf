"""Arrivals, lengths, prompts: what is drawn has the distribution asked for, and comes back with the seed."""

import json

import numpy as np
import pytest

from llmopt.errors import ConfigError, RequestError
from llmopt.loadgen.arrivals import arrival_times
from llmopt.loadgen.benchmark import Load
from llmopt.loadgen.lengths import Lengths
from llmopt.loadgen.workload import FileShape, Shape

COUNT = 20_000


def rng():
    return np.random.default_rng(7)


def test_poisson_arrivals():
    gaps = np.diff(arrival_times("poisson", rng(), COUNT, 20.0))
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.05)  # an exponential's deviation is its mean; even spacing has 0
    assert np.diff(arrival_times("constant", rng(), 100, 20.0)).std() < 1e-9


def test_bursts_keep_the_rate():
    times = arrival_times("burst", rng(), COUNT, 20.0, burst=16)
    moments, sizes = np.unique(times, return_counts=True)
    assert set(sizes) == {16}
    assert COUNT / times[-1] == pytest.approx(20, rel=0.05)
    assert moments[0] == 0


def test_all_at_once():
    assert not arrival_times("poisson", rng(), 9, float("inf")).any()


def test_lengths():
    assert set(Lengths.parse("12", "x").draw(rng(), 5)) == {12}
    uniform = Lengths.parse("uniform:3:9", "x").draw(rng(), COUNT)
    assert set(uniform) == set(range(3, 10))
    assert uniform.mean() == pytest.approx(6, rel=0.02)
    drawn = Lengths.parse("lognormal:300:0.8:2048", "x").draw(rng(), COUNT)
    assert np.median(drawn) == pytest.approx(300, rel=0.03)
    assert np.log(drawn[drawn < 2048]).std() == pytest.approx(0.8, rel=0.05)
    assert drawn.min() >= 1
    assert drawn.max() == 2048


@pytest.mark.parametrize(
    "text", ["", "0", "1.5", "x", "uniform:5:3", "uniform:1", "uniform:1:nan", "lognormal:0:1", "normal:3:4", "nan"]
)
def test_what_is_no_distribution(text):
    with pytest.raises(ConfigError, match=r"--prompt-len: .*is not a distribution"):
        Lengths.parse(text, "--prompt-len")


def shape(**changes):
    return Shape(**{"prompt_len": Lengths.parse("8", "x"), "output_len": Lengths.parse("4", "x"), **changes})


def test_prefixes_are_shared_and_the_rest_is_not():
    bodies = shape(prefixes=3, prefix_len=20, vocab_size=50_000).bodies(rng(), 12)
    heads = [tuple(b["prompt"][:20]) for b in bodies]
    assert len(set(heads)) == 3
    assert heads[0] == heads[3] != heads[1]
    assert len({tuple(b["prompt"][20:]) for b in bodies}) == 12
    assert {len(b["prompt"]) for b in bodies} == {28}
    with pytest.raises(ConfigError, match="go together"):
        shape(prefixes=3)


def test_a_seed_repeats_the_load():
    first, second, other = (Load(shape(), 9, rate=5.0, warmup=2, seed=s).calls() for s in (1, 1, 2))
    assert first == second
    assert first != other
    assert first[0][0].body != first[1][0].body


def test_chats_are_words():
    [body] = shape(chat=True).bodies(rng(), 1)
    assert len(body["messages"][0]["content"].split()) == 8


def test_a_file(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt_len": 3, "output_len": 5}\n\n{"prompt": "hello", "max_tokens": 2}\n')
    bodies = FileShape.read(path, shape()).bodies(rng(), 3)
    assert [b["max_tokens"] for b in bodies] == [5, 2, 5]
    assert len(bodies[0]["prompt"]) == 3
    assert bodies[0] != bodies[2]


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt_len": 0, "output_len": 1}', json.dumps({"messages": []})])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(RequestError, match="line 2: "):
        FileShape.read(path, shape())
