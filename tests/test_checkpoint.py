"""Weights on disk come back bit for bit, or not at all."""

import logging
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from instantid_jax.checkpoint import WeightsError, has_weights, load_weights, save_weights

RNG = np.random.default_rng(0)
FLAT = {
    "conv_in/kernel": RNG.standard_normal((3, 3, 4, 8), dtype=np.float32),
    "layers/0/to_q/kernel": RNG.standard_normal((6, 4), dtype=np.float32).T,
    "layers/0/norm/scale": RNG.standard_normal(4).astype(np.float16),
    "half": RNG.standard_normal((3, 4)).astype(ml_dtypes.bfloat16),
    "unaligned": np.frombuffer(memoryview(bytes(1) + RNG.standard_normal(6).tobytes())[1:], np.float64),
    "count": np.arange(3),
    "scalar": np.ones((), np.float32),
}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all((x.dtype, x.shape, x.tobytes()) == (b[k].dtype, b[k].shape, b[k].tobytes()) for k, x in a.items())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_weights(tmp_path / "w", FLAT)
    return tmp_path / "w"


def test_weights_come_back_bit_for_bit(saved: Path) -> None:
    assert same(load_weights(saved), FLAT)
    assert all(isinstance(x, np.ndarray) for x in load_weights(saved).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_casts_round_as_numpy_s_when_reading_and_when_writing(dtype: str, saved: Path, tmp_path: Path) -> None:
    floats = {path: x.astype(dtype) for path, x in FLAT.items() if path != "count"}
    read = load_weights(saved, dtype=dtype)
    assert np.array_equal(read.pop("count"), FLAT["count"]) and same(read, floats)
    save_weights(tmp_path / "cast", {path: x for path, x in FLAT.items() if path != "count"}, dtype)
    assert same(load_weights(tmp_path / "cast"), floats)


def test_device_arrays_are_written_and_read_onto_devices(tmp_path: Path) -> None:
    arrays = {path: jax.numpy.asarray(x) for path, x in FLAT.items() if x.dtype not in (np.float64, np.int64)}
    save_weights(tmp_path / "w", arrays)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = load_weights(tmp_path / "w", dtype="bfloat16", shardings=dict.fromkeys(arrays, place))
    for path, x in arrays.items():
        assert isinstance(found[path], jax.Array) and found[path].sharding == place
        assert np.array_equal(np.asarray(found[path]), np.asarray(x).astype(ml_dtypes.bfloat16))
    assert all(isinstance(x, np.ndarray) for x in load_weights(tmp_path / "w").values())
    with pytest.raises(WeightsError, match="no sharding is given for 'conv_in/kernel'"):
        load_weights(tmp_path / "w", shardings={})


def test_reading_and_writing_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.WARNING):
        save_weights(tmp_path / "w", FLAT)
        load_weights(tmp_path / "w")
    assert caplog.text == "" and capfd.readouterr() == ("", "")


def test_nothing_is_written_over(saved: Path) -> None:
    with pytest.raises(WeightsError, match="exists already"):
        save_weights(saved, FLAT)
    with pytest.raises(WeightsError, match="no weights to write"):
        save_weights(saved.parent / "x", {})


@pytest.mark.parametrize("directory", ["absent", "."])
def test_a_folder_without_weights(directory: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no weights, or their writing was interrupted"):
        load_weights(tmp_path / directory)


@pytest.mark.parametrize(
    "name", ["_CHECKPOINT_METADATA", "state/_METADATA", "state/conv_in/kernel/zarr.json", "state/conv_in/kernel/c/0/0/0/0", "state/scalar/c"]
)
def test_a_missing_file_is_an_error(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(WeightsError, match=r"\bw\b"):
        load_weights(saved)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    "name", ["state/_METADATA", "state/conv_in/kernel/zarr.json", "state/conv_in/kernel/c/0/0/0/0", "state/layers/0/norm/scale/c/0"]
)
def test_a_file_that_is_cut_off_is_an_error(name: str, share: float, saved: Path) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match="convert or copy"):
        load_weights(saved)


def single_file(folder: Path) -> Path:
    folder.mkdir()
    save_file({"unet/a/kernel": np.float16([[1, 2]]), "unet/step": np.int32([3]), "vae/b": np.float16([4])}, folder / "weights.safetensors")
    return folder


def test_a_small_model_may_be_one_file(tmp_path: Path) -> None:
    folder = single_file(tmp_path / "w")
    found = load_weights(folder / "unet", dtype="float32")
    assert {path: (x.dtype.name, x.tolist()) for path, x in found.items()} == {"a/kernel": ("float32", [[1.0, 2.0]]), "step": ("int32", [3])}
    assert has_weights(folder / "vae") and not has_weights(folder / "resampler") and not has_weights(tmp_path / "x" / "vae")
    with pytest.raises(WeightsError, match="holds no weights of resampler"):
        load_weights(folder / "resampler")


def test_a_damaged_single_file_is_named(tmp_path: Path) -> None:
    folder = single_file(tmp_path / "w")
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"weights\.safetensors is damaged"):
        load_weights(folder / "unet")
