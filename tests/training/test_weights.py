"""The weights that a run leaves, and where the next one finds them."""

import dataclasses
import json

import numpy as np
import pytest
import small
from safetensors.numpy import save_file

from instantid_jax.checkpoint import load_weights, save_weights, stored_networks
from instantid_jax.config import ModelConfig, from_json, to_json
from instantid_jax.paths import flatten
from instantid_jax.training import weights as module
from instantid_jax.training.config import InitConfig, StageConfig
from instantid_jax.training.loop import Run, train
from instantid_jax.training.networks import training_networks
from instantid_jax.training.state import InitError
from instantid_jax.training.weights import export_weights, saved_model, tokenizers_for


@pytest.fixture
def given(tmp_path):
    """(networks, their weights, a folder with tokenizers, a base that has a network of its own)"""
    config = small.quick("unused", "unused")
    networks = {name: network for name, network in training_networks(config).items() if name == "recognizer"}
    parameters = {name: small.draw(network.abstract) for name, network in networks.items()}
    tokenizers_for(config.model, InitConfig(), tmp_path)
    save_weights(tmp_path / "base" / "other", {"x": np.ones(2, np.float32)})
    return networks, parameters, tmp_path, InitConfig(weights=str(tmp_path / "base"))


def test_what_is_written_is_what_was_trained_and_the_rest_is_copied(given):
    networks, parameters, folder, init = given
    for number in (1.0, 2.0):  # the second time there is something to replace
        parameters["recognizer"]["proj_out"]["bias"][:] = number
        export_weights(folder / "weights", small.model(), networks, parameters, init, folder)
        found = load_weights(folder / "weights" / "recognizer")
        assert all(np.array_equal(found[path], leaf) for path, leaf in networks["recognizer"].to_disk(parameters["recognizer"]).items())
        assert np.array_equal(load_weights(folder / "weights" / "other")["x"], [1, 1])
        assert saved_model(folder / "weights") == small.model()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".weights")]


def test_networks_of_a_single_file_are_not_lost(given):
    networks, parameters, folder, _ = given
    base = folder / "shipped"
    base.mkdir()
    save_file({"other/x": np.ones(2, np.float16), "recognizer/y": np.zeros(1, np.float16)}, base / "weights.safetensors")
    export_weights(folder / "weights", small.model(), networks, parameters, InitConfig(weights=str(base)), folder)
    assert stored_networks(base) == stored_networks(folder / "weights") == ["other", "recognizer"]
    assert np.array_equal(load_weights(folder / "weights" / "other")["x"], [1, 1])
    assert "y" not in load_weights(folder / "weights" / "recognizer")


def test_a_failure_leaves_what_was_there(given, monkeypatch):
    networks, parameters, folder, init = given
    export_weights(folder / "weights", small.model(), networks, parameters, init, folder)
    before = load_weights(folder / "weights" / "recognizer")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(module, "save_weights", fail)
    with pytest.raises(OSError, match="no space left"):
        export_weights(folder / "weights", small.model(), networks, parameters, init, folder)
    after = load_weights(folder / "weights" / "recognizer")
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_tokenizers_come_from_the_starting_weights(tmp_path):
    model = small.model()
    tokenizers_for(model, InitConfig(), tmp_path / "base")
    first, second = tokenizers_for(model, InitConfig(weights=str(tmp_path / "base")), tmp_path / "run")
    for name in ("tokenizer", "tokenizer_2"):
        files = {f.name: f.read_bytes() for f in (tmp_path / "base" / name).iterdir()}
        assert {f.name: f.read_bytes() for f in (tmp_path / "run" / name).iterdir()} == files
    ids = np.asarray(first.encode(["a person"]))
    assert ids.shape == (1, 77) and ids.max() < 514 and np.array_equal(ids[0, :2], np.asarray(second.encode(["a person"]))[0, :2])


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(InitError, match=r"holds no weights \(no config.json\): run the recipe that makes them first"):
        saved_model(tmp_path)


@pytest.mark.slow
def test_an_autoencoder_is_trained_by_the_same_step_and_leaves_normalised_latents(tmp_path):
    pictures = small.source(16, latents=False)
    config = small.changed(
        small.recipe(tmp_path / "run"),
        stage=StageConfig(objective="reconstruct", trainable=(r"^vae/",)),
        init=InitConfig(from_base=(), random=("vae",), latent_logvar=-6.0),
        loader__cached_latents=False,
        loader__keypoint_style="none",
        validation__every=2,
        validation__samples_every=4,
        loss__crop=8,
    )
    run = Run(config, source=pictures, validation=pictures)
    assert train(run) == 0
    made = from_json(ModelConfig, (tmp_path / "run/weights/config.json").read_text())
    assert made.vae.scaling_factor == 1 and made.vae.latents_mean is not None and len(made.vae.latents_mean) == 4
    assert made == dataclasses.replace(config.model, vae=made.vae) and to_json(made) != to_json(config.model)
    average = flatten(run.state.ema["vae"])
    assert all(
        np.array_equal(average[path], leaf)
        for path, leaf in flatten(run.networks["vae"].from_disk(load_weights(tmp_path / "run/weights/vae"))).items()
    )
    assert len(list((tmp_path / "run/samples").iterdir())) == 1
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [2, 4]


@pytest.mark.slow
def test_a_base_is_trained_by_the_same_step(tmp_path, source, all_weights):
    stage = StageConfig(identitynet=False, adapter=False, trainable=(r"^unet/", r"^text_encoder/", r"^text_encoder_2/"))
    config = small.recipe(tmp_path / "run", all_weights, stage=stage, init=InitConfig(str(all_weights), from_base=(), random=()), steps=2)
    run = Run(config, source=source)
    before = {path: np.asarray(leaf) for path, leaf in flatten(run.state.parameters).items()}
    assert train(run) == 0
    same = {path for path, leaf in flatten(run.state.parameters).items() if np.array_equal(leaf, before[path])}
    assert {path.split("/")[0] for path in before} == {"unet", "text_encoder", "text_encoder_2"}
    # The towers' last layers are read by nobody: SDXL takes the states before them.
    assert not [path for path in same if not path.startswith("text_encoder")]
