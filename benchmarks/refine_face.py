"""What a second pass over a small face does to its likeness, on the small model and people whom it was never trained on.

    python benchmarks/refine_face.py --people 20 --out DIR

A head of 40 x 40 pixels stands in a picture of 144 x 96: the person's own, really rendered; the small model's picture of the person; or
another person's, really rendered. The face is redrawn with the identity of the person's one photo. Figures are cosines with that photo by the
evaluation's judge, a recogniser other than the conditioning one, before and after, at the keypoints detected before; of people whose small
face is not found there are none. In brackets 95 % intervals of the mean (bootstrap). Needs the extras eval and judge.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instantid_jax import refine_face
from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.data.portraits import PortraitWorld
from instantid_jax.defaults import default_pipeline
from instantid_jax.evaluation.judges import load_judge
from instantid_jax.evaluation.panel import make_panel
from instantid_jax.face import FaceError, load_analyzer
from instantid_jax.output import contact_sheet
from instantid_jax.progress import StepBar

SIDE, HEAD, SCENE, CORNER = 64, 40, (144, 96), (52, 56)
STRENGTHS = {"guidance_scale": 2.0, "controlnet_conditioning_scale": 1.0, "ip_adapter_scale": 1.0}


def scene(head: np.ndarray) -> Image.Image:
    """A picture with the head at its lower edge, before the colour of its background."""
    small = Image.fromarray(head).resize((HEAD, HEAD), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", SCENE, tuple(int(v) for v in np.median(np.asarray(small)[0], axis=0)))
    picture.paste(small, CORNER)
    return picture


def interval(values: np.ndarray) -> list[float]:
    """Mean and its 95 % interval."""
    drawn = np.random.default_rng(0).choice(values, (4000, len(values))).mean(axis=1)
    return [round(float(x), 3) for x in (values.mean(), *np.quantile(drawn, [0.025, 0.975]))]


def main() -> None:
    """Draws, judges, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=20, help="how many, at most 1000")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures and a sheet")
    a = parser.parse_args()
    pipe, judge = default_pipeline(), load_judge("dlib")
    analyzer = load_analyzer(pipe.config.face_analyzer)
    panel = make_panel(PortraitWorld(image_size=SIDE), a.people, analyzer)
    calls = a.steps + sum(3 * int(a.steps * strength) for strength in a.strengths)
    with StepBar(a.people * calls) as bar:
        _measure(a, pipe, judge, analyzer, panel, STRENGTHS | {"num_inference_steps": a.steps, "on_step": bar.on_step})


def _measure(a: argparse.Namespace, pipe: Any, judge: Any, analyzer: Any, panel: Any, options: dict[str, Any]) -> None:
    made = []
    for i in range(a.people):
        points = draw_keypoints((SIDE, SIDE), panel.keypoints[i], pipe.config.keypoint_scale)
        made.append(np.asarray(pipe(panel.prompts[i], points, panel.embeddings[i, 0], seed=i, **options).images[0]))
    heads = {"own render": panel.targets, "drawn by the model": np.stack(made), "another person's render": np.roll(panel.targets, 1, axis=0)}
    result, tiles = {}, []
    for name, faces in heads.items():
        before, after = [], {strength: [] for strength in a.strengths}
        for i in range(a.people):
            picture, reference = scene(faces[i]), judge.embed(panel.references[i, 0], panel.reference_keypoints[i])
            shown = [(f"{name} {i}", picture)]
            try:
                for strength in a.strengths:
                    refined = refine_face(
                        pipe, picture, analyzer, panel.prompts[i], panel.embeddings[i, 0], strength=strength, margin=a.margin, seed=i, **options
                    )
                    after[strength].append(judge.embed(np.asarray(refined.picture), refined.face.kps) @ reference)
                    shown.append((f"refined {strength:g}", refined.picture))
            except FaceError:
                continue
            before.append(judge.embed(np.asarray(picture), refined.face.kps) @ reference)
            tiles += shown if i < 3 else []
        told = {"faces": len(before), "before": interval(np.asarray(before))}
        for strength, values in after.items():
            gain = np.asarray(values) - before
            told[f"refined {strength:g}"], told[f"gain {strength:g}"] = interval(np.asarray(values)), interval(gain)
        result[name] = told
        print(f"{name}: {told}", flush=True)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "refine_face.json").write_text(
        json.dumps({"people": a.people, "judge": judge.name, "steps": a.steps, "margin": a.margin, **result}, indent=1) + "\n"
    )
    contact_sheet(tiles, columns=1 + len(a.strengths), side=216).save(a.out / "sheet.png")


if __name__ == "__main__":
    main()
