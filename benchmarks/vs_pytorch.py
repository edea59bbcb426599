"""Seconds on this machine against PyTorch (diffusers, transformers), in float32, with the same seed-determined weights in both.

    python benchmarks/vs_pytorch.py                                    every case
    python benchmarks/vs_pytorch.py --only step_512 vae_512 --json speed.json
    python benchmarks/vs_pytorch.py --model small                      the same code on the model that comes along, in a minute

    step_256, step_512    one guided InstantID step of SDXL (batch of two): IdentityNet, then the UNet with image adapter
    vae_512               SDXL's autoencoder, decoding one picture of 512 pixels
    text                  both text towers of SDXL, two prompts
    train                 one training step of a model of 0.38 billion parameters, latents of 32 x 32, batch of two
    picture               one picture of the model that comes along, 20 steps, in a running process
    start_cold, start     from process start to that picture: with an empty compile cache, and with a filled one
    sample_cold, sample   the same of `sample.py`, from a photo to a file; diffusers has no such program, so ours alone

Each side runs in a process of its own, so that one framework and one copy of the weights are in memory at a time. The processes take turns
(`--rounds`), each takes every case several times after one untimed call, and medians over all are compared: ratio = PyTorch's seconds over
ours. What PyTorch gets: all processors, scaled_dot_product_attention, inference mode, and channels-last memory where that is faster
(both are tried, the better one counts). Ours computes what does not change over the steps before the loop, as its pipeline does; PyTorch
computes it in every step, as its pipelines do. Outputs are compared too (1e-4).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from command_line import count, needs, new_file, put, read

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity"), str(ROOT / "benchmarks")]

CASES = ("step_256", "step_512", "vae_512", "text", "train", "picture", "start_cold", "start", "sample_cold", "sample")
BOUND = 1e-4
TOKENS = 16
STEPS = 20  # of a picture of the small model
Result = dict[str, Any]


def model(name: str) -> Any:
    """The configuration of a case."""
    from instantid_jax.config import portraits, sdxl

    return sdxl() if name == "sdxl" else portraits()


def inputs(config: Any, side: int) -> Any:
    """Random inputs of the networks for a guided step, latents of `side` x `side`."""
    import cases

    x = cases.inputs(config, (side, side))
    pixels = side * config.vae.downscale
    return x._replace(image=x.image[:, :pixels, :pixels])


def middle_model() -> Any:
    """Half of SDXL's widths, a fifth of its depth: the training case."""
    import dataclasses

    from instantid_jax.config import IdentityNetConfig, sdxl

    base = sdxl()
    unet = dataclasses.replace(base.unet, block_out_channels=(160, 320, 640), attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 1, 2))
    return dataclasses.replace(base, unet=unet, identitynet=IdentityNetConfig.from_unet(unet, base.identitynet.conditioning_embedding_out_channels))


