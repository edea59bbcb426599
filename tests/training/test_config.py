"""What a configuration accepts, and what it says of one that makes no sense."""

import dataclasses
from pathlib import Path

import pytest
import small

from instantid_jax.config import ConfigError, from_json, to_json
from instantid_jax.data.loader import LoaderConfig
from instantid_jax.data.record import DataError
from instantid_jax.parallel.mesh import make_mesh
from instantid_jax.training.checks import RANGES, missing_data, prepared_folder
from instantid_jax.training.config import INSTANTID, InitConfig, LossConfig, OptimizerConfig, StageConfig, TrainConfig
from instantid_jax.training.program import Program


def test_it_survives_json():
    config = small.recipe("out", "weights", optimizer__multipliers=((r"^adapter/", 2.0),), loss__timestep_bias_range=(3, 40))
    assert from_json(TrainConfig, to_json(config)) == config


def test_the_defaults_are_the_paper_s():
    config = TrainConfig(small.model())
    assert config.stage.trainable == INSTANTID and config.stage.identitynet_context == "identity"
    assert config.loss == LossConfig() and config.loss.weighting == "none" and config.loss.identity_weight == 0
    assert (config.loader.drop_text, config.loader.drop_identity, config.loader.drop_both) == (0, 0, 0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"stage__objective": "denoice"}, "TrainConfig.stage.objective: 'denoice' is none of .*; did you mean 'denoise'"),
        ({"optimizer__name": "adamv"}, "did you mean 'adamw'"),
        ({"optimizer__schedule": "cosin"}, "did you mean 'cosine'"),
        ({"loss__weighting": "minsnr"}, "did you mean 'min_snr'"),
        ({"guard__policy": "skipp"}, "did you mean 'skip'"),
        ({"checkpoint__metric": "validation/los"}, "did you mean 'validation/loss'"),
        ({"init": InitConfig(from_base=("identitnet",))}, "init.from_base knows identitynet, adapter, not 'identitnet'; did you mean 'identitynet'"),
        ({"init": InitConfig(random=("resample",))}, "did you mean 'resampler'"),
        ({"init": InitConfig(random=("adapter",))}, "names 'adapter' twice"),
        ({"optimizer__accumulate": 3}, "global_batch 8 must be divisible by accumulate x dcn_data x data x fsdp = 3"),
        ({"mesh__dcn_data": 3}, "x dcn_data x data x fsdp = 3"),
        ({"mesh__dcn_data": 0}, "mesh.dcn_data must be at least 1, got 0"),
        ({"mesh__data": 4, "mesh__fsdp": 4}, "x dcn_data x data x fsdp = 16"),
        ({"optimizer__warmup": 5}, "warmup 5 is longer than the run of 4 steps"),
        ({"optimizer__name": "prodigy"}, "prodigy finds the step size itself; .* got 0.001"),
        ({"loss__timestep_bias": "range", "loss__timestep_bias_range": (500, 400)}, "must lie in 0 to 1000, got 500 to 400"),
        ({"stage__objective": "reconstruct"}, "reconstruct needs pictures; set loader.cached_latents to False"),
        ({"loss__crop": 7}, "multiple of the autoencoder's 2 pixels, got 7"),
        ({"checkpoint__keep_best": 1}, "ranks checkpoints by validation/loss"),
        ({"model": small.model("v_prediction"), "loss__weighting": "clipped_v"}, "clipped_v is for networks that predict noise"),
        ({"stage__objective": "recognize", "validation__samples_every": 2}, "makes no pictures"),
        ({"stage": StageConfig(trainable=("^unet/", "a("))}, r"stage.trainable: 'a\(' is no regular expression \(missing \)"),
        ({"optimizer__multipliers": (("[", 2.0),)}, r"optimizer.multipliers: '\[' is no regular expression \(unterminated character set"),
        ({"prepare": ("portraits --train 3",)}, "prepare: the line 'portraits --train 3' needs --out and a folder"),
        ({"prepare": ("portraits --out=x", "portraits --out")}, "the line 'portraits --out' cannot be read .*expected one argument"),
        ({"prepare": ("portraits --out 'x",)}, "cannot be read .*No closing quotation"),
        ({"loader__keypoint_scale": 0.5}, "drawn at model.keypoint_scale, which is .*; set that one, not loader.keypoint_scale, got 0.5"),
        ({"validation__samples_every": 2}, "samples_every needs pictures of 64 pixels or more; the loader gives 16"),
    ],
)
def test_what_does_not_fit_is_named(fields, says):
    with pytest.raises(ConfigError, match=says):
        small.recipe("out", "weights", **fields)


@pytest.mark.parametrize(
    ("fields", "metric", "has"),
    [
        ({"stage": StageConfig(adapter=False, identitynet_context="text")}, "wrong_person_gap", "loss, validation/wrong_pose_gap"),
        ({"stage": StageConfig(identitynet=False)}, "wrong_pose_gap", "loss, validation/wrong_person_gap"),
        ({"loader__keypoint_style": "none"}, "wrong_pose_gap", "loss, validation/wrong_person_gap"),
        ({"stage": StageConfig(objective="recognize")}, "wrong_pose_gap", "loss"),
    ],
)
def test_a_metric_that_the_stage_does_not_measure(fields, metric, has):
    ranked = {"validation__every": 1, "checkpoint__every": 1, "checkpoint__metric": f"validation/{metric}"}
    small.recipe("out", "weights", **fields, **ranked)  # nothing is ranked by it
    with pytest.raises(ConfigError, match=f"checkpoint.metric validation/{metric} is not measured in this stage; it has validation/{has}$"):
        small.recipe("out", "weights", **fields, **ranked, checkpoint__keep_best=1)


