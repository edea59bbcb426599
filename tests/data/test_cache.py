"""Encoder output in records: what the autoencoder and the text encoders give, for the view that the record says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.checkpoint import save_weights
from instantid_jax.config import tiny, to_json
from instantid_jax.data.cache import CacheConfig, CacheJob, LatentEncoder, cache, load_encoders
from instantid_jax.data.loader import LoaderConfig, make_loader
from instantid_jax.data.record import DataError
from instantid_jax.data.sources import MemorySource, open_source
from instantid_jax.data.transforms import decode_photo, render_view
from instantid_jax.models import build_networks
from instantid_jax.paths import map_paths
from instantid_jax.text import Tokenizer, write_default_tokenizers
from tests.data.samples import record, tokenizers

SIZES = ((32, 32), (24, 40))


def small():
    """The real architecture with next to no layers; this suite is not about networks."""
    config = tiny()
    vae = dataclasses.replace(config.vae, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    towers = (dataclasses.replace(tower, num_hidden_layers=2) for tower in (config.text_encoder, config.text_encoder_2))
    return dataclasses.replace(config, vae=vae, text_encoder=next(towers), text_encoder_2=next(towers))


@pytest.fixture(scope="module")
def networks():
    return build_networks(small())


def random_weights(network, seed):
    rng = np.random.default_rng(seed)
    return map_paths(lambda _, leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.2), network.abstract)


@pytest.fixture(scope="module")
def weights(networks, tmp_path_factory):
    """A weights folder with what caching needs."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "config.json").write_text(to_json(small()))
    write_default_tokenizers(folder)
    for i, name in enumerate(("vae", "text_encoder", "text_encoder_2")):
        save_weights(folder / name, networks[name].to_disk(random_weights(networks[name], i)))
    return folder


@pytest.fixture(scope="module")
def encoders(weights):
    return load_encoders(weights, text=True)


@pytest.fixture(scope="module")
def source():
    return MemorySource([record(i, [(48, 48), (48, 80)][i % 2]) for i in range(7)])


def test_records_with_latents_and_text(weights, networks, encoders, source, tmp_path):
    latents, text = encoders
    folder = cache({"train": source}, str(tmp_path), CacheConfig(SIZES, batch=3, keep_images=False), latents, text)
    cached = open_source(folder)
    assert len(cached) == 7 and cached.index.view.tolist() == [list(SIZES[cached[i].size[1] == 80]) for i in range(7)]
    towers = [(networks[name], random_weights(networks[name], i)) for i, name in ((1, "text_encoder"), (2, "text_encoder_2"))]
    pair = [Tokenizer.from_directory(weights / name) for name in ("tokenizer", "tokenizer_2")]
    encode = jax.jit(lambda parameters, x: networks["vae"].bind(parameters).encode(x))
    run = jax.jit(lambda network, parameters, ids: network.bind(parameters)(ids), static_argnums=0)
    for i in range(7):
        r = cached[i]
        original = source[int(r.key[-5:])]
        assert r.image == b"" and r.caption == original.caption and np.array_equal(r.embeddings, original.embeddings)
        assert r.latents is not None and r.latents.encoder == latents.name and len(latents.name) == 16
        pixels = render_view(decode_photo(original.image, r.key), original.size, r.latents.view)
        expected = encode(random_weights(networks["vae"], 0), jnp.asarray(pixels[None], jnp.float32) / 127.5 - 1)
        np.testing.assert_allclose(r.latents.mean, expected.mean[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(r.latents.logvar, expected.logvar[0], rtol=1e-4, atol=1e-4)
        assert r.text is not None and r.text.states.shape == (77, 80) and np.abs(r.text.states).max() > 0.1
        outputs = [run(n, p, jnp.asarray(t.encode([r.caption]))) for (n, p), t in zip(towers, pair, strict=True)]
        np.testing.assert_allclose(r.text.states, np.concatenate([o.hidden[-2][0] for o in outputs], axis=-1), atol=1e-4)
        np.testing.assert_allclose(r.text.pooled, outputs[1].pooled[0], atol=1e-4)


def test_the_loader_gives_them(encoders, source, tmp_path):
    latents = encoders[0]
    cache({"train": source}, str(tmp_path), CacheConfig(SIZES, batch=4, dtype="float16"), latents)
    config = LoaderConfig(global_batch=2, buckets=SIZES, cached_latents=True, keypoint_scale=0.1, num_threads=0)
    loader = make_loader(open_source(tmp_path), config, tokenizers())
    shapes = set()
    for batch in (next(loader) for _ in range(6)):
        h, w = batch["sizes"][0, 4:].astype(int)
        shapes.add((h, w))
        assert batch["latent_mean"].shape == (2, h // 8, w // 8, 4) and batch["keypoint_image"].shape == (2, h, w, 3)
        assert batch["latent_mean"].dtype == np.float32 and np.abs(batch["latent_mean"]).max() > 0
    assert shapes == set(SIZES)
    assert open_source(tmp_path)[0].image and open_source(tmp_path)[0].latents.mean.dtype == np.float16


def test_parts_join_to_the_whole(encoders, source, tmp_path):
    latents = encoders[0]
    keys = set()
    for number in range(3):
        folder = cache({"train": source}, str(tmp_path / f"{number}"), CacheConfig(SIZES[:1], part=(number, 3), random_crop=True), latents)
        keys |= {open_source(folder)[i].key for i in range(len(open_source(folder)))}
    joined = open_source([tmp_path / f"{number}" for number in range(3)])
    assert len(joined) == 7 and keys == {source[i].key for i in range(7)}
    assert {joined[i].latents.view.left for i in range(7)} - {0}


def test_errors(encoders, source, tmp_path):
    with pytest.raises(DataError, match="is not a folder of converted weights"):
        load_encoders(tmp_path, text=False)
    with pytest.raises(DataError, match="part 2 of 2"):
        CacheConfig(SIZES, part=(2, 2))
    latents = encoders[0]
    without = MemorySource([record(0, cached=(32, 32))])
    with pytest.raises(DataError, match="has no photo to encode"):
        list(CacheJob({"train": without}, CacheConfig(SIZES), latents).records()["train"])
    with pytest.raises(DataError, match="not cached on Beam"):
        CacheJob({"train": source}, CacheConfig(SIZES), latents).beam_records(None)


def test_the_encoder_compiles_once_for_a_size(networks):
    encoder = LatentEncoder(networks["vae"], random_weights(networks["vae"], 0))
    job = CacheJob({"train": MemorySource([record(i) for i in range(7)])}, CacheConfig(SIZES[:1], batch=4), encoder)
    assert len(list(job.records()["train"])) == 7 and encoder._encode._cache_size() == 1
