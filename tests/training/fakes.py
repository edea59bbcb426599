"""Networks of one line each, so that losses and steps have numbers that can be worked out by hand, and nothing to compile."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import small

from instantid_jax.diffusion.schedule import alphas_cumprod
from instantid_jax.training.config import LossConfig, StageConfig
from instantid_jax.training.objectives import Objective

SCALE = 2.0
BASE = StageConfig(identitynet=False, adapter=False, trainable=(r"^unet/",))


class Fake:
    """A network whose `bind(weights)` is ``make(weights)``."""

    def __init__(self, make):
        self.bind, self.compute = make, SimpleNamespace(dtype=jnp.dtype("float32"))


class FakeUNet:
    """output = a * sample + b; it remembers what it was called with."""

    def __init__(self, weights, seen):
        self.weights, self.seen = weights, seen

    def project_context(self, states):
        return states

    def __call__(self, sample, time, context, added, *, identity, residuals):
        self.seen.update(sample=sample, time=time, context=context, added=added, identity=identity, residuals=residuals)
        return self.weights["a"] * sample + self.weights["b"]


class FakeIdentityNet:
    """Remembers its inputs under "identitynet"."""

    def __init__(self, seen):
        self.seen = seen

    def project_context(self, tokens):
        return tokens

    def embed_condition(self, picture):
        return picture

    def __call__(self, sample, time, context, added, condition):
        self.seen["identitynet"] = {"sample": sample, "time": time, "context": context, "added": added, "condition": condition}
        return "residuals"


class FakeVAE:
    def scale(self, z):
        return SCALE * z

    def encode(self, image):
        return image[..., :1] * 0.5, jnp.full_like(image[..., :1], -2.0)

    def decode(self, z):
        return jnp.repeat(z, 3, axis=-1)


def objective(loss: LossConfig | None = None, stage: StageConfig = BASE, prediction_type: str = "epsilon"):
    """(objective of fakes, its weights, what the UNet saw)."""
    seen: dict = {}
    networks = {
        "vae": Fake(lambda w: FakeVAE()),
        "text_encoder": Fake(lambda w: None),
        "text_encoder_2": Fake(lambda w: None),
        "unet": Fake(lambda w: FakeUNet(w, seen)),
        "identitynet": Fake(lambda w: FakeIdentityNet(seen)),
        "resampler": Fake(lambda w: lambda embedding: w["a"] * embedding[:, None, :]),
        "adapter": Fake(lambda w: lambda tokens: w["a"] * tokens),
        "recognizer": Fake(lambda w: lambda latents: latents.mean((1, 2)) @ w["a"]),
    }
    weights = {name: {"a": jnp.float32(0.5), "b": jnp.float32(0.1)} for name in networks}
    weights["recognizer"] = {"a": jnp.asarray(np.random.default_rng(5).normal(size=(4, 16)), jnp.float32)}
    return Objective(networks, small.model(prediction_type), stage, loss or LossConfig()), weights, seen  # pyright: ignore


def batch(count: int = 8, side: int = 8, seed: int = 0):
    """A batch with cached latents and text, [count, side, side, 4]."""
    rng = np.random.default_rng(seed)
    return {
        "latent_mean": rng.normal(size=(count, side, side, 4)).astype(np.float32),
        "latent_logvar": np.full((count, side, side, 4), -3.0, np.float32),
        "text_states": rng.normal(size=(count, 5, 32)).astype(np.float32),
        "text_pooled": rng.normal(size=(count, 16)).astype(np.float32),
        "embedding": rng.normal(size=(count, 16)).astype(np.float32),
        "keypoint_image": rng.integers(0, 256, (count, 2 * side, 2 * side, 3), dtype=np.uint8),
        "face_box": np.tile(np.array([4, 2, 10, 12], np.float32), (count, 1)),
        "sizes": np.tile(np.array([16, 16, 0, 0, 16, 16], np.float32), (count, 1)),
    }


def alpha_bar(times):
    """abar of each time, float64 [b]."""
    return np.asarray(alphas_cumprod(small.model().scheduler), np.float64)[np.asarray(times)]


def key(number: int = 0):
    return jax.random.key(number)
