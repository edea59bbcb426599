"""The floors of the house: imports only go down.

Every module stands on a floor, by the first pattern of FLOORS that matches its whole name. It may import modules of lower
floors, and of its own floor within its own package. BANS name what is kept out of a part of the code whatever the floors say.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = (
    (r"train|sample|convert_weights\.__main__|instantid_jax\.evaluation\.portraits", 6),
    (r"instantid_jax\.(parallel\.aot(_programs)?|sample_edits)", 5),
    (r"instantid_jax\.(training\.(loop|samples|plan)|evaluation\.(suite|generate)|defaults|demo|sampling|variants|replay|jobs|launch(\..+)?)", 5),
    (r"instantid_jax\.(pipeline|denoise|prediction|request|strengths|references|output|sample_options|foreign|job_file|ledger|spread)", 4),
    (r"instantid_jax\.(people|people_file|group|prompts|metadata|editing|face_refine)", 4),
    (r"instantid_jax\.(training|evaluation)(\..+)?|instantid_jax\.data\.(cache|prepare)", 4),
    (r"convert_weights(\..+)?", 4),
    (r"instantid_jax\.(models|parallel)(\..+)?|instantid_jax\.(checkpoint|lora|control_maps|onnx_map|onnx_pose)", 3),
    (r"instantid_jax\.data\.(drawing|transforms|inputs|filters|loader|resident|portrait.*|builder|preparation)", 3),
    (r"instantid_jax\.(nn|face|text|data)(\..+)?|instantid_jax\.(progress|running|watermark)", 2),
    (r"instantid_jax\.diffusion(\..+)?", 1),
    (r"instantid_jax(\.(config|mapped|options|paths|published))?", 0),
)

# (modules, what they do not import). Submodules of what is named are meant too.
ORACLES = r"torch|torchvision|diffusers|peft|tensorflow"
BANS = (
    (r".*", ORACLES),
    (r"instantid_jax(\..+)?", r"convert_weights|sample|train"),
    (r"instantid_jax\.diffusion(\..+)?", r"flax"),
    (r"instantid_jax\.(nn|models)(\..+)?", r"instantid_jax\.(diffusion|parallel|data)"),
    (r"(?!instantid_jax\.face\.analyzer$).*", r"insightface"),
    (r"(?!instantid_jax\.(face\.analyzer|onnx_map)$).*", r"onnxruntime"),
)
FACE_CLASSES = re.compile(r"Face(Detector|Recognizer)\w*")


def _modules() -> dict[str, Path]:
    files = [ROOT / "sample.py", ROOT / "train.py", *(ROOT / "instantid_jax").rglob("*.py"), *(ROOT / "convert_weights").rglob("*.py")]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    return {name: file for file, name in sorted(names.items(), key=lambda item: item[1])}


MODULES = _modules()


def floor(module: str) -> int | None:
    """The floor of a module by name, or None."""
    return next((level for pattern, level in FLOORS if re.fullmatch(pattern, module)), None)


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every module that the source imports, wherever: statements, also in functions, and `import_module("a literal")`.

    `from a import b` counts as a.b where that is a module here, else as a.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What is wrong with one module's imports, one sentence each."""
    own, wrong = floor(module), []
    if own is None:
        return [f"{module} has no floor; add it to FLOORS"]
    if module == "instantid_jax":  # the public names, which are imported on first use
        source = source.split("if TYPE_CHECKING:")[0]
    for target in imports(source, module, is_package):
        for who, what in BANS:
            if re.fullmatch(who, module) and re.match(rf"({what})(\.|$)", target):
                wrong.append(f"{module} imports {target}, which is kept out of it")
        level = floor(target)
        if level is not None and (level > own or (level == own and _package(target) != _package(module))):
            wrong.append(f"{module} (floor {own}) imports {target} (floor {level})")
    attributes = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    if module != "instantid_jax.face.analyzer" and any(FACE_CLASSES.fullmatch(name) for name in attributes):
        wrong.append(f"{module} uses OpenCV's face classes, which belong to instantid_jax.face.analyzer")
    return wrong


def _package(module: str) -> str:
    """instantid_jax.nn for instantid_jax.nn.norm; instantid_jax for its single modules; convert_weights for all of its own."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "instantid_jax" and any(m.startswith(".".join(parts[:2]) + ".") for m in MODULES) else parts[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    file = MODULES[module]
    assert violations(module, file.read_text(encoding="utf-8"), file.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("instantid_jax.nn.norm", "import instantid_jax.models.unet"),
        ("instantid_jax.nn.norm", "from instantid_jax.text import tokenizer"),
        ("instantid_jax.nn.norm", "from ..models import unet"),
        ("instantid_jax.nn.norm", "from instantid_jax import diffusion"),
        ("instantid_jax.models.unet", "def f():\n    from instantid_jax.parallel import mesh"),
        ("instantid_jax.diffusion.schedule", "from flax import nnx"),
        ("instantid_jax.pipeline", "import convert_weights.rules"),
        ("instantid_jax.pipeline", "import instantid_jax.defaults"),
        ("instantid_jax.pipeline", "import torch.nn"),
        ("sample", "import tensorflow as tf"),
        ("instantid_jax.face.align", "import importlib; importlib.import_module('onnxruntime')"),
        ("instantid_jax.face.align", "cv2.FaceDetectorYN.create('')"),
        ("instantid_jax.elsewhere", ""),
    ],
)
def test_the_rules_catch(module, source):
    assert violations(module, source)


def test_the_rules_allow():
    assert violations("instantid_jax.nn", "from .norm import GroupNorm", is_package=True) == []
    assert (
        violations("instantid_jax.nn.attention", "from .norm import GroupNorm\nimport jax, flax.nnx\nfrom instantid_jax.config import to_json") == []
    )
    assert violations("instantid_jax.face.analyzer", "import onnxruntime, insightface.app; cv2.FaceDetectorYN") == []
