"""The whole measurement with painters whose answer is known: one that draws the truth, one that draws somebody else."""

import numpy as np
import pytest

from instantid_jax.evaluation.faces import Examiner
from instantid_jax.evaluation.report import contact_sheet, flatten, markdown
from instantid_jax.evaluation.store import Store
from instantid_jax.evaluation.suite import ARMS, TARGETS, Arm, Bench, check_arms

from .conftest import ColorJudge

NEEDED = (
    *("cosine_same", "cosine_other", "ceiling_same", "ceiling_other", "gap_ratio", "auc", "retrieval_top1", "retrieval_top5", "detected"),
    *("keypoint_nme_median", "keypoint_nme_ceiling", "text_control_with_identity", "text_control_without_identity"),
)
EVERYTHING = Arm(1, 1, styled=1000)


class Painter:
    """Draws the real pictures of the panel, of person i + `offset` in place of person i; remembers the jobs."""

    def __init__(self, panel, offset=0):
        self.panel, self.offset, self.jobs = panel, offset, []

    def paint(self, jobs):
        self.jobs = jobs
        n = len(self.panel)
        photos, styled = (np.roll(x, -self.offset, axis=0) for x in (self.panel.targets, self.panel.styled_targets))
        return np.concatenate([photos, styled[: len(jobs) - n]])


@pytest.fixture(scope="module")
def bench(panel, analyzer, text_judge):
    return Bench(panel, Examiner(analyzer, ColorJudge(), Store(None)), text_judge, resamples=300)


def test_the_panel_asks_as_it_should(panel, world):
    assert panel.seeds.tolist() == [0, 1, 2, 3, 4] and all(world.split(seed) == "test" for seed in panel.seeds.tolist())
    assert panel.references.shape == (5, 4, 128, 128, 3) and panel.targets.shape == (5, 64, 64, 3)
    assert panel.embeddings.shape == (5, 4, 128)
    assert sorted(panel.styles) == ["noir", "photo", "pixel art", "sketch", "watercolor"]
    for prompt, background, hair in zip(panel.prompts, panel.backgrounds, panel.hairs, strict=True):
        assert prompt.startswith("photo of a") and "person" in prompt and f"{background} background" in prompt and hair in prompt
        assert not any(word in prompt.split() for word in ("man", "woman", "young", "old", "african", "asian", "caucasian", "skin"))
    cosines = np.einsum("pvd,pwd->pvw", *[panel.embeddings / np.linalg.norm(panel.embeddings, axis=-1, keepdims=True)] * 2)
    assert cosines[:, 0, 1:].min() > 0.5  # the references show one person


def test_a_perfect_model_reaches_the_ceilings(bench, panel):
    result = bench.run(EVERYTHING, Painter(panel), (0.8, 0.6), seed=7)
    figures, ceilings = result.figures, bench.ceilings()
    assert figures["gap_ratio"] == pytest.approx((1, 1, 1))
    assert figures["auc"] == ceilings["ceiling_auc"] and figures["cosine_same"] == figures["ceiling_same"]
    assert figures["keypoint_nme_median"] == figures["keypoint_nme_ceiling"]
    assert figures["detected"].value == 1 and result.asked_crops == 0
    assert figures["text_control_with_identity"] == ceilings["ceiling_text_control"]
    assert figures["text_control_lost"] == (0, 0, 0)
    assert [text for text, met in TARGETS if not met(figures)] in ([], ["auc >= 0.80"])  # five people by their colours


def test_another_person_is_noticed(bench, panel):
    """The neighbour's pictures: their identity, pose and prompt."""
    base = bench.run(EVERYTHING, Painter(panel), (1, 1), seed=0)
    figures = bench.run(EVERYTHING, Painter(panel, offset=1), (1, 1), seed=0, base=base).figures
    assert figures["gap_ratio"].value < 0.3 and figures["auc"].value < 0.6
    assert figures["keypoint_nme_median"].value > figures["keypoint_nme_ceiling"].value + 0.06
    assert figures["text_control_lost"].value > 0.4
    assert sum(met(figures) for _, met in TARGETS) == 1  # only a face is found


