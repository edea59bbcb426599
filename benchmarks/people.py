"""Whether each of two people in one picture is nearer to the own reference than to the other's.

    python benchmarks/people.py --pairs 50 --out DIR         the small model, people whom it was never trained on

Test people 2i and 2i + 1 are drawn side by side on 128 x 64 pixels, each in one half, in the poses that the evaluation asks of them
(docs/evaluation.md); the prompt is the left one's and says nothing of who they are. The judge is the evaluation's: a recogniser
other than the conditioning one. A face that the detector misses is judged at the asked keypoints. Needs the extras eval and judge.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instantid_jax import Person
from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.data.portraits import PortraitWorld
from instantid_jax.defaults import default_pipeline
from instantid_jax.evaluation.faces import Examiner
from instantid_jax.evaluation.judges import load_judge
from instantid_jax.evaluation.panel import Panel, make_panel
from instantid_jax.evaluation.statistics import proportion
from instantid_jax.evaluation.store import Store
from instantid_jax.face import load_analyzer
from instantid_jax.output import contact_sheet
from instantid_jax.pipeline import InstantIDPipeline

SIDE = 64


def halves(panel: Panel, i: int, photos: int, scale: float) -> list[Person]:
    """Two people of the panel, left and right."""
    people = []
    for half in range(2):
        left, row = SIDE * half, 2 * i + half
        picture = draw_keypoints((2 * SIDE, SIDE), panel.keypoints[row] + np.float32([left, 0]), scale)
        people.append(Person(panel.embeddings[row, :photos], picture, (left, 0, left + SIDE, SIDE)))
    return people


def drawn(pipe: InstantIDPipeline, panel: Panel, photos: int, steps: int) -> np.ndarray:
    """Pictures [pairs, 64, 128, 3] uint8."""
    pictures = []
    for i in range(len(panel) // 2):
        people = halves(panel, i, photos, pipe.config.keypoint_scale)
        options = {"guidance_scale": 2.0, "controlnet_conditioning_scale": 1.0, "ip_adapter_scale": 1.0, "num_inference_steps": steps}
        pictures.append(np.asarray(pipe(panel.prompts[2 * i], people=people, max_people=2, seed=i, **options).images[0]))
    return np.stack(pictures)


def figures(similarity: np.ndarray, found: np.ndarray) -> dict[str, list[float]]:
    """Shares, each with its 95 % interval, of similarities [pairs, drawn, reference]."""
    own = similarity[:, [0, 1], [0, 1]]
    right = own > similarity[:, [0, 1], [1, 0]]
    told = {
        "both faces nearer to their own reference": right.all(axis=1),
        "faces nearer to their own reference": right.ravel(),
        "pairs more similar this way than exchanged": own.sum(axis=1) > similarity[:, [0, 1], [1, 0]].sum(axis=1),
        "faces detected": found.ravel(),
    }
    return {name: [round(float(x), 3) for x in proportion(hits)] for name, hits in told.items()}


def main() -> None:
    """Draws, judges, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50, help="pairs of people, at most 500")
    parser.add_argument("--photos", type=int, nargs="+", default=[1, 4], help="how many reference photos a person has; a line for each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures, a sheet and what was judged")
    a = parser.parse_args()
    pipe = default_pipeline()
    analyzer = load_analyzer(pipe.config.face_analyzer)
    panel = make_panel(PortraitWorld(image_size=SIDE), 2 * a.pairs, analyzer)
    examiner = Examiner(analyzer, load_judge("dlib"), Store(a.out / "cache"))
    references = examiner.examine(panel.references[:, 0], panel.reference_keypoints).vectors.reshape(a.pairs, 2, -1)
    real = panel.targets.reshape(a.pairs, 2, SIDE, SIDE, 3)
    pictures = {f"{n} photo{'s' * (n > 1)} a person": drawn(pipe, panel, n, a.steps) for n in a.photos}
    parts = {name: np.stack([p[:, :, :SIDE], p[:, :, SIDE:]], axis=1) for name, p in pictures.items()} | {"real renders": real}
    result = {}
    for name, faces in parts.items():
        seen = examiner.examine(faces.reshape(-1, SIDE, SIDE, 3), panel.keypoints)
        vectors = seen.vectors.reshape(a.pairs, 2, -1)
        result[name] = figures(np.einsum("pdv,prv->pdr", vectors, references), seen.found)
        print(f"{name}: " + "; ".join(f"{what} {share:.2f} [{low:.2f}, {high:.2f}]" for what, (share, low, high) in result[name].items()))
    (a.out / "people.json").write_text(json.dumps({"pairs": a.pairs, "judge": examiner.judge.name, "steps": a.steps, **result}, indent=1) + "\n")
    tiles = []
    for i in range(min(a.pairs, 6)):
        tiles += [("left", Image.fromarray(panel.references[2 * i, 0])), ("right", Image.fromarray(panel.references[2 * i + 1, 0]))]
        tiles += [(name, Image.fromarray(p[i])) for name, p in pictures.items()]
    contact_sheet(tiles, columns=2 + len(pictures), side=192).save(a.out / "sheet.png")


if __name__ == "__main__":
    main()
