"""Seconds and memory on the GPU (or TPU) at hand, of InstantID on SDXL at 1024 pixels in bfloat16, with random weights.

    python benchmarks/accelerator.py --json accelerator.json            every case
    python benchmarks/accelerator.py --only attention pytorch
    JAX_PLATFORMS=cpu python benchmarks/accelerator.py --model small --only attention pictures   the same code on any machine, in a minute

    attention    self-attention of SDXL's two resolutions, each backend: milliseconds forward and with its gradient, and errors against float32
    pictures     the pipeline, 30 guided steps: from prompt, face vector and keypoint picture to pixels, and the options of docs/speed.md
    pytorch      diffusers on the same machine: 30 guided steps of ControlNet and UNet with image adapter, and the decoder; its text towers
                 are left out. Usual memory, channels last, and with its repeated blocks compiled by torch.compile
    train        a training step from cached latents and text states: one row a number of pictures

Each case runs in a process of its own and writes its figures as it goes, so that a case that is cut off (`--limit` seconds) loses nothing it
has measured. Compiling is told apart: it is the first call, less a later one. Weights are random numbers of the size that keeps signals alive;
speed does not depend on their values.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from command_line import amount, new_file, put, read

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity"), str(ROOT / "benchmarks")]

CASES = ("attention", "pictures", "pytorch", "train")
STEPS, REPEATS = 30, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "one picture": {},
    "four pictures": {"num_images_per_prompt": 4},
    "cache interval 2, branch 2": {"cache_interval": 2, "cache_branch_id": 2},
    "IdentityNet in the first half": {"control_guidance_end": 0.5, "control_interval": 1},
    "guidance in the first 80 %": {"guidance_end": 0.8},
}
Figures = dict[str, Any]


def model(name: str) -> Any:
    """The configuration and its side in pixels."""
    from instantid_jax.config import portraits, sdxl

    return (sdxl(), 1024) if name == "sdxl" else (portraits(), 64)


def timed(call: Callable[[], Any], repeats: int = REPEATS) -> Figures:
    """Median seconds of a call, and what the first one took beyond that."""
    started = time.perf_counter()
    call()
    first, later = time.perf_counter() - started, []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        later.append(time.perf_counter() - started)
    seconds = float(np.median(later))
    return {"seconds": seconds, "compile": first - seconds}


# --- ours ------------------------------------------------------------------------------------------------------------------


@functools.cache
def _block(scale: float, dtype: Any) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(scale)).astype(dtype)


def random_weights(tree: Any, dtype: Any = None) -> Any:
    """Arrays of a tree of shapes: one million random numbers over and over, scaled by what goes into an output; on the device."""
    import jax

    from instantid_jax.paths import map_paths

    def one(path: str, leaf: Any) -> Any:
        kind, name = np.dtype(dtype or leaf.dtype), path.rsplit("/", 1)[-1]
        if name in ("scale", "bias"):
            return jax.device_put(np.full(leaf.shape, name == "scale", kind))
        width = leaf.shape[-2] if len(leaf.shape) < 4 else int(np.prod(leaf.shape[-4:-1]))
        return jax.device_put(np.resize(_block(round(float(width**-0.5), 4), kind), leaf.shape))

    return map_paths(one, tree)


def random_pipeline(config: Any) -> Any:
    """The pipeline with random weights; its words are those of the small model."""
    from instantid_jax.config import ComputeConfig
    from instantid_jax.defaults import DEFAULT_WEIGHTS
    from instantid_jax.models import build_networks
    from instantid_jax.pipeline import InstantIDPipeline
    from instantid_jax.text import Tokenizer

    compute = ComputeConfig(dtype="bfloat16")
    parameters = {name: random_weights(n.abstract, "bfloat16") for name, n in build_networks(config, compute).items() if name != "recognizer"}
    tokenizers = (Tokenizer.from_directory(DEFAULT_WEIGHTS / "tokenizer"), Tokenizer.from_directory(DEFAULT_WEIGHTS / "tokenizer_2"))
    return InstantIDPipeline(config, parameters, tokenizers, compute=compute)


def used() -> Figures:
    """The most memory that was in use, where the device tells."""
    import jax

    told = jax.local_devices()[0].memory_stats() or {}
    return {"peak_gib": told["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in told else {}


def pictures(which: str) -> Iterator[tuple[str, Figures]]:
    """The pipeline's call."""
    config, side = model(which)
    started = time.perf_counter()
    pipeline = random_pipeline(config)
    yield "weights", {"seconds": time.perf_counter() - started}
    rng = np.random.default_rng(0)
    face, keypoints = rng.normal(size=config.resampler.embedding_dim).astype(np.float32), rng.integers(0, 255, (side, side, 3)).astype(np.uint8)
    for name, options in OPTIONS.items():
        call = functools.partial(pipeline, "a photo", keypoints, face, num_inference_steps=STEPS, guidance_scale=5.0, **options)
        yield name, timed(functools.partial(call, output_type="np")) | used()
        if name == "one picture":
            yield "one picture, latents alone", timed(functools.partial(call, output_type="latent"))