def test_pictures_without_faces_count(bench, panel):
    class Gray(Painter):
        def paint(self, jobs):
            return np.full((len(jobs), 64, 64, 3), 128, np.uint8) + np.arange(64, dtype=np.uint8)[:, None]

    result = bench.run(EVERYTHING, Gray(panel), (1, 1), seed=0)
    assert result.asked_crops == 5 and result.figures["detected"].value == 0
    assert result.figures["keypoint_nme_median"].value == np.inf
    assert not any(met(result.figures) for _, met in TARGETS[2:4])
    assert flatten(result.figures)["keypoint_nme_median"] is None


def test_arms_become_jobs(bench, panel):
    painter = Painter(panel)
    bench.run(Arm(0.5, 1, references=2, styled=2), painter, (0.8, 0.6), seed=7)
    assert [job.prompt for job in painter.jobs] == [*panel.prompts, *panel.styled_prompts[:2]]
    assert {(job.identitynet, job.adapter) for job in painter.jobs} == {(0.4, 0.6)}
    assert [job.seed for job in painter.jobs] == [7, 8, 9, 10, 11, 7, 8]
    np.testing.assert_allclose(painter.jobs[3].embedding, panel.embeddings[3, :2].mean(0))
    np.testing.assert_array_equal(painter.jobs[6].keypoints, panel.keypoints[1])


def test_an_empty_prompt_asks_for_nothing(bench, panel):
    painter = Painter(panel)
    figures = bench.run(ARMS["empty_prompt"], painter, (1, 1), seed=0).figures
    assert {job.prompt for job in painter.jobs} == {""} and len(painter.jobs) == 5
    assert figures["text_control_with_identity"] is None and figures["gap_ratio"] is not None


def test_arms_by_name():
    assert check_arms(()) == list(ARMS)
    assert check_arms(("references_4",)) == ["both", "neither", "references_4"]
    with pytest.raises(ValueError, match="no arm 'boht'; the arms are both, "):
        check_arms(("boht",))
    corners = [ARMS[name] for name in ("both", "identitynet_only", "adapter_only", "neither")]
    assert [(arm.identitynet, arm.adapter) for arm in corners] == [(1, 1), (1, 0), (0, 1), (0, 0)]
    assert len({(arm.identitynet, arm.adapter) for arm in ARMS.values()}) == 9
    assert [ARMS[f"references_{n}"].references for n in (1, 2, 4)] == [1, 2, 4]


def test_report_has_every_figure(bench, panel):
    figures = flatten(bench.run(EVERYTHING, Painter(panel), (1, 1), seed=0).figures)
    for name in NEEDED:
        low, high = figures[f"{name}_ci"]
        assert low <= figures[name] <= high
    settings = {"identities": 5, "split": "test", "judge": "colours", "steps": 1, "sampler": "euler", "guidance_scale": 1.0, "size": 64}
    settings |= {"identitynet_scale": 1.0, "adapter_scale": 1.0}
    targets = [{"target": "auc >= 0.80", "met": False}]
    text = markdown({"arms": {"both": figures}, "ceilings": flatten(bench.ceilings()), "settings": settings, "targets": targets})
    assert "| both | 1.00 [1.00, 1.00] |" in text and "| real renders | 1 |" in text and "| auc >= 0.80 | missed |" in text
    assert "| IdentityNet 1 | - | - | 1.00 [1.00, 1.00] |" in text


def test_contact_sheet_shows_rows_of_people(panel):
    sheet = contact_sheet({"reference": panel.references[:, 0], "real": panel.targets}, rows=3)
    assert sheet.size == (256, 18 + 3 * 128)
    np.testing.assert_array_equal(np.asarray(sheet)[18 + 128 : 18 + 256, :128], panel.references[1, 0])
