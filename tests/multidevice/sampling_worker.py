"""Draws a batch with the small model, its weights spread over all processes, and writes what process 0 gets: OUT.npz."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from instantid_jax.defaults import DEFAULT_WEIGHTS
from instantid_jax.face import draw_kps
from instantid_jax.nn import placement
from instantid_jax.parallel.distributed import is_main, join
from instantid_jax.parallel.mesh import make_mesh
from instantid_jax.pipeline import InstantIDPipeline

jax.config.update("jax_default_matmul_precision", "highest")
placement.SMALL = 2
KPS = np.float32([[24, 24], [40, 24], [32, 34], [26, 44], [38, 44]])


def main(out, mesh=None, alone=True, watched=False):
    if not alone:
        join()
    pipe = InstantIDPipeline.from_pretrained(DEFAULT_WEIGHTS, mesh=None if mesh is None else make_mesh(**mesh))
    embedding = np.random.default_rng(0).standard_normal(pipe.config.resampler.embedding_dim).astype(np.float32) * 10
    call = {"image": draw_kps((64, 64), KPS), "image_embeds": embedding, "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5}
    words = {"prompt": ["a (smiling:1.3) man", "a woman"], "negative_prompt": "hat", "prompt_weighting": True}
    seen = []
    watch = {"on_step": seen.append} if watched else {}
    images = pipe(**words, **call, **watch, num_images_per_prompt=2, output_type="np").images
    if is_main():
        spread = [len(leaf.sharding.device_set) for leaf in jax.tree.leaves(pipe.parameters["unet"])]
        np.savez(out, images=images, devices=min(spread), seen=len(seen))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
