"""The cache: what was put comes back, what is damaged counts as absent, and what decides a value is in its key."""

import numpy as np

from instantid_jax.evaluation.store import Store, digest, digest_tree


def test_round_trip(tmp_path):
    store, key = Store(tmp_path), digest("a")
    assert store.get(key) is None
    store.put(key, {"image": np.arange(6, dtype=np.uint8).reshape(2, 3), "found": np.bool_(True), "names": np.array(["x", "yy"])})
    kept = Store(tmp_path).get(key)
    assert kept is not None
    np.testing.assert_array_equal(kept["image"], [[0, 1, 2], [3, 4, 5]])
    assert kept["image"].dtype == np.uint8 and bool(kept["found"]) and kept["names"].tolist() == ["x", "yy"]
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".npz"]


def test_a_damaged_file_counts_as_absent(tmp_path):
    store, key = Store(tmp_path), digest("a")
    store.put(key, {"x": np.zeros(100)})
    file = next(tmp_path.rglob("*.npz"))
    for data in (b"", b"no archive", file.read_bytes()[:200]):
        file.write_bytes(data)
        assert store.get(key) is None
    store.put(key, {"x": np.ones(2)})
    assert store.get(key)["x"].tolist() == [1, 1]


def test_no_folder_keeps_nothing():
    Store(None).put("k", {"x": np.zeros(1)})
    assert Store(None).get("k") is None


def test_everything_decides_a_key():
    base = np.zeros((2, 3), np.float32)
    keys = {
        digest("a", base),
        digest("b", base),
        digest("a", base.T),
        digest("a", base.astype(np.float64)),
        digest("a", base + 1),
        digest("a", [1, 2.0]),
        digest("a", [1, 2.5]),
        digest("a", "12"),
        digest("a1", "2"),
    }
    assert len(keys) == 9
    assert digest("a", {"x": 1, "y": 2}) == digest("a", {"y": 2, "x": 1})


def test_weights_are_told_apart():
    tree = {"a": {"w": np.zeros(3, np.float32)}, "b": np.float32(1)}
    assert digest_tree(tree) == digest_tree({"b": np.float32(1), "a": {"w": np.zeros(3, np.float32)}})
    assert digest_tree(tree) != digest_tree({"a": {"v": np.zeros(3, np.float32)}, "b": np.float32(1)})
    assert digest_tree(tree) != digest_tree({"a": {"w": np.zeros(3, np.float32)}, "b": np.float32(2)})
