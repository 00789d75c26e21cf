"""An artifact read back is what was written, whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from llmopt.artifact import Artifact, WeightsPlan
from llmopt.artifact.digest import CHUNK_BYTES
from llmopt.artifact.manifest import FORMAT
from llmopt.errors import ArtifactError, CheckpointError, ResourceError
from llmopt.target import TargetFiles

from .conftest import GOLDEN, ArrayReader, Write, arrays


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_round_trip(tmp_path: Path, write: Write) -> None:
    written = write(tmp_path / "new" / "out")
    artifact = Artifact.open(tmp_path / "new" / "out")
    assert artifact.manifest == written
    assert artifact.manifest.golden == GOLDEN
    assert artifact.manifest.states[0]["block_bytes"] == 16 * 2 * 8 * 4
    assert artifact.file("ir/00-capture.txt").read_bytes() == b"graph"
    store = artifact.weight_store()
    assert sorted(store.names()) == sorted(arrays())
    for name, expected in arrays().items():
        found = store.get(name)
        assert store.dtype(name) == expected.dtype.name
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
        assert not found.size or found.ctypes.data % 64 == 0
    with pytest.raises(ArtifactError, match="no tensor nothing"):
        store.get("nothing")
    with pytest.raises(ArtifactError, match=r"holds no kernel\.cubin"):
        artifact.file("kernel.cubin")


def test_other_readers_understand_the_weights(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "out")
    with safe_open(tmp_path / "out" / "weights.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("a.codes"), arrays()["a.codes"])


def test_same_inputs_give_the_same_bytes(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "a")
    write(tmp_path / "elsewhere" / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "elsewhere" / "b")


def test_replaces_an_artifact_and_nothing_else(tmp_path: Path, write: Write) -> None:
    out = tmp_path / "out"
    write(out)
    write(out, extra_files={})
    assert "ir/00-capture.txt" not in Artifact.open(out).manifest.files
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="holds something else"):
        write(tmp_path / "home")
    (tmp_path / "file").write_text("dear")
    with pytest.raises(ArtifactError, match="a file is in the way"):
        write(tmp_path / "file")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "dear"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "home", "out"]


class Failing(ArrayReader):
    """A reader that fails after its first chunk."""

    error: BaseException

    def chunks(self, max_bytes: int) -> Any:
        yield next(super().chunks(64))
        raise self.error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
        (OSError(errno.EDQUOT, "Quota exceeded"), ResourceError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("boom"), RuntimeError),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_nothing(
    tmp_path: Path, write: Write, error: BaseException, expected: type[BaseException], existing: bool
) -> None:
    home = tmp_path / "some" / "where"
    if existing:
        write(home / "out")
    before = tree(tmp_path)
    reader = Failing(arrays()["a.codes"])
    object.__setattr__(reader, "error", error)
    with pytest.raises(expected):
        write(home / "out", files=TargetFiles(weights={"a.codes": reader}))
    assert tree(tmp_path) == before
    assert existing or not (tmp_path / "some").exists()


def test_a_disk_that_is_too_small_is_refused_before_writing(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match="disk is full: weights need"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_builds_are_swept(tmp_path: Path, write: Write) -> None:
    dead = tmp_path / ".out.part-999999999"
    alive = tmp_path / f".out.part-{os.getppid()}"
    dead.mkdir()
    alive.mkdir()
    write(tmp_path / "out")
    assert not dead.exists()
    assert alive.exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, write: Write, dtype: Any, value: float) -> None:
    bad = np.zeros((4, 4), dtype)
    bad[2, 1] = value
    with pytest.raises(CheckpointError, match=r"tensor a\.bad: weights hold NaN or infinity"):
        write(tmp_path / "out", arrays={**arrays(), "a.bad": bad})


def test_golden_may_be_made_from_the_unpublished_artifact(tmp_path: Path, write: Write) -> None:
    def golden(artifact: Artifact) -> Any:
        assert artifact.weight_store().get("a.scalar") == np.float32(3.5)
        assert not (tmp_path / "out").exists()
        return GOLDEN

    assert write(tmp_path / "out", golden=golden).golden == GOLDEN
    assert Artifact.open(tmp_path / "out").manifest.golden == GOLDEN


def test_two_files_of_one_name(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ArtifactError, match="two files of the artifact are named program"):
        write(tmp_path / "out", extra_files={"program.json": b""})


def test_newer_format(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    with pytest.raises(ArtifactError, match=f"expected format {FORMAT}, found {FORMAT + 1}"):
        Artifact.open(tmp_path / "out")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "ir/../../x", "a\\b", "./x", "", ".."])
def test_a_name_that_leaves_the_directory(tmp_path: Path, write: Write, name: str) -> None:
    with pytest.raises(ArtifactError, match="leaves the artifact"):
        write(tmp_path / "out", extra_files={name: b"x"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.bin", "weights.safetensors", "manifest.json"])
def test_a_link_out_of_the_directory(tmp_path: Path, write: Write, name: str) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / name).rename(tmp_path / name)
    (tmp_path / "out" / name).symlink_to(tmp_path / name)
    with pytest.raises(ArtifactError, match="link out of the artifact"):
        Artifact.open(tmp_path / "out")


def test_what_is_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such artifact"):
        Artifact.open(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        Artifact.open(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_byte_names_the_file(tmp_path: Path, write: Write, data: st.DataObject) -> None:
    out = tmp_path / "out"
    if not out.exists():
        write(out)
    path = data.draw(st.sampled_from(sorted(p for p in out.rglob("*") if p.is_file())))
    original = path.read_bytes()
    name = str(path.relative_to(out))
    index = data.draw(st.integers(0, len(original) - 1))
    if data.draw(st.booleans(), label="truncate"):
        damaged = original[:index]
    else:
        changed = original[index] ^ data.draw(st.integers(1, 255))
        damaged = original[:index] + bytes([changed]) + original[index + 1 :]
    try:
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError) as caught:
            Artifact.open(out)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    finally:
        path.write_bytes(original)
    Artifact.open(out)


def test_a_flipped_weight_names_its_tensor(tmp_path: Path, write: Write) -> None:
    out = tmp_path / "out"
    big = np.zeros((CHUNK_BYTES + 100, 1), np.uint8)
    write(out, arrays={**arrays(), "c.big": big, "d.last": np.ones(5, np.uint8)})
    path = out / "weights.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors: chunk 1 of 2 \(c\.big, d\.last\)"):
        Artifact.open(out)
    assert Artifact.open(out, verify=False).weight_store().get("d.last")[-1] == 0


def test_weights_beside_the_artifact(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "out", weights=WeightsPlan("external", tmp_path / "weights"))
    assert not (tmp_path / "out" / "weights.safetensors").exists()
    with pytest.raises(ArtifactError, match="are not in the artifact"):
        Artifact.open(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"expected weights\.safetensors, found none"):
        Artifact.open(tmp_path / "out", weights=tmp_path)
    store = Artifact.open(tmp_path / "out", weights=tmp_path / "weights").weight_store()
    np.testing.assert_array_equal(store.get("a.codes"), arrays()["a.codes"])
    # another artifact of the same weights serves as well
    write(tmp_path / "embedded")
    Artifact.open(tmp_path / "out", weights=tmp_path / "embedded")
    with pytest.raises(ArtifactError, match="none can be attached"):
        Artifact.open(tmp_path / "embedded", weights=tmp_path / "weights")
    changed = arrays()
    changed["a.codes"][7, 7] ^= 1
    write(tmp_path / "wrong", arrays=changed)
    with pytest.raises(ArtifactError, match=r"chunk 0 of 1 \(a\.codes.* is not what the manifest names"):
        Artifact.open(tmp_path / "out", weights=tmp_path / "wrong")


def test_failing_external_weights_leave_nothing(tmp_path: Path, write: Write) -> None:
    plan = WeightsPlan("external", tmp_path / "weights")
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "out", weights=plan, golden=lambda artifact: [{}] * (1 // 0))
    assert list(tmp_path.iterdir()) == []


def test_random_weights(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "a", weights=WeightsPlan("random", seed=7))
    first, again = (Artifact.open(tmp_path / "a").weight_store() for _ in range(2))
    write(tmp_path / "b", weights=WeightsPlan("random", seed=8))
    other = Artifact.open(tmp_path / "b").weight_store()
    assert sorted(first.names()) == sorted(arrays())
    for name, real in arrays().items():
        drawn = first.get(name)
        assert (drawn.shape, drawn.dtype, first.dtype(name)) == (real.shape, real.dtype, real.dtype.name)
        assert drawn.tobytes() == again.get(name).tobytes()
    assert first.get("a.codes").max() == 15  # unpacked 4-bit codes
    assert not np.array_equal(first.get("a.codes"), other.get("a.codes"))
    matrix = first.get("b.weight").astype(np.float32)
    assert abs(matrix.std() / 0.02 - 1) < 0.02
    assert len(np.unique(matrix, axis=0)) == len(matrix)
    for name in ("a.scales", "a.odd", "b.table"):  # small ones and tables are kept
        assert first.get(name).tobytes() == arrays()[name].tobytes()
    assert (tmp_path / "a" / "weights.safetensors").stat().st_size < 200_000