@pytest.mark.parametrize("line", ["portraits --out here --train 3", "portraits --train 3 --out=here", "portraits --train 3 --out 'here'"])
def test_where_a_line_of_prepare_writes(line):
    assert prepared_folder(line) == Path("here")


def test_only_what_is_needed_and_missing_is_prepared(tmp_path):
    heads, latents = tmp_path / "heads", tmp_path / "latents"
    lines = (f"portraits --out {heads}", f"cache --data={heads} --out {latents}", f"portraits --out {tmp_path}/other")
    assert missing_data(lines, [str(latents)]) == list(lines[:2])
    assert missing_data(lines, [str(heads)]) == [lines[0]]
    assert missing_data(lines, ["elsewhere"]) == []  # data of one's own: nothing of the recipe's is made

    def made(folder):
        (folder / "x" / "1.0.0").mkdir(parents=True)
        (folder / "x" / "1.0.0" / "dataset_info.json").write_text("{}")

    made(heads)
    assert missing_data(lines, [str(latents)]) == [lines[1]]
    made(latents)
    assert missing_data(lines, [str(latents)]) == []


def test_an_identity_loss_needs_a_clean_latent():
    model = small.model()
    pure = dataclasses.replace(model, scheduler=dataclasses.replace(model.scheduler, rescale_betas_zero_snr=True))
    with pytest.raises(ConfigError, match="noise prediction at zero SNR"):
        small.recipe("out", "weights", model=pure, loss__identity_weight=0.1)


@pytest.mark.parametrize("path", sorted(RANGES))
def test_numbers_out_of_range_are_named(path):
    low, high = RANGES[path]
    fields = {path.replace(".", "__"): low - 1, "checkpoint__every": 2} | ({path.replace(".", "__"): low - 1})
    with pytest.raises(ConfigError, match=f"TrainConfig: {path} must be (at least|between)"):
        small.recipe("out", "weights", **fields)
    if high != float("inf"):
        with pytest.raises(ConfigError, match=f"between {low:g} and {high:g}, got {high + 1:g}"):
            small.recipe("out", "weights", **{path.replace(".", "__"): high + 1})


def test_every_number_has_a_range():
    config = TrainConfig(small.model())
    free = {"seed", "init.condition_gain", "init.latent_logvar", "validation.guidance_scale"}
    numbers = {"steps"}
    for part in ("init", "loss", "optimizer", "mesh", "checkpoint", "guard", "log", "validation"):
        hints = {field.name: str(field.type) for field in dataclasses.fields(getattr(config, part))}
        numbers |= {f"{part}.{name}" for name, kind in hints.items() if kind.split(" ")[0] in ("int", "float")}
    assert numbers - free == RANGES.keys()


def test_a_typo_in_saved_json_gives_the_nearest_name():
    text = to_json(TrainConfig(small.model())).replace('"learning_rate"', '"lerning_rate"')
    with pytest.raises(ConfigError, match=r"TrainConfig.optimizer: unknown field 'lerning_rate'; did you mean 'learning_rate'"):
        from_json(TrainConfig, text)


@pytest.mark.parametrize(
    ("stage", "networks"),
    [
        (StageConfig(), {"vae", "text_encoder", "text_encoder_2", "unet", "identitynet", "adapter", "resampler"}),
        (StageConfig(identitynet=False), {"vae", "text_encoder", "text_encoder_2", "unet", "adapter", "resampler"}),
        (StageConfig(adapter=False), {"vae", "text_encoder", "text_encoder_2", "unet", "identitynet", "resampler"}),
        (StageConfig(adapter=False, identitynet_context="text"), {"vae", "text_encoder", "text_encoder_2", "unet", "identitynet"}),
        (StageConfig(objective="reconstruct"), {"vae"}),
        (StageConfig(objective="recognize"), {"vae", "recognizer"}),
    ],
)
def test_a_stage_runs_only_what_it_needs(stage, networks):
    assert set(stage.networks) == networks


def test_an_identity_loss_brings_its_critic():
    assert "recognizer" in small.recipe("out", "weights", loss__identity_weight=0.1).networks


def test_the_seed_of_the_run_decides_the_order():
    config = small.recipe("out", "weights", seed=7, loader__seed=2, optimizer=OptimizerConfig())
    assert config.data_loader.seed == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "data"}, "TrainConfig.data is 'data', a str"),
        ({"prepare": "portraits --out x"}, "TrainConfig.prepare is 'portraits --out x', a str"),
        ({"steps": "100"}, "TrainConfig.steps is '100', a str"),
        ({"steps": 10.5}, "TrainConfig.steps is 10.5, a float"),
        ({"seed": True}, "TrainConfig.seed is True, a bool"),
    ],
)
def test_a_value_of_another_type_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(small.quick("unused", "unused"), **change)


def test_a_number_of_the_loader_that_is_none_is_named():
    with pytest.raises(DataError, match="LoaderConfig: global_batch must be a number, got '8'"):
        LoaderConfig(global_batch="8")  # type: ignore[arg-type]


def test_a_learning_rate_for_nothing_is_refused():
    config = small.recipe("unused", "unused", optimizer__multipliers=(("^resamplr", 2.0),))
    with pytest.raises(ConfigError, match="'\\^resamplr' matches no trained parameter; those are of adapter, identitynet, resampler"):
        Program(config, make_mesh())
