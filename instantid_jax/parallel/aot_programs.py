"""The real programs of sampling and training with shapes in place of arrays, to compile for machines that are not at hand."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from instantid_jax import denoise as sampling
from instantid_jax.config import ModelConfig
from instantid_jax.diffusion import make_sampler
from instantid_jax.models import FROZEN, TRAINABLE, build_networks
from instantid_jax.models.encoder import AddedConditions, IdentityContext, TextContext
from instantid_jax.models.unet import Residuals
from instantid_jax.nn.platform import as_defined
from instantid_jax.parallel.flops import minimum_flops
from instantid_jax.parallel.mesh import batch_sharding
from instantid_jax.parallel.rules import shardings
from instantid_jax.paths import flatten, map_paths

if TYPE_CHECKING:
    from instantid_jax.training.config import TrainConfig

__all__ = ["Stage", "sample_stages", "train_stages", "unet_stages"]


_ON_THE_WAY = ("unet", "identitynet", "adapter", "resampler")
"""Networks through whose weights a gradient passes back."""
_TEXT_PROJECTION = re.compile(r"/attn2/to_[kv]/")


class Stage(NamedTuple):
    """One compiled program."""

    name: str
    function: Any
    """Of `jax.jit`."""
    arguments: tuple[Any, ...]
    """Shapes with their places; static arguments as they are."""
    resident: int = 0
    """Bytes a device of what must stay in memory beside it: the weights of the other programs."""
    loss: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
    """A scalar function of (trained, others ...) whose value and gradient the program makes, with its arguments; None where it makes none."""
    collective_minimum: float = 0.0
    """Bytes a device and step that cannot but be gathered and summed (`fsdp_bound`)."""
    largest_whole: int = 0
    """Bytes of the largest parameter, or part of the optimizer's state, that every device has whole though there is an `fsdp` to split it over."""

    def minimum(self) -> float:
        """The fewest FLOPs that do its work, over all devices: those of the networks as they are defined, each product once.

        No device's own forms count (its kernels, convolutions as matrix products, weights that are gathered), nor what it pads or makes twice.
        Not for within a mesh.
        """
        function, arguments = (self.function, self.arguments) if self.loss is None else self.loss
        with as_defined():
            anywhere = [jax.tree.map(_nowhere, argument) for argument in arguments]
            if self.loss is None:
                jaxpr = function.trace(*anywhere).jaxpr
                return minimum_flops(jaxpr, [False] * len(jaxpr.in_avals))
            trained = len(jax.tree.leaves(anywhere[0]))
            jaxpr = jax.make_jaxpr(function)(*anywhere)
        return minimum_flops(jaxpr, [i < trained for i in range(len(jaxpr.in_avals))])


def _nowhere(x: Any) -> Any:
    """A shape without its place; anything else as it is."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


def _placed(tree: Any, mesh: Mesh, dtype: Any = None) -> Any:
    """The tree's shapes in their places, in `dtype`; kernels of 8 bits and their scales keep their own."""

    def one(path: str, pair: tuple[Any, Any]) -> jax.ShapeDtypeStruct:
        x, place = pair
        own = dtype is None or x.dtype == jnp.int8 or path.endswith("kernel_scale")
        return jax.ShapeDtypeStruct(x.shape, x.dtype if own else dtype, sharding=place)

    return map_paths(one, jax.tree.map(lambda x, place: (x, place), tree, shardings(tree, mesh)))


def _rows(tree: Any, mesh: Mesh, batch: int) -> Any:
    """The same shapes, split by their first axis where that is the batch, else by their second (layers are stacked before it)."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        axes: list[Any] = [None] * len(x.shape)
        if batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
            for i, n in enumerate(x.shape[:2]):
                if n == batch and i == (0 if len(x.shape) < 5 else 1):
                    axes[i] = ("data", "fsdp")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree.map(one, tree)


def local_bytes(tree: Any) -> int:
    """Bytes a device of placed shapes."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += int(functools.reduce(lambda a, b: a * b, shape, 1)) * leaf.dtype.itemsize
    return total


