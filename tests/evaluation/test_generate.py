"""Batches of different people: each row is what the pipeline draws for that person alone, and nothing is drawn twice."""

import copy
import dataclasses

import numpy as np
import pytest

from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.evaluation.generate import Job, Painter, Sampling
from instantid_jax.evaluation.store import Store

KEYPOINTS = np.array([[24, 32], [40, 32], [32, 38], [27, 44], [37, 44]], np.float32)
SAMPLING = Sampling(size=64, steps=2, guidance_scale=3.0, keypoint_scale=0.2)


def job(number, **changes):
    embedding = np.random.default_rng(number).normal(size=128).astype(np.float32)
    plain = Job(f"photo of person {number}", embedding, KEYPOINTS + number, 11 * number, 0.7, 0.4)
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def painter(pipe, tmp_path):
    return Painter(pipe, SAMPLING, Store(tmp_path), batch=3)


@pytest.mark.slow
def test_a_row_is_the_pipelines_picture(pipe, painter):
    jobs = [job(0), job(1)]
    pictures = painter.paint(jobs)
    assert pictures.shape == (2, 64, 64, 3) and pictures.dtype == np.uint8 and pictures.std() > 10
    one = jobs[1]
    drawn = draw_keypoints((64, 64), one.keypoints, SAMPLING.keypoint_scale)
    strengths = {"controlnet_conditioning_scale": one.identitynet, "ip_adapter_scale": one.adapter}
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": one.seed, "output_type": "np"}
    alone = np.round(pipe(one.prompt, drawn, one.embedding, **strengths, **options).images[0] * 255)
    difference = np.abs(alone - pictures[1])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_nothing_is_drawn_twice(painter, monkeypatch):
    drawn = []

    def fake(jobs):
        drawn.append([j.prompt for j in jobs])
        return np.stack([np.full((64, 64, 3), j.seed, np.uint8) for j in jobs])

    monkeypatch.setattr(painter, "_draw", fake)
    four = [job(i) for i in range(4)]
    pictures = painter.paint([*four, job(5, adapter=0.0), four[0]])
    assert pictures[:, 0, 0, 0].tolist() == [0, 11, 22, 33, 55, 0]
    assert [len(batch) for batch in drawn] == [3, 1, 1]  # at most three at once, and of one pair of strengths
    painter.paint(four)
    assert len(drawn) == 3
    again = Painter(painter.pipe, SAMPLING, painter.store, batch=2)
    assert again.paint([four[3]])[0, 0, 0, 0] == 33


def test_everything_decides_a_picture(pipe, painter):
    base = job(1)
    changes = ({"prompt": "x"}, {"seed": 1}, {"identitynet": 0.1}, {"adapter": 0.1}, {"embedding": base.embedding * 2}, {"keypoints": KEYPOINTS})
    keys = {painter.key(base), *(painter.key(dataclasses.replace(base, **change)) for change in changes)}
    for change in ({"steps": 3}, {"guidance_scale": 1.0}, {"sampler": "ddim"}, {"keypoint_scale": 1.0}, {"size": 128}):
        keys.add(Painter(pipe, dataclasses.replace(SAMPLING, **change), painter.store).key(base))
    other = copy.copy(pipe)
    other.parameters = pipe.parameters | {"adapter": pipe.parameters["unet"]}
    keys.add(Painter(other, SAMPLING, painter.store).key(base))
    assert len(keys) == 1 + len(changes) + 5 + 1
    assert Painter(pipe, SAMPLING, painter.store, batch=9).key(base) == painter.key(base)
