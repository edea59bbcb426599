"""The recipes that come along load; mistakes in one are named."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from instantid_jax.config import ConfigError, IdentityNetConfig, portraits, sdxl, to_json
from instantid_jax.data.loader import make_loader
from instantid_jax.data.sources import MemorySource
from instantid_jax.options import OptionError
from instantid_jax.parallel.mesh import make_mesh
from instantid_jax.paths import flatten
from instantid_jax.training.program import Program
from instantid_jax.training.recipes import load_recipe
from instantid_jax.training.run import USED
from instantid_jax.training.state import InitError, initial_state, split
from instantid_jax.training.step import make_step
from instantid_jax.training.weights import tokenizers_for

ROOT = Path(__file__).parents[2]
RECIPES = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.py") if file.name != "__init__.py")
ABLATIONS = [name for name in RECIPES if "/ablations/" in name]


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """A working folder with the recipes, in which the earlier stages have left their models."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for folder in ("runs/portraits_vae", "runs/portraits_base", "runs/portraits_recognizer", "runs/portraits"):
        (tmp_path / folder / "weights").mkdir(parents=True)
        (tmp_path / folder / "weights/config.json").write_text(to_json(portraits()))
    shipped = tmp_path / "instantid_jax/assets/portraits/model"
    shipped.mkdir(parents=True)
    (shipped / "config.json").write_text(to_json(portraits()))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_it_loads(name, stages):
    config = load_recipe(name)
    assert config.out.startswith("runs/")
    assert len({load_recipe(other).out for other in RECIPES}) == len(RECIPES)  # no two write to one folder


def test_the_paper_s_recipe(stages):
    config = load_recipe("configs/instantid.py")
    assert config.model == sdxl() and config.loader.global_batch == 96 and config.loader.resolution == 1024
    assert config.loss.weighting == "none" and config.loader.drop_text == config.loader.drop_identity == config.loader.drop_both == 0


def test_a_stage_whose_base_is_not_there_says_so(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InitError, match=r"runs/portraits_base/weights holds no weights .*run the recipe that makes them first"):
        load_recipe("configs/portraits.py")


def test_names(stages):
    with pytest.raises(OptionError, match=r"name a recipe: --config FILE; there are configs/ablations/dropout_5.py, "):
        load_recipe(None)
    with pytest.raises(ConfigError, match=r"there is no recipe configs/portrait.py; did you mean 'configs/portraits.py'\?; there are"):
        load_recipe("configs/portrait.py")
    with pytest.raises(ConfigError, match=r"README.md is no recipe, which is a Python file; there are configs/"):
        load_recipe(str(ROOT / "README.md"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "is no recipe: it defines no function config"),
        ("def config(): return 3", r"config\(\) gives int, not TrainConfig"),
        (
            "from instantid_jax.training.config import OptimizerConfig\ndef config(): return OptimizerConfig(lerning_rate=1)",
            "OptimizerConfig has no field 'lerning_rate'; did you mean 'learning_rate'",
        ),
        ("from instantid_jax.config import UNetConfig\ndef config(): return UNetConfig(in_channel=1)", "did you mean 'in_channels'"),
        (
            "import dataclasses\nfrom instantid_jax.training.recipes import load_recipe\n"
            "def config(): return dataclasses.replace(load_recipe('configs/instantid.py'), step=3)",
            "TrainConfig has no field 'step'; did you mean 'steps'",
        ),
        ("x = 1\ndef config(:\n", r"^mine\.py, line 2: invalid syntax$"),
        ("\nimport no_such_module", r"^mine\.py, line 2: ModuleNotFoundError: No module named 'no_such_module'$"),
        ("def config():\n    return part()\n\ndef part():\n    return {}['x']", r"^mine\.py, line 5: KeyError: 'x'$"),
        ("def config(needed): return needed", r"^mine\.py: TypeError: config\(\) missing 1 required positional argument: 'needed'$"),
        ("import json\ndef config(): return json.loads('{')", r"^mine\.py, line 2: JSONDecodeError: Expecting property name"),
        (
            "from instantid_jax.training.config import *\ndef config(): return OptimizerConfig(b3=1)",
            r"^mine\.py, line 2: OptimizerConfig has no field 'b3'",
        ),
    ],
)
def test_mistakes_are_named(stages, text, says):
    Path("mine.py").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_recipe("mine.py")


def shrunk(config):
    """The recipe at the size of the tests: what it changes of the model, the loader and the stage stays."""
    model, wanted = small.model(), config.model.resampler
    fields = {"kind": wanted.kind, "num_queries": wanted.num_queries, "normalize": wanted.normalize}
    if wanted.embedding_dim == 768:
        fields["embedding_dim"] = 768
    resampler = dataclasses.replace(model.resampler, **fields)
    unet = dataclasses.replace(
        model.unet,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(16,),
        transformer_layers_per_block=(1,),
        attention_head_dim=(2,),
    )
    model = dataclasses.replace(
        model,
        unet=unet,
        identitynet=IdentityNetConfig.from_unet(unet, (4, 4)),
        resampler=resampler,
        face_analyzer=config.model.face_analyzer,
        keypoint_scale=0.15,
    )
    changes = {"global_batch": 2, "resolution": small.SIDE, "buckets": (), "cached_latents": True, "cached_text": False, "num_threads": 0}
    if config.loader.paired_reference:
        changes["paired_reference"] = config.loader.paired_reference
    recognizer = small.recipe("x", "x").recognizer
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-3, warmup=0, accumulate=1)
    loader = dataclasses.replace(config.loader, **changes)
    config = small.changed(config, validation__samples_every=None)
    return dataclasses.replace(config, model=model, loader=loader, steps=4, recognizer=recognizer, optimizer=optimizer, compute=COMPUTE)


