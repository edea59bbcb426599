"""Records: checked, stored as TFDS examples, and read back equal without running anything."""

import dataclasses
import io
import pickle

import numpy as np
import pytest

from instantid_jax.data.record import CachedLatents, CachedText, DataError, View, check_record, decode_array, encode_array, parse_example
from tests.data.samples import record


def _serialised(value):
    from tensorflow_datasets.core import example_serializer

    from instantid_jax.data.builder import example_of, features

    form = features()
    return example_serializer.ExampleSerializer(form.get_serialized_info()).serialize_example(form.encode_example(example_of(value)[1]))


def _full():
    rng = np.random.default_rng(0)
    mean, logvar, states = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 8, 4), (6, 8, 4), (77, 10)))
    return record(
        3,
        embeddings=rng.standard_normal((2, 8)).astype(np.float32),
        embedding_scale=1.5,
        det_score=0.75,
        caption="ein Foto, mit Ümläut 漢字",
        labels={"hair": "red", "age": 41, "tags": ["a", "b"]},
        split="test",
        source="https://example.org/a.jpg",
        licence="CC0-1.0",
        landmarks=rng.standard_normal((68, 2)).astype(np.float32),
        latents=CachedLatents(mean.astype(np.float16), logvar.astype(np.float16), View(50, 64, 1, 0, 48, 64), "abc"),
        text=CachedText(states, states[0], "def"),
    )


def _flat(value):
    fields = dataclasses.asdict(value)
    nested = [fields.pop(name) for name in ("latents", "text")]
    return fields | {f"{i}.{k}": v for i, part in enumerate(nested) for k, v in (part or {}).items()}


@pytest.mark.parametrize("make", [_full, lambda: record(1)])
def test_a_record_survives_storage(make):
    before = make()
    after = parse_example(_serialised(before))
    assert _flat(before).keys() == _flat(after).keys()
    for (name, a), b in zip(_flat(before).items(), _flat(after).values(), strict=True):
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            assert type(a) is type(b) and a == b, name


def test_examples_are_read_by_tfds_itself():
    import tensorflow_datasets as tfds

    from instantid_jax.data.builder import features

    example = features().deserialize_example_np(_serialised(_full()), decoders={"image": tfds.decode.SkipDecoding()})
    assert example["caption"].decode() == "ein Foto, mit Ümläut 漢字"
    assert example["keypoints"].shape == (5, 2) and example["embeddings"].shape == (16,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key": ""}, "key must be a non-empty string"),
        ({"size": (0, 4)}, "size must be"),
        ({"keypoints": np.zeros((4, 2), np.float32)}, r"keypoints must be finite floats \[5, 2\]"),
        ({"keypoints": np.full((5, 2), np.nan, np.float32)}, "keypoints must be finite"),
        ({"face_box": np.zeros(4, np.int32)}, "face_box"),
        ({"embeddings": np.zeros(8, np.float32)}, r"embeddings must be floats \[n, d\]"),
        ({"embeddings": np.full((1, 8), np.inf, np.float32)}, "embeddings must be finite"),
        ({"embedding_scale": 0.0}, "embedding_scale must be positive"),
        ({"image": b""}, "image must be given"),
        ({"landmarks": np.zeros((3, 3))}, "landmarks"),
        ({"latents": CachedLatents(np.zeros((2, 2, 4)), np.zeros((2, 2, 3)), View(1, 1, 0, 0, 1, 1))}, "latents must be mean and logvar"),
    ],
)
def test_a_bad_record_is_named(change, says):
    with pytest.raises(DataError, match=says) as caught:
        check_record(dataclasses.replace(record(7), **change))
    assert "record-00007" in str(caught.value) or "key" in change


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.float16).reshape(2, 3), np.zeros((0, 2), np.float32), np.array(3.0)])
def test_arrays_survive(array):
    back = decode_array(encode_array(array))
    assert back.dtype == array.dtype and back.shape == array.shape and np.array_equal(back, array)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_no_pickle_is_ever_read():
    with pytest.raises(DataError, match="a pickle, which is never read"):
        decode_array(pickle.dumps(_Bomb()))
    objects = np.empty(1, object)
    objects[0] = _Bomb()
    with pytest.raises(DataError, match="Python objects"):
        encode_array(objects)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, objects, version=(1, 0), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        decode_array(buffer.getvalue())


def test_damaged_bytes_are_refused():
    whole = encode_array(np.zeros((4, 4), np.float32))
    with pytest.raises(DataError, match="bytes where an array"):
        decode_array(whole[:-1])
    with pytest.raises(DataError, match="header is damaged"):
        decode_array(whole.replace(b"descr", b"xescr"))
    with pytest.raises(DataError, match="is not a tf"):
        parse_example(b"\xff\xff\xff")
    with pytest.raises(DataError, match="somewhere: the feature 'latent_mean' is missing"):
        parse_example(b"", "somewhere")
