"""Batches: their form, the global order for any number of processes and any restart, and the rates of everything random."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instantid_jax.data.loader import LoaderConfig, make_loader
from instantid_jax.data.record import CachedText, DataError
from instantid_jax.data.sources import MemorySource, SameIdentity, identity_label
from tests.data.samples import encoded, photo, record, tokenizers

ROOT = Path(__file__).parents[2]


def take(source, config, steps, process=(0, 1), start=0):
    """The next `steps` batches of one process."""
    loader = make_loader(source, config, tokenizers(), *process, start)
    batches = [next(loader) for _ in range(steps)]
    loader.close()
    return batches


def equal(a, b):
    return a.keys() == b.keys() and all(x.dtype == y.dtype and np.array_equal(x, b[k]) for (k, x), y in zip(a.items(), b.values(), strict=True))


@pytest.fixture(scope="module")
def mixed():
    """41 photos of three shapes, people of three photos each."""
    return MemorySource([record(i, [(48, 64), (64, 48), (56, 56)][i % 3]) for i in range(41)])


@pytest.fixture(scope="module")
def latents():
    return MemorySource([record(i, cached=(64, 64)) for i in range(50)])


BUCKETS = ((32, 32), (24, 40), (40, 24))
CONFIG = LoaderConfig(seed=3, global_batch=8, buckets=BUCKETS, keypoint_scale=0.1, num_threads=2, drop_text=0.1, drop_identity=0.1, drop_both=0.1)


def test_a_batch_is_what_the_interface_says(mixed):
    config = dataclasses.replace(CONFIG, paired_reference=0.5, identity_caption=0.5)
    for batch in take(mixed, config, 6):
        h, w = batch["sizes"][0, 4:].astype(int)
        assert (h, w) in BUCKETS
        forms = {k: (v.shape, str(v.dtype)) for k, v in batch.items()}
        assert forms == {
            "image": ((8, h, w, 3), "uint8"),
            "keypoint_image": ((8, h, w, 3), "uint8"),
            "keypoints": ((8, 5, 2), "float32"),
            "face_box": ((8, 4), "float32"),
            "input_ids": ((8, 77), "int32"),
            "input_ids_2": ((8, 77), "int32"),
            "embedding": ((8, 8), "float32"),
            "sizes": ((8, 6), "float32"),
            "text_dropped": ((8,), "bool"),
            "identity_dropped": ((8,), "bool"),
            "index": ((8,), "int64"),
            "position": ((8,), "int64"),
        }
        assert (batch["sizes"][:, 4:] == (h, w)).all()
        for i, (height, width) in zip(batch["index"], batch["sizes"][:, :2], strict=True):
            assert mixed[i].size == (height, width)
        boxes = batch["face_box"]
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= w).all() and (boxes[:, 3] <= h).all()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_one_global_order(mixed, count):
    whole = take(mixed, CONFIG, 10)
    parts = [take(mixed, CONFIG, 10, (p, count)) for p in range(count)]
    for step, batch in enumerate(whole):
        joined = {k: np.concatenate([parts[p][step][k] for p in range(count)]) for k in batch}
        assert equal(batch, joined)
        assert batch["position"].tolist() == list(range(step * 8, step * 8 + 8))


@pytest.mark.parametrize("threads", [0, 3])
def test_a_process_may_have_rows_that_lie_apart(mixed, threads):
    config, rows = dataclasses.replace(CONFIG, num_threads=threads), np.asarray([1, 2, 6])
    loader = make_loader(mixed, config, tokenizers(), start_position=16, rows=rows)
    for batch in take(mixed, CONFIG, 5)[2:]:
        assert equal(next(loader), {k: v[rows] for k, v in batch.items()})
    loader.close()


@pytest.mark.parametrize("options", [{}, {"paired_reference": 0.7, "identity_caption": 0.5}, {"keypoint_style": "none"}])
def test_a_set_in_memory_gives_the_same_batches(latents, options):
    config = LoaderConfig(5, global_batch=8, resolution=64, cached_latents=True, drop_text=0.2, drop_identity=0.2, drop_both=0.2, **options)
    inside = dataclasses.replace(config, in_memory=True)
    for step, (a, b) in enumerate(zip(take(latents, config, 40, start=16), take(latents, inside, 40, start=16), strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"{step} {name}")
            assert a[name].dtype == b[name].dtype
    halves = [take(latents, inside, 3, (p, 2)) for p in range(2)]
    for step, batch in enumerate(take(latents, config, 3)):
        assert equal(batch, {k: np.concatenate([half[step][k] for half in halves]) for k in batch})


def test_only_latents_of_one_size_can_lie_in_memory():
    for options in ({}, {"cached_latents": True, "cached_text": True}, {"cached_latents": True, "buckets": BUCKETS}):
        with pytest.raises(DataError, match="in_memory needs cached_latents"):
            LoaderConfig(in_memory=True, **options)


@pytest.mark.parametrize("threads", [0, 3])
def test_a_restart_goes_on_where_it_stopped(mixed, threads):
    config = dataclasses.replace(CONFIG, num_threads=threads)
    whole = take(mixed, CONFIG, 12)
    first = make_loader(mixed, config, tokenizers())
    for step in range(5):
        assert equal(next(first), whole[step])
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    # The state of one process serves two, and the other way round.
    halves = [make_loader(mixed, config, tokenizers(), p, 2) for p in range(2)]
    for half in halves:
        next(half)  # has read ahead elsewhere
        half.set_state(state)
    for step in range(5, 9):
        pair = [next(half) for half in halves]
        assert equal({k: np.concatenate([pair[0][k], pair[1][k]]) for k in pair[0]}, whole[step])
    assert halves[0].get_state() == halves[1].get_state()
    again = make_loader(mixed, config, tokenizers())
    again.set_state(halves[1].get_state())
    assert again.position == 72
    for step in range(9, 12):
        assert equal(next(again), whole[step])
    assert equal(take(mixed, config, 1, start=88)[0], whole[11])
    for loader in (*halves, again):
        loader.close()


def test_a_state_of_another_order_is_refused(mixed):
    state = make_loader(mixed, CONFIG, tokenizers()).get_state()
    for change, name in (({"seed": 4}, "seed"), ({"global_batch": 4}, "global_batch"), ({"buckets": BUCKETS[:2]}, "sizes")):
        with pytest.raises(DataError, match=f"belongs to {name}="):
            make_loader(mixed, dataclasses.replace(CONFIG, **change), tokenizers()).set_state(state)
    with pytest.raises(DataError, match="belongs to records="):
        make_loader(MemorySource([mixed[0]]), CONFIG, tokenizers()).set_state(state)
    others = MemorySource([dataclasses.replace(mixed[i], identity=f"another {i}") for i in range(len(mixed))])
    with pytest.raises(DataError, match="belongs to contents="):
        make_loader(others, CONFIG, tokenizers()).set_state(state)


def test_seeds_and_epochs_shuffle_anew(latents):
    config = LoaderConfig(global_batch=10, resolution=64, cached_latents=True, keypoint_style="none", num_threads=0)
    rows = np.concatenate([b["index"] for b in take(latents, config, 10)]).reshape(2, 50)
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(50)) and (rows[0] != rows[1]).sum() > 40
    other = np.concatenate([b["index"] for b in take(latents, dataclasses.replace(config, seed=1), 5)])
    assert (other != rows[0]).sum() > 40


def test_drop_rates_are_exclusive_and_as_configured(latents):
    config = LoaderConfig(
        global_batch=100, resolution=64, cached_latents=True, keypoint_style="none", drop_text=0.05, drop_identity=0.15, drop_both=0.1, num_threads=0
    )
    batches = take(latents, config, 80)
    text, identity = (np.concatenate([b[k] for b in batches]) for k in ("text_dropped", "identity_dropped"))
    shares = [(text & ~identity).mean(), (~text & identity).mean(), (text & identity).mean()]
    np.testing.assert_allclose(shares, [0.05, 0.15, 0.1], atol=0.018)  # 8000 samples: four standard errors of 0.15
    for batch in batches[:5]:
        assert (batch["embedding"][batch["identity_dropped"]] == 0).all()
        kept = ~batch["identity_dropped"]
        assert (batch["embedding"][kept] == batch["index"][kept, None] + 1).all()
        empty = tokenizers()[0].encode([""])[0]
        assert (batch["input_ids"][batch["text_dropped"]] == empty).all()
        assert not (batch["input_ids"][~batch["text_dropped"]] == empty).all(axis=1).any()


def test_the_paper_drops_nothing(latents):
    batch = take(latents, LoaderConfig(global_batch=50, resolution=64, cached_latents=True, keypoint_style="none"), 1)[0]
    assert not batch["text_dropped"].any() and not batch["identity_dropped"].any()
    assert LoaderConfig().paired_reference == 0 and LoaderConfig().identity_caption == 0


def test_captions_come_with_identity_words_at_their_rate(latents):
    plain, wordy = (tokenizers()[1].encode([getattr(r, name) for r in latents._records]) for name in ("caption", "caption_identity"))
    for rate in (0.0, 0.3, 1.0):
        config = LoaderConfig(global_batch=100, resolution=64, cached_latents=True, keypoint_style="none", identity_caption=rate, num_threads=0)
        with_words = []
        for batch in take(latents, config, 30):
            words = (batch["input_ids_2"] == wordy[batch["index"]]).all(axis=1)
            assert ((batch["input_ids_2"] == plain[batch["index"]]).all(axis=1) | words).all()
            with_words.append(words.mean())
        assert abs(np.mean(with_words) - rate) < (0.034 if 0 < rate < 1 else 1e-9)
    without = MemorySource([dataclasses.replace(latents[0], caption_identity="")])
    batch = take(without, dataclasses.replace(config, global_batch=1), 1)[0]
    assert np.array_equal(batch["input_ids_2"], plain[:1])


def test_paired_references_are_other_photos_of_the_same_person(latents):
    config = LoaderConfig(global_batch=100, resolution=64, cached_latents=True, keypoint_style="none", paired_reference=0.4, num_threads=0)
    givers = [(int(i), int(e[0]) - 1) for b in take(latents, config, 60) for i, e in zip(b["index"], b["embedding"], strict=True)]
    assert all(i // 3 == giver // 3 for i, giver in givers)
    paired = np.mean([i != giver for i, giver in givers if i < 48])  # 48 and 49 are two photos of a person of two
    assert abs(paired - 0.4) < 0.03
    assert {giver for i, giver in givers if i == 4} == {3, 4, 5}


def test_paired_references_within_a_record():
    rows = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    lonely = record(0, cached=(64, 64), embeddings=rows, identity="", embedding_scale=2.0)
    config = LoaderConfig(global_batch=300, resolution=64, cached_latents=True, keypoint_style="none", paired_reference=1.0, num_threads=0)
    embeddings = take(MemorySource([lonely]), config, 1)[0]["embedding"]
    found, counts = np.unique(embeddings, axis=0, return_counts=True)
    assert np.array_equal(found, rows[1:] * 2) and counts.min() > 110
    single = dataclasses.replace(lonely, embeddings=rows[:1])
    assert (take(MemorySource([single]), config, 1)[0]["embedding"] == rows[0] * 2).all()  # there is no other photo


def test_same_identity_knows_the_others():
    names = ["b", "a", "", "b", "a", "b", ""]
    same = SameIdentity(np.array([identity_label(name) for name in names]))
    assert [same.others(i) for i in range(7)] == [2, 1, 0, 2, 1, 2, 0]
    assert [[same.other(i, r) for r in range(same.others(i))] for i in range(7)] == [[3, 5], [4], [], [0, 5], [1], [0, 3], []]


def test_keypoints_are_drawn_after_resizing():
    """Photos of 48, 96 and 480 pixels with the same face give the same keypoint picture: dots do not grow with the photo."""
    small = record(0, (48, 48))
    sources = []
    for factor in (1, 2, 10):
        side = 48 * factor
        box = tuple(int(v * factor) for v in small.face_box)
        image = encoded(photo([(box, 0)], (side, side)))
        keypoints, face_box = small.keypoints * factor, small.face_box * factor
        sources.append(dataclasses.replace(small, image=image, size=(side, side), keypoints=keypoints, face_box=face_box))
    config = LoaderConfig(global_batch=1, resolution=64, keypoint_scale=0.2, num_threads=0)
    pictures = [take(MemorySource([s]), config, 1)[0]["keypoint_image"][0].astype(int) for s in sources]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2 and np.abs(pictures[0] - pictures[2]).max() <= 2
    assert (pictures[0].max(axis=-1) > 100).sum() == pytest.approx(95, abs=25)  # five dots of 4 pixels and four limbs


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photos_are_trained_upright(orientation):
    """Whatever the EXIF orientation, the picture has the face's colour at the drawn keypoints."""
    upright = record(0)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    image = Image.open(io.BytesIO(upright.image))
    stored = image.transpose(turns[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = dataclasses.replace(upright, image=encoded(stored, "PNG", exif=exif))
    config = LoaderConfig(global_batch=1, resolution=40, num_threads=0, keypoint_style="none")
    a, b = (take(MemorySource([r]), config, 1)[0] for r in (upright, turned))
    assert equal(a, b)
    x, y = b["keypoints"][0, 2].astype(int)
    assert b["image"][0, y, x].tolist() == [200, 40, 40]


def test_keypoint_styles(latents):
    config = LoaderConfig(global_batch=4, resolution=64, cached_latents=True, keypoint_scale=0.2, num_threads=0)
    five = take(latents, config, 1)[0]
    assert five["keypoint_image"].shape == (4, 64, 64, 3)
    assert "keypoint_image" not in take(latents, dataclasses.replace(config, keypoint_style="none"), 1)[0]
    dense = dataclasses.replace(config, keypoint_style="dense")
    with pytest.raises(DataError, match="has no landmarks"):
        take(latents, dense, 1)
    marked = MemorySource([dataclasses.replace(r, landmarks=np.array([[2.0, 2.0]], np.float32)) for r in latents._records])
    more = take(marked, dense, 1)[0]
    assert np.array_equal(more["index"], five["index"]) and more["keypoint_image"][:, 2, 2].min() > 30
    assert np.array_equal(more["keypoint_image"][:, 8:], five["keypoint_image"][:, 8:])


def test_cached_latents_replace_pictures(latents):
    config = LoaderConfig(global_batch=4, resolution=64, cached_latents=True, keypoint_scale=0.2)
    batch = take(latents, config, 1)[0]
    assert "image" not in batch and batch["latent_mean"].shape == (4, 8, 8, 4) and batch["latent_logvar"].dtype == np.float32
    assert (batch["latent_mean"][:, 0, 0, 0] == batch["index"]).all() and (batch["latent_logvar"] == -batch["latent_mean"]).all()
    assert (batch["sizes"] == [48, 64, 0, 0, 64, 64]).all()
    with pytest.raises(DataError, match=r"50 of 50 records have other latents than of 32 x 32 pixels; the first, 0, has latents of 64 x 64"):
        make_loader(latents, dataclasses.replace(config, resolution=32), tokenizers())
    with pytest.raises(DataError, match="has no latents"):
        make_loader(MemorySource([record(0)]), config, tokenizers())


def test_cached_latents_fall_into_buckets():
    source = MemorySource([record(i, cached=[(64, 64), (32, 96)][i % 3 // 2]) for i in range(30)])
    config = LoaderConfig(global_batch=5, buckets=((64, 64), (32, 96)), cached_latents=True, keypoint_style="none", num_threads=0)
    shapes = [b["latent_mean"].shape for b in take(source, config, 12)]
    assert shapes.count((5, 8, 8, 4)) == 8 and shapes.count((5, 4, 12, 4)) == 4


def test_cached_text(latents):
    states = np.ones((7, 5), np.float16)
    source = MemorySource([dataclasses.replace(r, text=CachedText(states * i, states[0] * i)) for i, r in enumerate(latents._records)])
    config = LoaderConfig(global_batch=50, resolution=64, cached_latents=True, cached_text=True, keypoint_style="none", drop_text=0.5, num_threads=0)
    batch = take(source, config, 1)[0]
    assert batch["text_states"].shape == (50, 7, 5) and batch["text_states"].dtype == np.float32 and batch["text_pooled"].shape == (50, 5)
    assert (batch["text_pooled"][:, 0] == np.where(batch["text_dropped"], 0, batch["index"])).all() and batch["text_dropped"].any()
    with pytest.raises(DataError, match="no cached text"):
        take(latents, config, 1)


def test_equal_captions_are_tokenised_once(latents):
    same = MemorySource([dataclasses.replace(r, caption="one caption") for r in latents._records])
    pair = tokenizers()
    loader = make_loader(same, LoaderConfig(global_batch=25, resolution=64, cached_latents=True, keypoint_style="none", num_threads=0), pair)
    for _ in range(4):
        next(loader)
    loader.close()
    assert [t.calls for t in pair] == [1, 1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"drop_text": 1.5}, "^LoaderConfig: drop_text must be between 0 and 1, got 1.5$"),
        ({"drop_text": 0.5, "drop_identity": 0.4, "drop_both": 0.2}, "sum to at most 1"),
        ({"keypoint_style": "six"}, "five, dense, none"),
        ({"global_batch": 0}, "^LoaderConfig: global_batch must be at least 1, got 0$"),
        ({"resolution": 7}, "^LoaderConfig: resolution must be at least 8, got 7$"),
        ({"keypoint_scale": 0.0}, "^LoaderConfig: keypoint_scale must be above 0 and finite, got 0.0$"),
        ({"keypoint_scale": float("nan")}, "^LoaderConfig: keypoint_scale must be above 0 and finite, got nan$"),
        ({"num_threads": -1}, "^LoaderConfig: num_threads must be at least 0, got -1$"),
        ({"prefetch": -1}, "^LoaderConfig: prefetch must be at least 0, got -1$"),
        ({"cached_text": True, "identity_caption": 0.5}, "plain caption"),
    ],
)
def test_configurations_that_make_no_sense(change, says):
    with pytest.raises(DataError, match=says):
        LoaderConfig(**change)


def test_arguments_that_make_no_sense(mixed):
    for index in (2, -1):
        with pytest.raises(DataError, match=f"^process_index must be at least 0 and below the 2 processes, got {index}$"):
            make_loader(mixed, CONFIG, tokenizers(), index, 2)
    with pytest.raises(DataError, match=r"^global_batch must be a multiple of the 3 processes, got 8$"):
        make_loader(mixed, CONFIG, tokenizers(), 0, 3)
    with pytest.raises(DataError, match=r"^start_position must be a multiple of the global batch of 8 and at least 0, got 4$"):
        make_loader(mixed, CONFIG, tokenizers(), start_position=4)
    with pytest.raises(DataError, match="no record"):
        make_loader(MemorySource([]), CONFIG, tokenizers())


def test_records_of_two_analyzers_are_refused(latents):
    two = MemorySource([latents[0], dataclasses.replace(latents[1], embeddings=np.ones((1, 5), np.float32), embedder="other")])
    with pytest.raises(DataError, match="made with one face analyzer"):
        take(two, LoaderConfig(global_batch=2, resolution=64, cached_latents=True, keypoint_style="none", num_threads=0), 1)


def test_an_error_in_a_thread_reaches_the_caller(latents):
    broken = MemorySource([dataclasses.replace(r, latents=None, image=b"broken") for r in latents._records])
    loader = make_loader(broken, LoaderConfig(global_batch=2, resolution=64), tokenizers())
    with pytest.raises(ValueError, match="record-000"):
        next(loader)
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_training_never_imports_tensorflow(tmp_path):
    code = (
        "import sys; from tests.data.test_loader import *; "
        "source = MemorySource([record(i, cached=(64, 64)) for i in range(4)]); "
        "from instantid_jax.data.builder import write_dataset; from instantid_jax.data.sources import open_source\n"
        "class Job:\n    def records(self): return {'train': [source[i] for i in range(4)]}\n"
        f"write_dataset(Job(), {str(tmp_path)!r}); opened = open_source({str(tmp_path)!r})\n"
        "config = LoaderConfig(global_batch=2, resolution=64, cached_latents=True, keypoint_scale=0.2)\n"
        "batch = take(opened, config, 3)[-1]; assert batch['latent_mean'].shape == (2, 8, 8, 4)\n"
        "print('loaded:', *({'tensorflow', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("loaded:")[1].split() == []