COMPUTE = small.recipe("x", "x").compute


def records(width):
    def one(i):
        plain, rng = small.record(i), np.random.default_rng(i)
        fields = {"embeddings": rng.normal(size=(1, width)).astype(np.float32), "landmarks": rng.uniform(2, 14, (12, 2)).astype(np.float32)}
        return dataclasses.replace(plain, caption_identity=f"{plain.caption}, old", **fields)

    return MemorySource([one(i) for i in range(8)])


def batch_of(config, folder):
    source = records(config.model.resampler.embedding_dim)
    loader = make_loader(source, config.data_loader, tokenizers_for(config.model, config.init, folder))
    return {name: jnp.asarray(x) for name, x in next(loader).items() if name in USED}


def one_step(config, batch):
    """(paths that moved, paths that are frozen, what was told) of a step taken operation by operation, which compiles next to nothing."""
    program, sgd = Program(config, make_mesh()), optax.sgd(0.1)
    weights = {name: jax.tree.map(jnp.asarray, small.draw(network.abstract)) for name, network in program.networks.items()}
    trained, frozen = split(weights, config.stage)
    plain = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema=None))
    with jax.disable_jit():
        after, told = make_step(program.objective, plain, sgd)(initial_state(trained, sgd, ema=False), frozen, batch, np.float32(np.inf))
    old, new = flatten(trained), flatten(after.parameters)
    return {path for path in new if not np.array_equal(new[path], old[path])}, set(flatten(frozen)), told


def roots(paths):
    return {path.split("/")[0] for path in paths}


def tokens(count):
    return lambda config, moved, frozen, batch: config.model.resampler.num_queries == count and "resampler/latents" in moved


def below_unet(paths):
    return {path for path in paths if path.startswith("unet/")}


def queries(paths):
    return {path for path in below_unet(paths) if "attn2/to_q/" in path}


FULL = {"identitynet", "adapter", "resampler"}
DIFFERENCE = {
    "no_identitynet": lambda config, moved, frozen, batch: roots(moved) == {"adapter", "resampler"} and "identitynet" not in roots(frozen),
    "no_adapter": lambda config, moved, frozen, batch: roots(moved) == {"identitynet", "resampler"} and "adapter" not in roots(frozen),
    "text_in_identitynet": lambda config, moved, frozen, batch: config.stage.identitynet_context == "text" and roots(moved) == FULL,
    "keypoints_none": lambda config, moved, frozen, batch: "keypoint_image" not in batch and roots(moved) == FULL,
    "keypoints_dense": lambda config, moved, frozen, batch: config.loader.keypoint_style == "dense" and roots(moved) == FULL,
    "tokens_1": tokens(1),
    "tokens_4": tokens(4),
    "tokens_32": tokens(32),
    "mlp": lambda config, moved, frozen, batch: "resampler/latents" not in moved | frozen and "resampler" in roots(moved),
    "normalized_embedding": lambda config, moved, frozen, batch: config.model.resampler.normalize and roots(moved) == FULL,
    "dropout_5": lambda config, moved, frozen, batch: (config.loader.drop_text, config.loader.drop_identity, config.loader.drop_both) == (0.05,) * 3,
    "train_queries": lambda config, moved, frozen, batch: queries(moved) == queries(moved | frozen) == below_unet(moved) != set(),
    "image_embedding": lambda config, moved, frozen, batch: batch["embedding"].shape == (2, 768) and roots(moved) == FULL,
}


SLOW = (
    "no_adapter",
    "mlp",
    "tokens_4",
    "tokens_32",
    "dropout_5",
    "keypoints_none",
    "keypoints_dense",
    "normalized_embedding",
    "image_embedding",
    "portraits_paper",
)
PARAMETERS = [pytest.param(name, marks=[pytest.mark.slow] if Path(name).stem in SLOW else []) for name in ABLATIONS]


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_ablation_takes_a_step_that_differs_as_it_says(name, stages, tmp_path):
    config = shrunk(load_recipe(name))
    batch = batch_of(config, tmp_path)
    moved, frozen, told = one_step(config, batch)
    assert told.good and told.loss > 0 and not moved & frozen
    check = DIFFERENCE.get(Path(name).stem)
    if check is not None:
        assert check(config, moved, frozen, batch)
        base = json.loads(to_json(load_recipe("configs/instantid.py")))
        differ = {field for field, value in json.loads(to_json(load_recipe(name))).items() if value != base[field]}
        assert differ - {"out"} and differ <= {"out", "model", "loader", "stage", "init"}  # one idea, nothing beside


def test_denser_landmarks_are_seen(stages, tmp_path):
    five, dense, none = (shrunk(load_recipe(f"configs/{name}.py")) for name in ("instantid", "ablations/keypoints_dense", "ablations/keypoints_none"))
    plain, more = (batch_of(config, tmp_path)["keypoint_image"] for config in (five, dense))
    assert np.count_nonzero(more) > np.count_nonzero(plain) > 0
    assert "keypoint_image" not in batch_of(none, tmp_path)


def test_every_demanded_ablation_is_there():
    assert {Path(name).stem for name in ABLATIONS} >= DIFFERENCE.keys()
