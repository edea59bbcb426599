"""How fast the procedural portraits are drawn, and how well a face recogniser tells the people apart.

    python benchmarks/portraits_speed.py                          images a second at 64 and 128 pixels, one and two threads
    python benchmarks/portraits_speed.py --faces 64 --sizes 128   detection and recognition of 64 people in 3 photos each

Speed counts new people too: one for every three pictures. Recognition is YuNet and SFace on photos without a style; rank 1
compares each photo with one of every person, over all ordered pairs of views.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instantid_jax.data.portraits import PortraitWorld
from instantid_jax.face.analyzer import OpenCVAnalyzer

VIEWS = 3


def draw(world: PortraitWorld, seed: int) -> None:
    """One person, `VIEWS` portraits."""
    person = world.identity(seed)
    for number in range(VIEWS):
        world.render(person, world.view(person, number))


def speed(size: int, threads: int, people: int = 60) -> tuple[float, float]:
    """(images a second, processor milliseconds an image)."""
    world = PortraitWorld(image_size=size)
    draw(world, 0)
    wall, processor = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda seed: draw(world, seed), range(1, people + 1)))
    images = VIEWS * people
    return images / (time.perf_counter() - wall), 1000 * (time.process_time() - processor) / images


def recognition(size: int, people: int) -> dict[str, float]:
    """Shares, mean cosines, area under the ROC curve, and the mean keypoint error in inter-eye distances."""
    world, analyzer = PortraitWorld(image_size=size, style_weights=(("photo", 1.0),)), OpenCVAnalyzer()
    embeddings = np.full((people, VIEWS, analyzer.embedding_dim), np.nan)
    errors = []
    for seed in range(people):
        person = world.identity(seed)
        for number in range(VIEWS):
            portrait = world.render(person, world.view(person, number))
            for face in analyzer.analyze(portrait.image)[:1]:
                embeddings[seed, number] = face.embedding / np.linalg.norm(face.embedding)
                distance = np.linalg.norm(portrait.keypoints[1] - portrait.keypoints[0])
                errors.append(np.linalg.norm(face.kps - portrait.keypoints, axis=1).mean() / distance)
    found = ~np.isnan(embeddings[..., 0])
    rows = embeddings[found]
    who = np.nonzero(found)[0]
    cosines, same = rows @ rows.T, who[:, None] == who
    own, others = cosines[same & ~np.eye(len(who), dtype=bool)], np.sort(cosines[~same])
    hits = []
    for probe in range(VIEWS):
        for shown in set(range(VIEWS)) - {probe}:
            both = found[:, probe] & found[:, shown]
            between = embeddings[both, probe] @ embeddings[both, shown].T
            hits.append(between.argmax(1) == np.arange(both.sum()))
    return {
        "found": float(found.mean()),
        "own": float(own.mean()),
        "others": float(others.mean()),
        "auc": float(np.searchsorted(others, own).mean() / len(others)),
        "rank 1": float(np.concatenate(hits).mean()),
        "keypoint error": float(np.mean(errors)),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="sides of the pictures in pixels")
    parser.add_argument("--faces", type=int, default=0, help="measure recognition of so many people instead of speed")
    options = parser.parse_args()
    for size in options.sizes:
        if options.faces:
            print(f"{size} px:", ", ".join(f"{name} {value:.4f}" for name, value in recognition(size, options.faces).items()), flush=True)
            continue
        for threads in (1, 2):
            rate, cost = speed(size, threads)
            print(f"{size} px, {threads} thread(s): {rate:.1f} images/s, {cost:.1f} ms of processor time each ({os.cpu_count()} cores)", flush=True)


if __name__ == "__main__":
    main()
