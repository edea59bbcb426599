"""The real objective on the smallest real networks: what learns, what stays, precision, recomputation, planning, samples."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from instantid_jax.config import ComputeConfig
from instantid_jax.parallel.flops import count_flops
from instantid_jax.parallel.mesh import make_mesh
from instantid_jax.paths import flatten
from instantid_jax.running import EXIT_INTERRUPTED
from instantid_jax.training.loop import Run, train
from instantid_jax.training.objectives import draw, per_sample
from instantid_jax.training.plan import dry_run
from instantid_jax.training.program import Program
from instantid_jax.training.samples import sample_grid
from instantid_jax.training.state import merge, split


@pytest.fixture(scope="module")
def config(all_weights):
    return small.recipe("unused", all_weights, steps=4)


@pytest.fixture(scope="module")
def instantid(config):
    """Its compiled side."""
    return Program(config, make_mesh())


@pytest.fixture
def make(config, instantid, source, tmp_path):
    def make(out, **fields):
        return Run(small.changed(config, out=str(tmp_path / out), **fields), source=source, validation=source, program=instantid)

    return make


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(tree).items()}


def test_it_learns_everything_that_it_should_and_nothing_else(make, capsys):
    run = make("run", validation__every=2)
    before, frozen = bits(run.state.parameters), bits(run.frozen)
    assert {path.split("/")[0] for path in before} == {"identitynet", "adapter", "resampler"}
    assert {path.split("/")[0] for path in frozen} == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert train(run) == 0
    after = bits(run.state.parameters)
    assert [path for path in after if after[path] == before[path]] == []
    assert bits(run.frozen) == frozen
    moments = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(run.state.optimizer)}
    assert not any("/unet/" in path or "/vae/" in path for path in moments)
    told = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert {"loss", "wrong_person_gap", "wrong_pose_gap"} <= next(row for row in told if row["kind"] == "validation").keys()
    exported = {p.name for p in (run.out / "weights").iterdir() if p.is_dir()}
    assert exported == {*run.networks, "recognizer", "tokenizer", "tokenizer_2"}


def test_stopping_and_going_on_changes_no_bit(make):
    whole = make("whole")
    assert train(whole) == 0
    stopping, run = [], make("part")
    plain = run.global_batch

    def stop_at_once(batch):
        stopping.append(15)
        return plain(batch)

    run.global_batch = stop_at_once
    assert train(run, stopping=stopping) == EXIT_INTERRUPTED
    last = make("part")
    assert train(last) == 0
    assert int(last.state.step) == 4
    for name in ("parameters", "ema"):
        assert bits(getattr(last.state, name)) == bits(getattr(whole.state, name))
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b), last.state.optimizer, whole.state.optimizer)
    assert all(jax.tree.leaves(equal))


def gradient(config, source, **fields):
    """(loss, gradient, program) of one batch from the tests' weights."""
    config = small.changed(config, **fields)
    program = Program(config, make_mesh())
    weights = {name: small.draw(network.abstract, n) for n, (name, network) in enumerate(program.networks.items())}
    trained, frozen = split(weights, config.stage)
    frozen = program.stored(jax.tree.map(jnp.asarray, frozen))
    run = Run(config, source=source, program=program)
    batch = run.global_batch(next(run.loader))
    run.loader.close()

    def loss(trained, frozen, batch):
        return per_sample(program.objective, merge(trained, frozen), batch, draw(program.objective, jax.random.key(0), batch)).loss.mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(trained, frozen, batch)
    return value, grads, program


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dots", "blocks", "offload", "full"])
def test_recomputing_gives_the_same_numbers(policy, config, source, tmp_path):
    value, plain, _ = gradient(config, source, out=str(tmp_path / "a"))
    again, grads, _ = gradient(config, source, out=str(tmp_path / "b"), compute=ComputeConfig(remat=policy))
    np.testing.assert_allclose(again, value, rtol=1e-6)
    for path, leaf in flatten(plain).items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(flatten(grads)[path], leaf, rtol=1e-4, atol=1e-5 * scale, err_msg=path)