def attention(which: str) -> Iterator[tuple[str, Figures]]:
    """Each backend at the shapes of self-attention."""
    import jax
    import jax.numpy as jnp

    from instantid_jax.nn.attention import dot_product_attention

    backends = ("xla", "blocked", *{"gpu": ("cudnn",), "tpu": ("splash",)}.get(jax.default_backend(), ()))
    shapes = ((2, 4096, 10, 64), (2, 1024, 20, 64)) if which == "sdxl" else ((2, 512, 2, 64),)
    for shape in shapes:
        exact = [np.random.default_rng(i).standard_normal(shape, np.float32) for i in range(4)]
        half = [jnp.asarray(x, jnp.bfloat16) for x in exact]

        def both(q: Any, k: Any, v: Any, weight: Any, backend: str) -> Any:
            def loss(q: Any, k: Any, v: Any) -> Any:
                out = dot_product_attention(q, k, v, backend=backend)
                return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32)), out

            (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
            return out, gradients

        with jax.default_matmul_precision("highest"):
            true = jax.jit(functools.partial(both, backend="xla"))(*(x.astype(jnp.float32) for x in half))
        for backend in backends:
            forward = jax.jit(functools.partial(dot_product_attention, backend=backend))
            whole = jax.jit(functools.partial(both, backend=backend))
            found = jax.tree.leaves(whole(*half))
            errors = [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(found, jax.tree.leaves(true), strict=True)]
            figures: Figures = {"forward_error": errors[0], "gradient_error": max(errors[1:])}
            for name, call, given in (("forward_ms", forward, half[:3]), ("gradient_ms", whole, half)):
                figures[name] = 1e3 * timed(lambda c=call, g=given: jax.block_until_ready([c(*g) for _ in range(20)]))["seconds"] / 20
            yield f"{backend} {'x'.join(map(str, shape))}", figures


def train(which: str) -> Iterator[tuple[str, Figures]]:
    """The step of `train.py`."""
    import jax

    from instantid_jax.config import ComputeConfig
    from instantid_jax.data.loader import LoaderConfig
    from instantid_jax.parallel.mesh import make_mesh
    from instantid_jax.training.config import TrainConfig
    from instantid_jax.training.program import Program

    config, side = model(which)
    started, state, frozen = time.perf_counter(), None, None
    for count, remat in ((8, "blocks"), (4, "none")):
        loader = LoaderConfig(global_batch=count, resolution=side, cached_latents=True, cached_text=True)
        compute = ComputeConfig(dtype="bfloat16", remat=remat)
        recipe = TrainConfig(model=config, steps=100, data=("none",), loader=loader, compute=compute, frozen_dtype="bfloat16")
        program = Program(recipe, make_mesh())
        if state is None:
            state, frozen = program.initial_state(random_weights(program.abstract_state.parameters)), random_weights(program.abstract_frozen)
            yield "weights", {"seconds": time.perf_counter() - started}
        rng = np.random.default_rng(0)
        batch = {
            name: jax.device_put((rng.standard_normal(x.shape) if x.dtype.kind == "f" else rng.integers(0, 255, x.shape)).astype(x.dtype), x.sharding)
            for name, x in program.abstract_batch().items()
        }
        compiled = program.compiled(state, frozen, batch)

        def step() -> None:
            nonlocal state
            state, metrics = compiled.call(state, frozen, batch, np.float32(np.inf))  # noqa: B023 (called within this turn)
            float(metrics.loss)

        figures = timed(step) | {"compile": compiled.seconds, "tflop": compiled.flops / 1e12} | used()
        yield f"{count} pictures, remat {remat}", figures | {"pictures_per_second": count / figures["seconds"]}


# --- PyTorch ---------------------------------------------------------------------------------------------------------------


def pytorch(which: str) -> Iterator[tuple[str, Figures]]:
    """diffusers' networks in the loop of its pipelines."""
    import torch
    from diffusers import EulerDiscreteScheduler
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from oracle import torch_controlnet, torch_unet, torch_vae

    place = "cuda" if torch.cuda.is_available() else "cpu"
    config, side = model(which)
    with torch.device("meta"):
        unet, net, vae = torch_unet(config.unet), torch_controlnet(config.identitynet), torch_vae(config.vae)
    unet, net, vae = (m.to(torch.bfloat16).to_empty(device=place) for m in (unet, net, vae))
    width = config.unet.cross_attention_dim
    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        adapter = IPAdapterAttnProcessor2_0(hidden, width, num_tokens=(config.resampler.num_queries,), scale=0.8)
        processors[name] = AttnProcessor2_0() if name.endswith("attn1.processor") else adapter.to(place, torch.bfloat16)
    unet.set_attn_processor(processors)
    for module in (unet, net, vae):
        for name, x in module.named_parameters():
            if x.ndim == 1:
                torch.nn.init.constant_(x, float(name.endswith("weight")))
            else:
                torch.nn.init.normal_(x, std=float(np.prod(x.shape[1:])) ** -0.5)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device=place, dtype=torch.bfloat16)

    added = {"text_embeds": random(2, config.unet.pooled_dim), "time_ids": random(2, 6)}
    text, tokens = random(2, config.text_encoder.max_position_embeddings, width), random(2, config.resampler.num_queries, width)
    picture, latent = torch.rand(2, 3, side, side, device=place, dtype=torch.bfloat16), side // config.vae.downscale
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)

    def draw(decoded: bool = True) -> None:
        scheduler.set_timesteps(STEPS, device=place)
        latents = random(1, config.unet.in_channels, latent, latent) * scheduler.init_noise_sigma
        with torch.inference_mode():
            for t in scheduler.timesteps:
                both = scheduler.scale_model_input(torch.cat([latents] * 2), t)
                down, mid = net(both, t, tokens, picture, added_cond_kwargs=added, return_dict=False)
                residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
                nothing, named = unet(both, t, (text, [tokens[:, None]]), added_cond_kwargs=added, **residuals).sample.chunk(2)
                latents = scheduler.step(nothing + 5 * (named - nothing), t, latents).prev_sample
            (vae.decode(latents).sample if decoded else latents).float().cpu()

    def figures() -> Figures:
        peak = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if place == "cuda" else {}
        return timed(draw) | {"latents": timed(lambda: draw(False))["seconds"]} | peak

    yield "usual", figures()
    for module in (unet, net, vae):
        module.to(memory_format=torch.channels_last)
    yield "channels last", figures()
    net._repeated_blocks = unet._repeated_blocks  # which diffusers leaves out of its ControlNet
    for module in (unet, net):
        module.compile_repeated_blocks()
    yield "channels last, blocks compiled", figures()


