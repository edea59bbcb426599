"""Lines of jobs become single pictures, or are refused by file and line."""

import json
from pathlib import Path

import pytest

from instantid_jax.config import tiny
from instantid_jax.job_file import COMMON, JobError, read_jobs
from instantid_jax.sample_options import NOT_FOR_JOBS, RUN_OPTIONS, SampleOptions


def read(folder, *lines, **given):
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return read_jobs(path, SampleOptions(jobs=path, **given), tiny())


def test_people_prompts_and_seeds(tmp_path):
    lines = [
        {"face": "anna.jpg", "prompt": ["a", "b"], "seed": [3, 4], "steps": 7},
        "",
        {"face": ["x/b1.png", "/else/b2.png"], "person": "Bert Ö/1", "negative_prompt": None, "control_start": 0, "height": 64, "width": 128},
    ]
    pictures = read(tmp_path, *lines, prompt="given", seed=9, guidance_scale=2.0)
    assert [(p.line, p.person, p.options.prompt, p.options.seed, p.options.steps) for p in pictures] == [
        *[(1, "anna", "a", 3, 7), (1, "anna", "a", 4, 7), (1, "anna", "b", 3, 7), (1, "anna", "b", 4, 7)],
        (3, "Bert_Ö_1", "given", 9, 20),
    ]
    assert pictures[0].options.face == (tmp_path / "anna.jpg",)
    last = pictures[-1].options
    assert last.face == (tmp_path / "x/b1.png", Path("/else/b2.png")) and (last.height, last.width) == (64, 128)
    assert last.guidance_scale == 2.0 and last.num_images == 1 and last.identitynet_scale == 1.0
    assert isinstance(last.control_start, float)


def test_every_option_of_a_picture_is_a_field():
    loras = {"lora", "lora_scale", "allow_unknown_lora_keys"}
    assert set(COMMON) == {"weights", "weights_dtype", *loras, "controlnet", "analyzer", "analyzer_root", "dtype"}
    assert {*RUN_OPTIONS} == {"out", "jobs", "replay", "allow_changed_files", "aot", "aot_json", "distributed", "coordinator", "processes", "process"}
    editing = {"init_image", "strength", "mask_image", "mask_blur", "keep_unmasked", "sample_mode"}
    refining = {"refine_face", "refine_strength", "refine_margin", "refine_feather"}
    several = {"people", "view", "blend", "blend_steps", "blend_how", "compare"}
    assert set(NOT_FOR_JOBS) == {*several, *editing, *refining, "keep_face_vector"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"jobs\.jsonl, line 1: is no JSON object \("),
        ("[1]", "is no JSON object but"),
        ("[" * 100_000, "is no JSON object"),
        ({"face": "a", "stepps": 3}, r"unknown field 'stepps'; did you mean 'steps'\?"),
        ({"face": "a", "weights": "w"}, "weights is the same for all jobs; give it on the command line"),
        ({"face": "a", "out": "w"}, "out is the same for all jobs"),
        ({"face": "a", "num_images": 2}, "list the seeds"),
        ({"prompt": "x"}, "has no face"),
        ({"face": []}, "face is an empty list"),
        ({"face": 3}, "face must be a path, not 3"),
        ({"face": "a", "seed": [1, "2"]}, "seed must be a whole number, not '2'"),
        ({"face": "a", "seed": True}, "seed must be a whole number, not True"),
        ({"face": "a", "seed": -1}, "seed must be between 0 and 4294967295, not -1"),
        ({"face": "a", "prompt": []}, "prompt is an empty list"),
        ({"face": "a", "steps": 0}, "steps must be between 1 and 1000, not 0"),
        ({"face": "a", "steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"face": "a", "guidance_scale": "high"}, "guidance_scale must be a number, not 'high'"),
        ({"face": "a", "identitynet_scale": 11}, "identitynet_scale or control_scale must be between -10 and 10, not 11"),
        ({"face": "a", "sampler": "eular"}, r"sampler must be one of euler, .*did you mean 'euler'\?"),
        ({"face": "a", "control_image": "d.png"}, "control_image and control_scale go with controlnet"),
        ({"face": "a", "person": "../.."}, "person must have letters or digits"),
        ({"face": "a", "prompt_weighting": 1}, "prompt_weighting must be true or false, not 1"),
        ({"face": "a", "height": 65}, "height must be a multiple of 8, not 65"),
    ],
)
def test_what_cannot_be_used_is_refused_by_line(line, message, tmp_path):
    with pytest.raises(JobError, match=message):
        read(tmp_path, line)


def test_the_line_is_counted_and_nothing_is_no_job(tmp_path):
    with pytest.raises(JobError, match="line 3: "):
        read(tmp_path, {"face": "a"}, "", {"face": "a", "x": 1})
    with pytest.raises(JobError, match="line 1: names 'face' twice"):
        read(tmp_path, '{"face": "a", "face": "b"}')
    with pytest.raises(JobError, match="holds no jobs"):
        read(tmp_path, "", " ")
    (tmp_path / "jobs.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(JobError, match="is no UTF-8 text"):
        read_jobs(tmp_path / "jobs.jsonl", SampleOptions(), tiny())


def test_a_line_has_alternatives_styles_and_a_file_of_prompts(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,seed,style\nx,0,\n{y|z},,Photo\n")
    lines = [
        '{"face": "a.jpg", "prompt": ["{a|b}", "c"], "seed": [1, 2], "style": ["Photo", "Pixel art"]}',
        '{"face": "a.jpg", "prompt_file": "p.csv", "seed": [4, 5]}',
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    found = [(p.options.prompt, p.options.seed) for p in read_jobs(tmp_path / "jobs.jsonl", SampleOptions(prompt="given"), tiny())]
    texts = [f"{style} of {text}" for text in "abc" for style in ("photo", "pixel art")]
    assert found == [(text, seed) for text in texts for seed in (1, 2)] + [("x", 0)] + [(f"photo of {text}", s) for text in "yz" for s in (4, 5)]