def clock(call: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    """Seconds of each call after an untimed one, and the last result."""
    result, seconds = call(), []
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return seconds, result


# --- PyTorch ---------------------------------------------------------------------------------------------------------------


def filled(module: Any, network: Any, prefix: str = "") -> Any:
    """A PyTorch module that was made on "meta", with `network`'s weights, one tensor at a time."""
    import torch
    from oracle import tensor, to_torch

    module = module.to_empty(device="cpu").eval()
    unfilled = dict(module.named_parameters())
    for path, shape in network.disk_shapes().items():
        ((key, value),) = to_torch({path: tensor(path, shape)}, prefix).items()
        unfilled.pop(key).detach().copy_(value)
    if unfilled:
        raise ValueError(f"no weights for {sorted(unfilled)[:3]}")
    for name, buffer in module.named_buffers():  # CLIP's positions are a buffer, which `to_empty` leaves open
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return module


def torch_adapter(unet: Any, networks: Any, trainable: bool = False) -> None:
    """diffusers' own processors for decoupled attention, with the adapter's weights."""
    import torch
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from oracle import tensor

    from instantid_jax.models.adapter import site_numbers

    shapes, sites = networks["adapter"].disk_shapes(), site_numbers(networks["unet"].config)
    processors: dict[str, Any] = {}
    for number, name in enumerate(unet.attn_processors):
        if not number % 2:
            processors[name] = AttnProcessor2_0()
            continue
        key, value = (f"{sites[number]}/{which}/kernel" for which in ("to_k_ip", "to_v_ip"))
        hidden, context = shapes[key][1], shapes[key][0]
        processor = IPAdapterAttnProcessor2_0(hidden, context, num_tokens=(TOKENS,), scale=1.0)
        for layer, path in ((processor.to_k_ip[0], key), (processor.to_v_ip[0], value)):
            layer.weight.data = torch.from_numpy(np.ascontiguousarray(tensor(path, shapes[path]).T))
        processors[name] = processor.requires_grad_(trainable)
    unet.set_attn_processor(processors)


def torch_step(config: Any, size: int, repeats: int) -> Result:
    """One guided step."""
    import torch
    from oracle import nchw, nhwc, torch_controlnet, torch_unet

    from instantid_jax.models import build_networks

    networks = build_networks(config)
    with torch.device("meta"):
        unet, net = torch_unet(config.unet), torch_controlnet(config.identitynet)
    unet, net = filled(unet, networks["unet"]), filled(net, networks["identitynet"])
    torch_adapter(unet, networks)
    x = inputs(config, size)

    def step() -> Any:
        tokens, times = torch.from_numpy(x.tokens), torch.from_numpy(x.timestep)
        down, mid = net(nchw(x.sample), times, tokens, nchw(x.image), added_cond_kwargs=x.added, return_dict=False)
        text = (torch.from_numpy(x.text), [tokens[:, None]])
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(nchw(x.sample), times, text, added_cond_kwargs=x.added, **residuals).sample

    return _best_layout(step, (unet, net), repeats, nhwc)


def _best_layout(call: Callable[[], Any], modules: tuple[Any, ...], repeats: int, finish: Callable[[Any], Any]) -> Result:
    """Seconds with usual memory and with channels last; the better ones count."""
    import torch

    with torch.inference_mode():
        usual, result = clock(call, repeats)
        for module in modules:
            module.to(memory_format=torch.channels_last)
        last, _ = clock(call, repeats)
    better = last if statistics.median(last) < statistics.median(usual) else usual
    return {"seconds": better, "usual": usual, "channels_last": last, "output": finish(result)}


def torch_vae_decode(config: Any, size: int, repeats: int) -> Result:
    """Decoding one picture."""
    import torch
    from oracle import nchw, nhwc, random, torch_vae

    from instantid_jax.models import build_networks

    with torch.device("meta"):
        vae = torch_vae(config.vae)
    vae = filled(vae, build_networks(config)["vae"])
    latents = nchw(random("latents", 1, size, size, config.vae.latent_channels))
    return _best_layout(lambda: vae.decode(latents).sample, (vae,), repeats, nhwc)


def torch_texts(config: Any, repeats: int) -> Result:
    """Both towers on two prompts."""
    import torch
    from oracle import torch_text, weights

    from instantid_jax.models import build_networks

    networks = build_networks(config)
    towers = [torch_text(getattr(config, name), weights(networks[name])) for name in ("text_encoder", "text_encoder_2")]
    ids = torch.from_numpy(prompts(config))

    def encode() -> Any:
        out = [tower(ids, output_hidden_states=True) for tower in towers]
        return torch.cat([o.hidden_states[-2] for o in out], dim=-1)

    with torch.inference_mode():
        seconds, result = clock(encode, repeats)
    return {"seconds": seconds, "output": result.numpy()}


def prompts(config: Any) -> np.ndarray:
    """Token ids [2, 77] that both towers take: a beginning, words, ends."""
    words = np.random.default_rng(0).integers(300, config.text_encoder.vocab_size - 8, (2, 77))
    words[:, 40:] = config.text_encoder.vocab_size - 1
    return words.astype(np.int64)


def torch_train(repeats: int) -> Result:
    """One step: noise, networks, squared error, gradients of IdentityNet, adapter and resampler, clipping, AdamW."""
    import torch
    from diffusers.models.embeddings import IPAdapterPlusImageProjection
    from oracle import nchw, torch_controlnet, torch_unet

    from instantid_jax.models import build_networks

    torch.set_grad_enabled(True)
    config = middle_model()
    networks = build_networks(config)
    with torch.device("meta"):
        unet, net = torch_unet(config.unet), torch_controlnet(config.identitynet)
    unet, net = filled(unet, networks["unet"]).requires_grad_(False), filled(net, networks["identitynet"]).train()
    torch_adapter(unet, networks, trainable=True)
    r = config.resampler
    resampler = IPAdapterPlusImageProjection(r.embedding_dim, r.output_dim, r.dim, r.depth, r.dim_head, r.heads, TOKENS, 4)
    learned = [*net.parameters(), *(p for p in unet.parameters() if p.requires_grad), *resampler.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=1e-5, weight_decay=1e-2, fused=True)
    x, embedding = inputs(config, 32), torch.randn(2, 1, r.embedding_dim)
    sample, text, picture = nchw(x.sample), torch.from_numpy(x.text), nchw(x.image)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        noise, times = torch.randn_like(sample), torch.randint(0, 1000, (2,))
        noisy, tokens = 0.6 * sample + 0.8 * noise, resampler(embedding)
        down, mid = net(noisy, times, tokens, picture, added_cond_kwargs=x.added, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        output = unet(noisy, times, (text, [tokens[:, None]]), added_cond_kwargs=x.added, **residuals).sample
        loss = torch.nn.functional.mse_loss(output, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        return loss.item()

    usual, _ = clock(step, repeats)
    unet.to(memory_format=torch.channels_last)
    net.to(memory_format=torch.channels_last)
    last, _ = clock(step, repeats)
    better = last if statistics.median(last) < statistics.median(usual) else usual
    return {"seconds": better, "usual": usual, "channels_last": last, "parameters": sum(p.numel() for p in [*unet.parameters(), *net.parameters()])}


def torch_pipeline() -> Result:
    """The small model's networks in PyTorch, and what a picture needs beside them; tensors and diffusers' modules alone."""
    import torch
    from oracle import torch_controlnet, torch_text, torch_unet, torch_vae, weights

    from instantid_jax.config import portraits
    from instantid_jax.models import build_networks

    config = portraits()
    networks = build_networks(config)
    with torch.device("meta"):
        unet, net, vae = torch_unet(config.unet), torch_controlnet(config.identitynet), torch_vae(config.vae)
    unet, net, vae = (filled(m, networks[n]) for m, n in ((unet, "unet"), (net, "identitynet"), (vae, "vae")))
    torch_adapter(unet, networks)
    towers = [torch_text(getattr(config, name), weights(networks[name])) for name in ("text_encoder", "text_encoder_2")]
    side = config.unet.sample_size
    x, pixels = inputs(config, side), side * config.vae.downscale
    given = {"ids": torch.from_numpy(prompts(config)), "tokens": torch.from_numpy(x.tokens), "time_ids": torch.from_numpy(x.sizes)}
    given |= {"picture": torch.rand(2, 3, pixels, pixels), "noise": torch.randn(1, config.unet.in_channels, side, side)}
    return {"unet": unet, "net": net, "vae": vae, "towers": towers, **given}


def torch_draw(made: Result) -> Any:
    """A picture of `torch_pipeline` as a diffusers loop: text towers, twenty guided steps, decoder."""
    import torch
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    out = [tower(made["ids"], output_hidden_states=True) for tower in made["towers"]]
    text, tokens = torch.cat([o.hidden_states[-2] for o in out], dim=-1), made["tokens"]
    added = {"text_embeds": out[1].text_embeds, "time_ids": made["time_ids"]}
    scheduler.set_timesteps(STEPS)
    latents = made["noise"] * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        down, mid = made["net"](both, t, tokens, made["picture"], added_cond_kwargs=added, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        nothing, named = made["unet"](both, t, (text, [tokens[:, None]]), added_cond_kwargs=added, **residuals).sample.chunk(2)
        latents = scheduler.step(nothing + 3 * (named - nothing), t, latents).prev_sample
    return made["vae"].decode(latents).sample.numpy()


def torch_picture(repeats: int) -> Result:
    """The small model's picture in a running process."""
    import torch

    made = torch_pipeline()
    with torch.inference_mode():
        seconds, _ = clock(lambda: torch_draw(made), repeats)
    return {"seconds": seconds}


def torch_start(stored: Path) -> Result:
    """One picture from stored networks, in a process that imports PyTorch, diffusers and transformers and nothing of ours."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with torch.inference_mode():
        made = torch.load(stored, weights_only=False)  # a file that the case "store" wrote a moment ago
        towers = [kind(config).eval() for kind, config, _ in made["towers"]]
        for tower, (_, _, weights) in zip(towers, made["towers"], strict=True):
            tower.load_state_dict(weights)
        torch_draw(made | {"towers": towers})
    if ours := {"instantid_jax", "jax"} & sys.modules.keys():
        raise RuntimeError(f"PyTorch's start would count our {' and '.join(sorted(ours))}")
    return {"seconds": []}


# --- ours ------------------------------------------------------------------------------------------------------------------


def jax_step_program(config: Any, size: int, batch: int = 2, parameters: Any = None) -> tuple[Any, Any, float]:
    """A compiled step of IdentityNet and UNet for `batch` rows, its arguments, and the seconds it took to compile.

    Keys and values of text and identity, and features of the keypoint picture, are arguments: they are made once a picture.
    """
    import jax
    import jax.numpy as jnp
    from true_shapes import stacked_weights

    from instantid_jax.models import build_networks
    from instantid_jax.models.encoder import AddedConditions, IdentityContext
    from instantid_jax.nn.stacking import layers_apart

    networks = build_networks(config)
    names = ("unet", "identitynet", "adapter")
    parameters = {name: stacked_weights(networks[name]) for name in names} if parameters is None else dict(parameters)
    x = jax.tree.map(lambda a: jnp.asarray(np.resize(a, (batch, *a.shape[1:]))), inputs(config, size))

    @jax.jit
    def prepare(parameters: Any, x: Any) -> Any:
        unet, net, adapter = (networks[name].bind(parameters[name]) for name in names)
        return unet.project_context(x.text), net.project_context(x.tokens), net.embed_condition(x.image), adapter(x.tokens)

    parameters |= {name: layers_apart(parameters[name]) for name in ("unet", "identitynet")}  # as the pipeline does
    fixed = jax.block_until_ready(prepare(parameters, x))
    del parameters["adapter"]

    def step(parameters: Any, x: Any, fixed: Any) -> Any:
        unet, net = networks["unet"].bind(parameters["unet"]), networks["identitynet"].bind(parameters["identitynet"])
        text, tokens, features, identity = fixed
        added = AddedConditions(x.pooled, x.sizes)
        residuals = net(x.sample, x.timestep, tokens, added, features)
        return unet(x.sample, x.timestep, text, added, identity=IdentityContext(identity, jnp.float32(1.0)), residuals=residuals)

    started = time.perf_counter()
    compiled = jax.jit(step).lower(parameters, x, fixed).compile()
    return compiled, (parameters, x, fixed), time.perf_counter() - started


def jax_step(config: Any, size: int, repeats: int) -> Result:
    """One guided step."""
    import jax

    compiled, arguments, took = jax_step_program(config, size)
    seconds, result = clock(lambda: jax.block_until_ready(compiled(*arguments)), repeats)
    return {"seconds": seconds, "compile": took, "output": np.asarray(result)}


def jax_vae_decode(config: Any, size: int, repeats: int) -> Result:
    """Decoding one picture."""
    import jax
    import jax.numpy as jnp
    from oracle import random
    from true_shapes import stacked_weights

    from instantid_jax.models import build_networks

    vae = build_networks(config)["vae"]
    parameters = stacked_weights(vae)
    latents = jnp.asarray(random("latents", 1, size, size, config.vae.latent_channels))
    decode = jax.jit(lambda p, z: vae.bind(p).decode(z))
    seconds, result = clock(lambda: jax.block_until_ready(decode(parameters, latents)), repeats)
    return {"seconds": seconds, "output": np.asarray(result)}


def jax_texts(config: Any, repeats: int) -> Result:
    """Both towers on two prompts."""
    import jax
    import jax.numpy as jnp
    from true_shapes import stacked_weights

    from instantid_jax.models import build_networks

    networks, names = build_networks(config), ("text_encoder", "text_encoder_2")
    parameters = [stacked_weights(networks[name]) for name in names]
    ids = jnp.asarray(prompts(config), jnp.int32)

    @jax.jit
    def encode(parameters: Any, ids: Any) -> Any:
        return jnp.concatenate([networks[n].bind(p)(ids).hidden[-2] for n, p in zip(names, parameters, strict=True)], axis=-1)

    seconds, result = clock(lambda: jax.block_until_ready(encode(parameters, ids)), repeats)
    return {"seconds": seconds, "output": np.asarray(result)}


def jax_train(repeats: int) -> Result:
    """One step of `train.py`, from cached latents and text states."""
    import jax
    from oracle import random

    from instantid_jax.data.loader import LoaderConfig
    from instantid_jax.parallel.mesh import make_mesh
    from instantid_jax.training.config import TrainConfig
    from instantid_jax.training.program import Program

    config = middle_model()
    recipe = TrainConfig(
        model=config, steps=100, data=("none",), loader=LoaderConfig(global_batch=2, resolution=256, cached_latents=True, cached_text=True)
    )
    program = Program(recipe, make_mesh())

    def numbers(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(random("w", *x.shape).astype(x.dtype) * np.float32(0.02), x.sharding), tree)

    state, frozen = program.initial_state(numbers(program.abstract_state.parameters)), numbers(program.abstract_frozen)
    batch = {
        "latent_mean": random("latents", 2, 32, 32, config.vae.latent_channels),
        "latent_logvar": np.full((2, 32, 32, config.vae.latent_channels), -9, np.float32),
        "keypoint_image": np.random.default_rng(0).integers(0, 255, (2, 256, 256, 3)).astype(np.uint8),
        "face_box": np.float32([[50, 50, 200, 200]] * 2),
        "text_states": random("text", 2, 77, config.unet.cross_attention_dim),
        "text_pooled": random("pooled", 2, config.unet.pooled_dim),
        "embedding": random("embedding", 2, config.resampler.embedding_dim),
        "sizes": np.float32([[256, 256, 0, 0, 256, 256]] * 2),
    }
    arrays = {name: jax.device_put(value) for name, value in batch.items()}
    started = time.perf_counter()
    compiled = program.compiled(state, frozen, arrays)
    took = time.perf_counter() - started
    holder = [state]

    def step() -> float:
        holder[0], metrics = compiled.call(holder[0], frozen, arrays, np.float32(np.inf))
        return float(metrics.loss)

    seconds, _ = clock(step, repeats)
    networks = program.abstract_state.parameters | program.abstract_frozen
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves([networks[name] for name in ("unet", "identitynet", "adapter")]))
    return {"seconds": seconds, "compile": took, "parameters": count}


def jax_picture(repeats: int) -> Result:
    """The small model's pipeline, from prompt and embedding to picture."""
    from instantid_jax.defaults import default_pipeline

    pipeline = default_pipeline()
    embedding = np.random.default_rng(0).normal(size=pipeline.config.resampler.embedding_dim).astype(np.float32)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)

    def draw() -> Any:
        return pipeline("a photo", picture, embedding, num_inference_steps=STEPS, guidance_scale=3.0).images

    seconds, _ = clock(draw, repeats)
    return {"seconds": seconds}


# --- both ------------------------------------------------------------------------------------------------------------------


def side(framework: str, case: str, which: str, repeats: int, stored: Path | None) -> Result:
    """One case on one side, in this process. `stored` is the file of PyTorch's networks: cases "store" writes it, "picture" may begin with it."""
    if case == "picture" and stored is not None:
        return torch_start(stored)
    config = model(which)
    ours = framework == "jax"
    if not ours:
        import oracle  # noqa: F401 (the tests' oracle allows PyTorch one thread; here it has all, as JAX has)
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
    if case.startswith("step_"):
        return (jax_step if ours else torch_step)(config, int(case[5:]) // 8 if which == "sdxl" else config.unet.sample_size, repeats)
    if case == "vae_512":
        return (jax_vae_decode if ours else torch_vae_decode)(config, 64 if which == "sdxl" else config.unet.sample_size, repeats)
    if case == "text":
        return (jax_texts if ours else torch_texts)(config, repeats)
    if case == "store":
        made = torch_pipeline()  # transformers' hooks do not survive being stored: its towers are made anew from their configuration
        towers = [(type(tower), tower.config, tower.state_dict()) for tower in made["towers"]]
        torch.save(made | {"towers": towers}, stored)
        return {"seconds": []}
    if case == "train":
        return (jax_train if ours else torch_train)(repeats)
    return (jax_picture if ours else torch_picture)(repeats)


def run_side(
    framework: str, case: str, options: argparse.Namespace, folder: Path, *, cache: Path | None = None, stored: Path | None = None
) -> Result:
    """One case on one side, in a process of its own; with the seconds from its start to its end."""
    file = folder / "result.npz"
    command = [sys.executable, __file__, "--side", framework, "--only", case, "--model", options.model, "--repeats", str(options.repeats)]
    command += [] if stored is None else ["--stored", str(stored)]
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    if cache is not None:
        environment |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    started = time.perf_counter()
    subprocess.run([*command, "--file", str(file)], check=True, env=environment, cwd=ROOT)
    took = time.perf_counter() - started
    with np.load(file) as arrays:
        result = json.loads(str(arrays["result"]))
        if "output" in arrays:
            result["output"] = arrays["output"]
    return result | {"process": took}


def compare(case: str, options: argparse.Namespace, folder: Path) -> Result:
    """Both sides in turn: medians, their ratio, and how far the outputs are apart."""
    if case.startswith("start"):
        return compare_starts(case, options, folder)
    if case.startswith("sample"):
        return sample(case, folder)
    seconds: dict[str, list[float]] = {"torch": [], "jax": []}
    told: Result = {}
    outputs: dict[str, Any] = {}
    for _ in range(options.rounds):
        for framework in seconds:
            result = run_side(framework, case, options, folder)
            seconds[framework] += (taken := result.pop("seconds"))
            outputs[framework] = result.pop("output", None)
            told[framework] = result | {"seconds": [*told.get(framework, {}).get("seconds", ()), *taken]}
    ours, theirs = statistics.median(seconds["jax"]), statistics.median(seconds["torch"])
    figures: Result = {"ours_s": ours, "pytorch_s": theirs, "ratio": theirs / ours, "calls": len(seconds["jax"]), **told}
    if outputs["jax"] is not None:
        a, b = (outputs[name].astype(np.float64) for name in ("jax", "torch"))
        figures["max_error"] = float(np.abs(a - b).max() / np.abs(b).max())
    return figures


def compare_starts(case: str, options: argparse.Namespace, folder: Path) -> Result:
    """From process start to the end of the first picture (calls are not repeated). PyTorch's networks are stored before, as ours are."""
    options = argparse.Namespace(**vars(options) | {"repeats": 0})
    cache = folder / "cache"
    if case == "start_cold":
        shutil.rmtree(cache, ignore_errors=True)
    else:
        run_side("jax", "picture", options, folder, cache=cache)
    stored = folder / "networks.pt"
    if not stored.is_file():
        run_side("torch", "store", options, folder, stored=stored)
    run_side("torch", "picture", options, folder, stored=stored)  # so that PyTorch's files too are in the system's memory
    ours = run_side("jax", "picture", options, folder, cache=cache)["process"]
    theirs = run_side("torch", "picture", options, folder, stored=stored)["process"]
    return {"ours_s": ours, "pytorch_s": theirs, "ratio": theirs / ours, "calls": 1}


def sample(case: str, folder: Path) -> Result:
    """From the start of `sample.py` to its end: finds and describes the face of a photo, draws, writes."""
    cache = folder / "cache_of_sample"
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=str(cache))
    photo = ROOT / "instantid_jax/assets/portraits/people/person_1.png"

    def seconds() -> float:
        command = [sys.executable, "sample.py", "--face", str(photo), "--prompt", "a photo", "--steps", str(STEPS)]
        command += ["--out", f"{folder}/{time.time_ns()}"]
        started = time.perf_counter()
        subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    if case == "sample_cold":
        shutil.rmtree(cache, ignore_errors=True)
    else:
        seconds()
    return {"ours_s": seconds(), "pytorch_s": None, "ratio": None, "calls": 1}


def line(case: str, figures: Result) -> str:
    """What is printed of a case."""
    text = f"{case:12} ours {figures['ours_s']:8.3f} s"
    if figures["pytorch_s"] is not None:
        text += f"  PyTorch {figures['pytorch_s']:8.3f} s  ratio {figures['ratio']:.2f}"
    return text + (f"  apart {figures['max_error']:.1e}" if "max_error" in figures else "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*CASES, "store"), metavar="CASE", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--model", choices=("sdxl", "small"), default="sdxl", help="of steps, autoencoder and text")
    parser.add_argument("--rounds", type=count, default=1, help="how often both sides take turns")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls in each turn")
    parser.add_argument("--json", type=new_file, help="write the figures here too; cases that were not run stay as they are there")
    parser.add_argument("--side", choices=("torch", "jax"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stored", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        if options.side == "jax" and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            from instantid_jax.running import keep_compiled

            keep_compiled()
        result = side(options.side, options.only[0], options.model, options.repeats, options.stored)
        output = {"output": result.pop("output")} if "output" in result else {}
        np.savez(options.file, result=json.dumps(result), **output)
        return 0
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {options.repeats}")
    needs(parser, "torch", "diffusers", "transformers")
    figures: dict[str, Result] = read(parser, options.json)
    with tempfile.TemporaryDirectory() as folder:
        for case in options.only:
            figures[case] = compare(case, options, Path(folder))
            print(line(case, figures[case]), flush=True)
            if options.json:
                put(options.json, json.dumps(figures, indent=1) + "\n")
    return int(not all(figures[case].get("max_error", 0) <= BOUND for case in options.only))  # not: any above, which NaN is not


if __name__ == "__main__":
    sys.exit(main())
