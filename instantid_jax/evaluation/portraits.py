"""Measures a model of rendered portraits on people it never saw: identity, pose, prompt, with ceilings and confidence intervals.

    python -m instantid_jax.evaluation.portraits --identities 100 --out DIR

writes DIR/portraits.json, DIR/portraits.md and DIR/contact_sheet.png. Pictures are kept in DIR/cache by all that decides them, so
a run that was stopped goes on, and another arm costs only itself. What the figures mean: docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from instantid_jax import __version__
from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.data.portraits import PortraitWorld
from instantid_jax.defaults import NOTICE, default_pipeline
from instantid_jax.evaluation.faces import Examiner
from instantid_jax.evaluation.generate import Painter, Sampling
from instantid_jax.evaluation.judges import load_judge
from instantid_jax.evaluation.panel import FIRST, Panel, check_people, fit_text_judge, make_panel
from instantid_jax.evaluation.report import contact_sheet, flatten, markdown
from instantid_jax.evaluation.store import Store
from instantid_jax.evaluation.suite import ARMS, BASE, MAIN, TARGETS, ArmResult, Bench, check_arms
from instantid_jax.face import load_analyzer
from instantid_jax.options import OptionError, Range, check_options, status_of, while_read, wrong_options
from instantid_jax.pipeline import InstantIDPipeline
from instantid_jax.running import keep_compiled

__all__ = ["Settings", "main", "run"]

_REAL_SIZE = 64
_SHEET = {"both": "both", "identitynet_only": "IdentityNet only", "adapter_only": "adapter only", "neither": "neither"}


@dataclass(frozen=True)
class Settings:
    """Measures a model of rendered portraits on people it never saw."""

    weights: Path | None = None
    """Folder of weights that the pipeline loads; without it the model that sample.py draws with by default."""
    identities: int = 100
    """How many people, at most 1000 of test, 500 of validation."""
    split: Literal["test", "validation"] = "test"
    """Whom to draw: choose settings and checkpoints on validation, and report on test."""
    out: Path | None = None
    """Folder for the results and the cache; needed unless --real-only."""
    judge: str = "dlib"
    """The recogniser that judges: dlib (pip install "instantid_jax[eval,judge]"), or the path of fr_feature.onnx."""
    arms: tuple[str, ...] = ()
    """Arms of the table; all by default. "both" and "neither" are always there."""
    steps: int = 20
    """Denoising steps."""
    sampler: str = "euler"
    """As in sample.py."""
    guidance_scale: float = 2.0
    """Classifier-free guidance."""
    identitynet_scale: float = 1.0
    """Full strength of IdentityNet."""
    adapter_scale: float = 1.0
    """Full strength of the image adapter."""
    seed: int = 0
    """Person i is drawn from the noise of seed + i, in every arm."""
    batch: int = 20
    """Pictures drawn at once."""
    real_only: bool = False
    """Print the ceilings, which need no weights, and stop."""


@while_read
def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    settings = tyro.cli(Settings, args=arguments, description=__doc__)
    keep_compiled()
    try:
        run(settings)
    except (ValueError, OSError) as error:
        print(f"portraits: {error}", file=sys.stderr)
        return status_of(error)
    return 0


def run(s: Settings) -> dict[str, Any]:
    """Measures, writes, prints, and returns what portraits.json holds. Raises ValueError (for options `OptionError`) or OSError."""
    with wrong_options():
        names = check_arms(s.arms)
        check_people(s.identities, s.split)
    check_options(s, {"steps": Range(1), "batch": Range(1)})
    store = Store(None if s.out is None else s.out / "cache")
    if s.real_only:
        bench = _bench(s, "opencv", PortraitWorld(image_size=_REAL_SIZE), store)
        figures = flatten(bench.ceilings())
        print(json.dumps(figures, indent=1))
        return figures
    if s.out is None:
        raise OptionError("no --out given: name a folder for the results")
    if s.weights is None:
        print(NOTICE, file=sys.stderr)
    pipe = default_pipeline() if s.weights is None else InstantIDPipeline.from_pretrained(s.weights)
    size = pipe.config.unet.sample_size * pipe.config.vae.downscale
    sampling = Sampling(size, s.steps, s.guidance_scale, s.sampler, pipe.config.keypoint_scale)
    painter = Painter(pipe, sampling, store, s.batch)
    bench = _bench(s, pipe.config.face_analyzer, PortraitWorld(image_size=size), store)
    results = _run_arms(s, names, bench, painter)
    result = _result(s, bench, painter, {name: results[name] for name in names})
    _write(s.out, result, _sheet(bench.panel, results, sampling.keypoint_scale))
    return result


def _bench(s: Settings, analyzer_name: str, world: PortraitWorld, store: Store) -> Bench:
    judge, analyzer = load_judge(s.judge), load_analyzer(analyzer_name)
    panel = make_panel(world, s.identities, analyzer, s.split)
    return Bench(panel, Examiner(analyzer, judge, store), fit_text_judge(world, store))


def _run_arms(s: Settings, names: list[str], bench: Bench, painter: Painter) -> dict[str, ArmResult]:
    """The arm without identity first, since the others are compared with it."""
    results: dict[str, ArmResult] = {}
    for name in sorted(names, key=lambda name: name != BASE):
        full = s.identitynet_scale, s.adapter_scale
        results[name] = bench.run(ARMS[name], painter, full, s.seed, results.get(BASE))
        print(f"{name}: {results[name].seconds:.1f} s", file=sys.stderr)
    return results


def _result(s: Settings, bench: Bench, painter: Painter, results: dict[str, ArmResult]) -> dict[str, Any]:
    """The main arm's figures under their own names, all arms, the ceilings, the targets, and what everything depends on."""
    main_figures = results[MAIN].figures
    settings = {name: value for name, value in dataclasses.asdict(s).items() if name not in ("weights", "out", "real_only", "arms", "batch")}
    settings |= {"size": painter.sampling.size, "judge": bench.judge, "conditioned_by": bench.conditioner, "weights_sha256": painter.weights}
    first = FIRST[s.split]
    settings |= {"identity_seeds": [first, first + s.identities - 1], "instantid_jax": __version__, "jax": jax.__version__}
    return {
        **flatten(main_figures),
        "targets": [{"target": text, "met": bool(met(main_figures))} for text, met in TARGETS],
        "arms": {name: flatten(result.figures) | {"asked_crops": result.asked_crops} for name, result in results.items()},
        "ceilings": flatten(bench.ceilings()),
        "settings": settings,
    }


def _sheet(panel: Panel, results: dict[str, ArmResult], keypoint_scale: float) -> dict[str, np.ndarray]:
    side = panel.targets.shape[1]
    poses = np.stack([draw_keypoints((side, side), points, keypoint_scale) for points in panel.keypoints])
    arms = {title: results[name].pictures for name, title in _SHEET.items() if name in results}
    return {"reference": panel.references[:, 0], "pose": poses} | arms | {"real": panel.targets}


def _write(out: Path, result: dict[str, Any], sheet: dict[str, np.ndarray]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table = markdown(result)
    (out / "portraits.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "portraits.md").write_text(table, encoding="utf-8")
    contact_sheet(sheet).save(out / "contact_sheet.png")
    print(table)
    print("\n".join(str(out / name) for name in ("portraits.json", "portraits.md", "contact_sheet.png")))


if __name__ == "__main__":
    raise SystemExit(main())
