"""How well the recogniser of latents tells people apart: the ceiling of what the identity loss can teach.

    python -m instantid_jax.data.prepare portraits --out data/faces --train 0 --validation 100 --test 0 --views 2
    python -m instantid_jax.data.prepare cache --data data/faces --resolution 64 --weights instantid_jax/assets/portraits/model --out data/latents
    python benchmarks/recognizer.py --data data/latents

Of every person one picture is the reference, embedded by the face recogniser; another is read from its latents by the network. Printed
are the similarity of right and wrong pairs and the AUC (`evaluation/statistics.py`), and the same with the face recogniser in both places.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instantid_jax.checkpoint import load_weights
from instantid_jax.config import ComputeConfig
from instantid_jax.data.sources import open_source
from instantid_jax.evaluation import statistics
from instantid_jax.models import Network, build_networks
from instantid_jax.models.recognizer import Recognizer, RecognizerConfig
from instantid_jax.training.weights import saved_model

ROOT = Path(__file__).resolve().parents[1]


def reader(weights: Path):
    """Latents [n, h, w, c] float32 to embeddings [n, d]."""
    model, compute = saved_model(weights), ComputeConfig()
    shape = RecognizerConfig(latent_channels=model.vae.latent_channels, embedding_dim=model.resampler.embedding_dim)
    networks = {"vae": build_networks(model, compute)["vae"], "recognizer": Network(Recognizer, shape, compute)}
    vae, recognizer = (net.bind(net.from_disk(load_weights(weights / name), name)) for name, net in networks.items())
    read = jax.jit(lambda z: recognizer(vae.scale(z)))
    return lambda z: np.concatenate([np.asarray(read(z[i : i + 100])) for i in range(0, len(z), 100)])


def pairs(folder: str, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """References' embeddings, other pictures' latents, and the other pictures' embeddings, one row a person."""
    source, seen = open_source((folder,), split), {}
    for i in range(len(source)):
        seen.setdefault(source[i].identity, []).append(i)
    both = [(source[rows[0]], source[rows[1]]) for rows in seen.values() if len(rows) > 1]
    latents = np.stack([np.asarray(second.latents.mean, np.float32) for _, second in both])
    return np.stack([a.embeddings[0] for a, _ in both]), latents, np.stack([b.embeddings[0] for _, b in both])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set with cached latents and several pictures of each person")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--weights", type=Path, default=ROOT / "instantid_jax" / "assets" / "portraits" / "model")
    options = parser.parse_args()
    reference, latents, own = pairs(options.data, options.split)
    weights = statistics.bootstrap(len(reference))
    for name, rows in (("recogniser of latents", reader(options.weights)(latents)), ("face recogniser itself", own)):
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (reference, rows))
        told = [statistics.estimate(f(a @ b.T), weights) for f in (statistics.same, statistics.other, statistics.auc)]
        figures = ", ".join(f"{what} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for what, e in zip(("same", "other", "AUC"), told, strict=True))
        print(f"{len(reference)} people, {name}: {figures}", flush=True)


if __name__ == "__main__":
    main()
