"""Memory of SDXL with IdentityNet, from shapes alone: what tiles save in the autoencoder, and bytes of weights; and what tiles cost.

python benchmarks/memory.py vae         working memory of the decoder, as XLA plans it for the present backend
python benchmarks/memory.py tiles       the small model's autoencoder on a photo of 320 x 256 pixels, by tiles against whole
python benchmarks/memory.py weights     bytes of every network by type of its weights, and what is left of a chip's memory
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instantid_jax.config import ComputeConfig, sdxl
from instantid_jax.defaults import default_pipeline
from instantid_jax.denoise import decode
from instantid_jax.models import Network, build_networks
from instantid_jax.models.tiling import Tiling, decode_tiled, encode_tiled

GIB = 2**30
PHOTO = Path(__file__).resolve().parents[1] / "instantid_jax/assets/astronaut.jpg"


def working(network: Network, side: int, tiling: Tiling | None) -> float:
    """GiB beside weights, latents and the picture."""
    latents = jax.ShapeDtypeStruct((1, side // 8, side // 8, 4), jnp.float32)
    analysis = decode.lower(network, network.abstract, latents, tiling).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes / GIB


def vae() -> None:
    """The decoder's table."""
    network = build_networks(sdxl())["vae"]
    cases = [(1024, None), (2048, None)]
    cases += [(side, Tiling(layout, tile)) for side, tile in ((2048, 1024), (1024, 512), (2048, 512)) for layout in ("even", "diffusers")]
    print(f"float32, one picture, {jax.devices()[0].platform}\n\n| pixels | tiles | GiB |\n| --- | --- | --- |", flush=True)
    for side, tiling in cases:
        how = "none" if tiling is None else f"{tiling.layout}, {tiling.size}"
        print(f"| {side} | {how} | {working(network, side, tiling):.2f} |", flush=True)


def tiles() -> None:
    """How far tiles are from the whole: of the decoded picture, and of the mean of the encoded one, by its standard deviation."""
    pipeline = default_pipeline()
    vae = pipeline.networks["vae"].bind(pipeline.parameters["vae"])
    with Image.open(PHOTO) as photo:
        pixels = np.asarray(photo.convert("RGB").resize((256, 320)), np.float32)
    image = jnp.asarray(pixels / 127.5 - 1)[None]
    encoded = vae.encode(image).mean
    decoded = vae.decode(encoded)
    print("| tiles | decoder, PSNR | decoder, rms | encoder, rms |\n| --- | --- | --- | --- |")
    for side in (128, 64):
        for layout in ("even", "diffusers"):
            tiling = Tiling(layout, side)
            apart = float(jnp.sqrt(jnp.mean((decode_tiled(vae, encoded, tiling) - decoded) ** 2)))
            of_encoder = float(jnp.sqrt(jnp.mean((encode_tiled(vae, image, tiling).mean - encoded) ** 2)) / jnp.std(encoded))
            print(f"| {layout}, {side} | {20 * np.log10(2 / apart):.1f} dB | {apart / float(jnp.std(decoded)):.3f} | {of_encoder:.3f} |")


def size(network: Network, dtype: str) -> int:
    """Bytes of weights: `dtype`, or 8-bit kernels with float32 scales and bfloat16 for the rest."""
    int8 = dtype == "int8"
    leaves = jax.tree_util.tree_leaves_with_path(Network(network.make, network.config, network.compute, int8).abstract)
    total = 0
    for path, leaf in leaves:
        kept = leaf.dtype == jnp.int8 or "kernel_scale" in jax.tree_util.keystr(path)
        total += leaf.size * (leaf.dtype.itemsize if kept else jnp.dtype("bfloat16" if int8 else dtype).itemsize)
    return total


def weights() -> None:
    """The table of weights."""
    networks = build_networks(sdxl(), ComputeConfig(dtype="bfloat16"))
    print("| network | float32 | bfloat16 | int8 |\n| --- | --- | --- | --- |")
    totals = dict.fromkeys(("float32", "bfloat16", "int8"), 0)
    for name, network in networks.items():
        rounded = name in ("unet", "identitynet")
        bytes_of = {dtype: size(network, "bfloat16" if dtype == "int8" and not rounded else dtype) for dtype in totals}
        totals = {dtype: total + bytes_of[dtype] for dtype, total in totals.items()}
        print(f"| {name} | " + " | ".join(f"{b / GIB:.2f}" for b in bytes_of.values()) + " |")
    print("| all | " + " | ".join(f"{b / GIB:.2f}" for b in totals.values()) + " |")
    for chip in (16, 8):
        print(f"| left of {chip} GiB | " + " | ".join(f"{chip - b / GIB:.2f}" for b in totals.values()) + " |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("vae", "tiles", "weights"))
    {"vae": vae, "tiles": tiles, "weights": weights}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