def unet_stages(model: ModelConfig, compute: Any, mesh: Mesh, batch: int, size: tuple[int, int]) -> list[Stage]:
    """The UNet as a denoising step runs it: projected contexts of text and identity, and IdentityNet's residuals, are given."""
    networks = build_networks(model, compute)
    unet, adapter, net = (networks[name] for name in ("unet", "adapter", "identitynet"))
    dtype, config = jnp.dtype(compute.dtype), model.unet
    h, w = size[0] // model.vae.downscale, size[1] // model.vae.downscale
    tokens = model.text_encoder.max_position_embeddings

    def shape(*sizes: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    sample, added = shape(batch, h, w, config.in_channels, dtype=jnp.float32), AddedConditions(shape(batch, config.pooled_dim), shape(batch, 6))
    text = jax.eval_shape(lambda p, x: unet.bind(p).project_context(x), unet.abstract, shape(batch, tokens, config.cross_attention_dim))
    person = shape(batch, model.resampler.num_queries, config.cross_attention_dim)
    identity = jax.eval_shape(lambda p, x: adapter.bind(p)(x), adapter.abstract, person)

    def controlled(p: Any, x: Any, tokens: Any, added: AddedConditions) -> Residuals:
        bound = net.bind(p)
        features = bound.embed_condition(jnp.zeros((batch, *size, 3)))
        return bound(x, jnp.float32(0), bound.project_context(tokens), added, features)

    residuals = jax.eval_shape(controlled, net.abstract, sample, person, added)

    def forward(parameters: Any, x: Any, time: Any, text: Any, added: Any, identity: Any, scale: Any, residuals: Any) -> Any:
        return unet.bind(parameters)(x, time, TextContext(text), added, identity=IdentityContext(identity, scale), residuals=residuals)

    given = _rows((sample, shape(dtype=jnp.float32), text.keys_values, added, identity, shape(dtype=jnp.float32), residuals), mesh, batch)
    return [Stage("unet", jax.jit(forward), (_placed(unet.abstract, mesh, dtype), *given))]


def sample_stages(
    model: ModelConfig, compute: Any, mesh: Mesh, pictures: int, size: tuple[int, int], steps: int, *, int8: bool = False
) -> list[Stage]:
    """The programs of a call of the pipeline with guidance, whose weights all stay in memory; with `int8` as its `weights_dtype` has them."""
    networks = build_networks(model, compute, int8=int8)  # in float16 alone the pipeline keeps the autoencoder in float32
    weights = {name: _placed(networks[name].abstract, mesh, jnp.dtype(compute.dtype)) for name in (*FROZEN, *TRAINABLE)}
    h, w = size[0] // model.vae.downscale, size[1] // model.vae.downscale
    batch, tokens, f = 2 * pictures, model.text_encoder.max_position_embeddings, jnp.float32
    half, width = jnp.dtype(compute.dtype), model.unet.cross_attention_dim
    sampler = make_sampler("euler", model.scheduler)
    plan = sampler.plan(steps)

    def rows(*shapes: tuple[tuple[int, ...], Any], count: int = batch) -> Any:
        return _rows(tuple(jax.ShapeDtypeStruct((count, *shape), dtype) for shape, dtype in shapes), mesh, count)

    def replicated(tree: Any) -> Any:
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=everywhere), tree)

    text, pooled, sizes, person = rows(
        ((tokens, width), half), ((model.unet.pooled_dim,), half), ((6,), f), ((model.resampler.num_queries, width), half)
    )
    (latents, seeds) = rows(((h, w, model.unet.in_channels), f), ((), jnp.uint32), count=pictures)
    (embeddings,), (ids,) = rows(((model.resampler.embedding_dim,), f)), rows(((tokens,), jnp.int32))
    picture = jax.ShapeDtypeStruct((1, *size, 3), f)
    scale = jax.ShapeDtypeStruct((), f)
    conditions = sampling.Conditions(
        text=text,
        text_mask=None,
        added=AddedConditions(pooled, sizes),
        identity_tokens=person,
        images=(replicated(picture),),
        control_scales=replicated(jax.ShapeDtypeStruct((steps, 1), f)),
        adapter_scale=replicated(jax.ShapeDtypeStruct((steps,), f)),
        control_mask=None,
    )
    denoiser = sampling.Denoiser(networks["unet"], networks["adapter"], networks["identitynet"])
    nets = {name: weights[name] for name in ("unet", "adapter", "identitynet")} | {"controlnets": ()}
    denoised = (denoiser, sampler, True, nets, conditions, latents, seeds, replicated(plan), replicated(scale), replicated(scale))
    stages = [Stage(name, sampling.encode_text, (networks[name], weights[name], ids)) for name in ("text_encoder", "text_encoder_2")]
    stages.append(Stage("resampler", sampling.encode_identity, (networks["resampler"], weights["resampler"], embeddings)))
    stages.append(Stage("denoise", sampling.denoise, denoised))
    stages.append(Stage("decode", sampling.decode, (networks["vae"], weights["vae"], latents)))
    own = {"denoise": ("unet", "adapter", "identitynet"), "decode": ("vae",)}
    total = {name: local_bytes(tree) for name, tree in weights.items()}
    return [stage._replace(resident=sum(total.values()) - sum(total[n] for n in own.get(stage.name, (stage.name,)))) for stage in stages]