# --- both ------------------------------------------------------------------------------------------------------------------


def measure(case: str, which: str, file: Path) -> None:
    """One case in this process; writes the figures after every row."""
    found: Figures = {}
    for name, figures in {"attention": attention, "pictures": pictures, "pytorch": pytorch, "train": train}[case](which):
        found[name] = figures
        file.write_text(json.dumps(found))
        print(f"{case:10} {name:32}", "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)


def about() -> Figures:
    """The machine's accelerator and the versions."""
    import jax

    told = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    try:
        import torch
    except ImportError:
        return told
    return told | {"torch": torch.__version__}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--model", choices=("sdxl", "small"), default="sdxl")
    parser.add_argument("--limit", type=amount, default=3600, help="seconds after which a case is ended")
    parser.add_argument("--json", type=new_file, default=Path("accelerator.json"), help="where the figures go")
    parser.add_argument("--case", choices=(*CASES, "about"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case == "about":
        options.json.write_text(json.dumps(about()))
        return 0
    if options.case:
        measure(options.case, options.model, options.json)
        return 0
    figures: Figures = read(parser, options.json)
    status = 0
    for case in ("about", *options.only):
        part = options.json.with_suffix(f".{case}.part")
        command = [sys.executable, __file__, "--case", case, "--model", options.model, "--json", str(part)]
        try:
            status |= subprocess.run(
                command, timeout=options.limit, env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"{case}: ended after {options.limit:.0f} s", flush=True)
            status |= 1
        if part.exists():
            figures[case] = json.loads(part.read_text())
            part.unlink()
            if figures["about"]["device"] == "cpu":
                parser.error("JAX finds no accelerator here; benchmarks/vs_pytorch.py is for a CPU")
            put(options.json, json.dumps(figures, indent=1) + "\n")
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