@pytest.mark.slow
def test_half_precision_keeps_float32_masters(config, source, tmp_path):
    value, _, _ = gradient(config, source, out=str(tmp_path / "a"))
    fields = {"compute": ComputeConfig(dtype="bfloat16"), "frozen_dtype": "bfloat16", "out": str(tmp_path / "b")}
    half, grads, _ = gradient(config, source, **fields)
    assert half != value and abs(half / value - 1) < 0.02
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_types_of_what_is_stored(config):
    fields = {"compute": ComputeConfig(dtype="bfloat16"), "frozen_dtype": "bfloat16"}
    program = Program(small.changed(config, **fields), make_mesh())
    state, frozen = program.abstract_state, flatten(program.abstract_frozen)
    assert {x.dtype for x in jax.tree.leaves((state.parameters, state.ema))} == {jnp.dtype("float32")}
    assert {str(x.dtype) for x in jax.tree.leaves(state.optimizer)} == {"float32", "int32"}
    assert {path.split("/")[0]: str(x.dtype) for path, x in frozen.items()} == {
        "unet": "bfloat16",
        "text_encoder": "bfloat16",
        "text_encoder_2": "bfloat16",
        "vae": "float32",
    }


def test_recomputing_costs_operations(config):
    def operations(policy):
        program = Program(small.changed(config, compute=ComputeConfig(remat=policy)), make_mesh())
        traced = program.step.trace(program.abstract_state, program.abstract_frozen, program.abstract_batch(), np.float32(np.inf))
        return count_flops(traced.jaxpr)

    found = [operations(policy) for policy in ("none", "dots", "blocks", "full")]
    assert found == sorted(found) and len(set(found)) == 4


@pytest.mark.slow
def test_accumulated_parts_are_the_large_batch(config, source, all_weights, tmp_path):
    states = []
    for parts in (1, 4):
        fields = {"out": str(tmp_path / str(parts)), "optimizer__accumulate": parts, "steps": 1, "optimizer__eps": 1e-3}
        run = Run(small.changed(config, **fields), source=source)
        train(run)
        states.append(run.state)
    for path, leaf in flatten(states[0].parameters).items():
        np.testing.assert_allclose(flatten(states[1].parameters)[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_a_grid_of_samples(all_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "SIDE", 64)
    people = small.source(8)
    config = small.recipe(tmp_path / "run", all_weights, steps=1, validation__samples_every=1, validation__samples=3)
    run = Run(config, source=people, validation=people)
    picture = sample_grid(run)
    assert picture.size == (3 * 64, 3 * 64)  # people, keypoints, pictures
    assert all(np.asarray(picture)[row * 64 : (row + 1) * 64].std() > 1 for row in range(3))
    assert np.array_equal(np.asarray(sample_grid(run)), np.asarray(picture))
    run.loader.close()


def test_the_plan_needs_no_data_and_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = dry_run(small.quick("runs/x", "nowhere"))
    lines = text.splitlines()
    assert lines[0].startswith("step of recognize: batch 8 on 1 x ") and lines[1].startswith("compiled in ")
    trained = sum(x.size for x in jax.tree.leaves(Program(small.quick("x", "x"), make_mesh()).abstract_state.parameters))
    assert lines[2].startswith(f"parameters: {trained:,} trained, ")
    assert float(lines[3].rsplit(" ", 1)[1]) > 1e5
    assert "memory a device: arguments " in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_s_batch_is_the_loader_s(make, config):
    for fields in ({}, {"loader__keypoint_style": "none"}):
        run = make("shapes", **fields)
        batch = run.global_batch(next(run.loader))
        run.loader.close()
        wanted = Program(run.config, make_mesh()).abstract_batch()
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {name: (x.shape, x.dtype) for name, x in wanted.items()}


def test_another_recogniser_s_embeddings_are_refused(config, source, tmp_path, all_weights):
    model = dataclasses.replace(config.model, resampler=dataclasses.replace(config.model.resampler, embedding_dim=32))
    with pytest.raises(ValueError, match=r"embeddings of 16 values by 'opencv', but the model takes 32"):
        Run(small.changed(config, model=model, out=str(tmp_path)), source=source)