def fsdp_bound(state: Any, frozen: Any, dtype: Any, mesh: Mesh | AbstractMesh) -> tuple[float, int]:
    """(fewest bytes that collectives give to a device in a step, bytes of the largest array that is whole): of a step that splits weights.

    A split weight is gathered once for the forward pass, in the type of the arithmetic, and once more for the backward pass where a gradient
    passes through it: not in text towers and autoencoder, nor where the UNet projects the text. A trained weight's gradient is summed once; over
    `data` its parts are summed too.
    """
    size, total, largest = jnp.dtype(dtype).itemsize, 0.0, 0
    shards, copies = mesh.shape["fsdp"], mesh.shape["data"]
    trained = flatten(state.parameters)
    for path, leaf in (trained | flatten(frozen)).items():
        if shards == 1 or "fsdp" not in leaf.sharding.spec:
            continue
        count = size * shards * math.prod(leaf.sharding.shard_shape(leaf.shape))  # of one part of `tensor`
        passes = path.split("/")[0] in _ON_THE_WAY and not (path.startswith("unet/") and _TEXT_PROJECTION.search(path))
        total += count * (1 + passes)
        if path in trained:
            total += count + (count / shards if copies > 1 else 0)
    for leaf in jax.tree.leaves((state, frozen)):
        if shards > 1 and "fsdp" not in leaf.sharding.spec:
            largest = max(largest, math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)
    return total, largest


def train_stages(config: TrainConfig, mesh: Mesh) -> list[Stage]:
    """The training step."""
    from instantid_jax.training.config import MeshConfig  # these need the packages of training
    from instantid_jax.training.objectives import draw, per_sample
    from instantid_jax.training.program import Program
    from instantid_jax.training.state import merge

    shape = MeshConfig(mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"])
    program = Program(dataclasses.replace(config, mesh=shape), mesh)
    limit = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)) for name, x in program.abstract_batch().items()}
    arguments = (program.abstract_state, program.abstract_frozen, batch, limit)
    # The minimum knows no kernels and computes nothing twice.
    plain = dataclasses.replace(config.compute, remat="none", attention="xla")
    objective = Program(dataclasses.replace(config, mesh=shape, compute=plain), mesh).objective

    def loss(trained: Any, frozen: Any, batch: Any) -> jax.Array:
        draws = draw(objective, jax.random.key(0), batch)
        return jnp.mean(per_sample(objective, merge(trained, frozen), batch, draws).loss)

    bound, whole = fsdp_bound(program.abstract_state, program.abstract_frozen, config.compute.dtype, mesh)
    learned = (loss, (program.abstract_state.parameters, program.abstract_frozen, batch))
    return [Stage("train", program.step, arguments, loss=learned, collective_minimum=bound, largest_whole=whole)]
