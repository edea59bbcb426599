"""How well the invisible mark of `instantid_jax.watermark` is found again, and how often where it is not.

    python benchmarks/watermark.py                 the tables of docs/pictures.md
    python benchmarks/watermark.py --heads 20 --unmarked 100

Pictures of 64 pixels are rendered heads of people in turn in their styles, and what the small model makes of the people who come
along; those of 512 and 1024 are photos of scikit-image (squares out of their middle, resized) and rendered heads. Unmarked
pictures are more of the heads, and squares at random places of the photos. Intervals are Wilson's, 95 %.
"""

import argparse
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import skimage.data

from instantid_jax.data.portraits import PortraitWorld
from instantid_jax.defaults import PROMPTS, default_config, default_pipeline
from instantid_jax.demo import demo_prompts, draw_people
from instantid_jax.face import load_analyzer
from instantid_jax.sample_options import SampleOptions
from instantid_jax.watermark import detect_watermark, mark_picture

PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "retina.jpg", "rocket.jpg", "ihc.png", "hubble_deep_field.jpg", "motorcycle_left.png")


def jpeg(image: Image.Image, quality: int = 70) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def halved(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def cropped(image: Image.Image) -> Image.Image:
    """A tenth of either side is gone, as much left as right."""
    x, y = image.width // 20, image.height // 20
    return image.crop((x, y, image.width - x, image.height - y))


ATTACKS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as written": lambda image: image,
    "JPEG 70": jpeg,
    "half size": halved,
    "crop 10 %": cropped,
    "half size, JPEG 70": lambda image: jpeg(halved(image)),
    "crop 10 %, JPEG 70": lambda image: jpeg(cropped(image)),
}


def photos() -> list[Image.Image]:
    folder = Path(skimage.data.__file__).parent
    found = [Image.open(folder / name).convert("RGB") for name in PHOTOS]
    sides = [min(image.size) for image in found]
    return [
        image.crop(((image.width - s) // 2, (image.height - s) // 2, (image.width + s) // 2, (image.height + s) // 2))
        for image, s in zip(found, sides, strict=True)
    ]


def heads(first: int, count: int, size: int) -> Iterator[Image.Image]:
    world = PortraitWorld()
    for seed in range(first, first + count):
        person = world.identity(seed)
        yield Image.fromarray(world.render(person, world.view(person, seed), size).image)


def drawn() -> list[Image.Image]:
    analyzer = load_analyzer(default_config().face_analyzer, None)
    call = SampleOptions(prompt="x").filled().call()
    sheet = draw_people(default_pipeline(), analyzer, call, demo_prompts(None, None), None, lambda _: None)
    return [picture for row in sheet.rows for picture in row[3]]


def squares(images: list[Image.Image], count: int, size: int) -> Iterator[Image.Image]:
    random = np.random.default_rng(5)
    for i in range(count):
        image = images[i % len(images)]
        side = int(random.integers(image.width // 2, image.width + 1))
        x, y = random.integers(0, image.width - side + 1, 2)
        yield image.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.LANCZOS)


def interval(found: int, count: int) -> str:
    z, p = 1.96, found / count
    middle, half = (p + z * z / (2 * count)), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return f"{p:.2f} [{(middle - half) / (1 + z * z / count):.2f}, {(middle + half) / (1 + z * z / count):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=200)
    parser.add_argument("--unmarked", type=int, default=2000, help="of 64 pixels; a fifth as many of 512 and a twentieth of 1024")
    given = parser.parse_args()
    large = {size: [p.resize((size, size), Image.Resampling.LANCZOS) for p in photos()] + [*heads(1, 8, size)] for size in (512, 1024)}
    sets = {"64, rendered heads": [*heads(1, given.heads, 64)], f"64, drawn ({len(PROMPTS)} prompts)": drawn()}
    sets |= {f"{size}, photos and heads": images for size, images in large.items()}
    print("| pictures | n | PSNR, dB | " + " | ".join(ATTACKS) + " | marking, s |\n|" + "---|" * (len(ATTACKS) + 4))
    for name, images in sets.items():
        began = time.perf_counter()
        marked = [mark_picture(image) for image in images]
        seconds = (time.perf_counter() - began) / len(images)
        errors = [np.mean((np.asarray(m, np.float64) - np.asarray(i, np.float64)) ** 2) for m, i in zip(marked, images, strict=True)]
        psnr = 10 * np.log10(255**2 / np.asarray(errors))
        cells = []
        for attack in ATTACKS.values():
            cells.append(interval(sum(detect_watermark(attack(image)).marked for image in marked), len(marked)))
        print(f"| {name} | {len(images)} | {np.median(psnr):.1f} | " + " | ".join(cells) + f" | {seconds:.2f} |", flush=True)
    print("\n| unmarked | n | taken for marked | largest z, less its threshold | detecting, s |\n|---|---|---|---|---|")
    plain = {
        "64": heads(10_000, given.unmarked, 64),
        "512": squares(photos(), given.unmarked // 5, 512),
        "1024": squares(photos(), given.unmarked // 20, 1024),
    }
    for name, images in plain.items():
        began = time.perf_counter()
        found = [detect_watermark(image) for image in images]
        seconds = (time.perf_counter() - began) / len(found)
        worst = max(one.z - one.threshold for one in found)
        print(f"| {name} | {len(found)} | {sum(one.marked for one in found)} | {worst:.1f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
