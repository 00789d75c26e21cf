"""Weights on their way to the device: every byte at its place, every chunk's digest checked, whatever the cuts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.artifact.chunks import Chunks
from llmopt.artifact.digest import ChunkHasher, tree_digest
from llmopt.artifact.manifest import RandomTensor, WeightsEntry
from llmopt.artifact.stores import FileStore, RandomStore, draw
from llmopt.artifact.tensorfile import read_layout, write_tensors
from llmopt.errors import ArtifactError
from llmopt.program import TensorType
from llmopt.runtime.executors.cuda import driver, lanes, reading
from llmopt.runtime.executors.cuda.layout import Region
from llmopt.runtime.executors.cuda.weights import load_weights
from tests.targets.cuda.fake_driver import FakeDriver


@dataclass(frozen=True)
class Held:
    """A reader over an array."""

    data: npt.NDArray[Any]

    @property
    def type(self) -> TensorType:
        return TensorType(self.data.shape, self.data.dtype.name)

    def chunks(self, max_bytes: int) -> Iterator[npt.NDArray[Any]]:
        yield self.data


def tensors(sizes: list[int]) -> dict[str, npt.NDArray[Any]]:
    random = np.random.default_rng(0)
    return {f"t{i}": random.integers(0, 256, n).astype(np.uint8) for i, n in enumerate(sizes)}


def written(path: Path, data: dict[str, npt.NDArray[Any]], chunk_bytes: int) -> tuple[FileStore, Chunks]:
    """The file of some tensors, and its digests."""
    with path.open("wb") as file:
        write_tensors(file, {name: Held(value) for name, value in data.items()})
    hasher = ChunkHasher(chunk_bytes)
    hasher.update(memoryview(path.read_bytes()))
    digests = hasher.finish()
    entry = WeightsEntry("embedded", path.stat().st_size, tree_digest(digests), chunk_bytes, digests)
    return FileStore(path, read_layout(path).entries), Chunks(path, entry, path.name)


def loaded(
    data: dict[str, npt.NDArray[Any]], store: Any, chunks: Chunks | None, threads: int = 2
) -> dict[str, npt.NDArray[Any]]:
    """What lies on the fake device once the tensors ``data`` (in reverse order, 256-byte aligned) are loaded."""
    fake, region = FakeDriver(), Region()
    for name, value in reversed(data.items()):
        region.add(name, value.nbytes)
    program: Any = SimpleNamespace(weights={n: SimpleNamespace(type=Held(v).type) for n, v in data.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "cu", fake)
        driver.call("cuCtxSetCurrent", "context")
        base = fake.do_cuMemAlloc(region.size + 1)
        memory = fake.memory[base]
        load_weights(program, store, region, base, "context", threads, chunks)
        assert list(fake.memory) == [base], "page-locked buffers were freed"
    return {n: memory[region.offsets[n] :][: v.nbytes].view(v.dtype).reshape(v.shape) for n, v in data.items()}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=6), st.sampled_from([64, 100, 300, 1 << 16]), st.booleans())
def test_every_byte_arrives_however_the_file_is_cut(sizes: list[int], chunk_bytes: int, check: bool) -> None:
    data = tensors(sizes)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for module in (lanes, reading):
            patch.setattr(module, "PIECE", 96)
        patch.setattr(reading, "CHUNK_BYTES", chunk_bytes)
        store, chunks = written(Path(folder) / "w", data, chunk_bytes)
        found = loaded(data, store, chunks if check else None)
    assert all(np.array_equal(found[name], value) for name, value in data.items())


def test_a_damaged_chunk_is_named_with_its_tensors(tmp_path: Path) -> None:
    data = tensors([500, 500, 500])
    store, chunks = written(tmp_path / "w", data, 256)
    raw = bytearray((tmp_path / "w").read_bytes())
    raw[store.entries["t1"].offset + 20] ^= 1
    (tmp_path / "w").write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"chunk \d+ of \d+ \(.*t1.*\) is not what the manifest names"):
        loaded(data, store, chunks)
    with pytest.raises(ArtifactError, match="t1"):
        chunks.check_all()
    assert loaded(data, store, None)["t1"][20] == data["t1"][20] ^ 1, "without digests nothing is noticed"


def test_a_file_that_shrinks_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, chunks = written(tmp_path / "w", tensors([5000]), 1 << 16)
    monkeypatch.setattr(driver, "cu", FakeDriver())
    driver.call("cuCtxSetCurrent", "context")
    with reading.FileReader(tmp_path / "w", [], chunks) as reader:
        (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:1000])
        with pytest.raises(ArtifactError, match="shrank to 1000 bytes"):
            reader.read_chunk(0, lanes.Lanes(1))


def test_a_tensor_of_another_size_or_type_is_named(tmp_path: Path) -> None:
    data = tensors([64, 64])
    store, chunks = written(tmp_path / "w", data, 1 << 16)
    for wrong, words in ((data["t0"][:60], "expected 60 bytes, found 64"), (data["t0"].view(np.int8), "expected int8")):
        with pytest.raises(ArtifactError, match=f"t0: {words}"):
            loaded({**data, "t0": wrong}, store, chunks)
    with pytest.raises(ArtifactError, match="t9: the artifact's weights lack it"):
        loaded({**data, "t9": data["t0"]}, store, chunks)


def test_seeded_tensors_are_drawn_beside_the_file(tmp_path: Path) -> None:
    data = tensors([100])
    store, chunks = written(tmp_path / "w", data, 1 << 16)
    big = RandomTensor("float32", (1_500_000,), ("normal", 0.0, 0.02))
    found = loaded({**data, "big": draw(7, "big", big)}, RandomStore(7, {"big": big}, store), chunks)
    assert np.array_equal(found["big"], draw(7, "big", big))
    assert np.array_equal(found["t0"], data["t0"])


class Memory:
    """A store that is no file."""

    def __init__(self, data: dict[str, npt.NDArray[Any]]) -> None:
        self.data = data

    def names(self) -> tuple[str, ...]:
        return tuple(self.data)

    def get(self, name: str) -> npt.NDArray[Any]:
        return self.data[name]

    def dtype(self, name: str) -> str:
        return self.data[name].dtype.name


def test_a_store_that_is_no_file_is_copied() -> None:
    data = tensors([10, 5 << 20])
    found = loaded(data, Memory(data), None)
    assert all(np.array_equal(found[name], value) for name, value in data.items())
