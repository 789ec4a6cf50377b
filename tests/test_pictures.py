"""README's pictures: all are there, all are made by `python tests/pictures.py`, and from the recording that ships."""

from __future__ import annotations

import re
from pathlib import Path

import pictures
import pytest
from PIL import Image

README = (pictures.ROOT / "README.md").read_text(encoding="utf-8")
NAMES = pictures.names()


def test_readme_shows_what_the_command_makes_and_nothing_else() -> None:
    shown = re.findall(r"assets/screenshots/([\w.-]+)", README)
    assert sorted(shown) == sorted(NAMES) == sorted(file.name for file in pictures.FOLDER.iterdir())


def test_every_picture_says_what_it_shows_and_has_a_dark_one() -> None:
    blocks = re.findall(r"<picture>(.*?)</picture>", README, re.S)
    assert (
        len(re.findall(r"<img\b", README)) == len(blocks) == len(re.findall(r'<img [^>]*alt="[^"]{20,}"', README)) > 0
    )
    for block in blocks:
        dark = re.findall(r'media="([^"]*)" srcset="[^"]*-dark\.webp"', block)
        assert dark and all("prefers-color-scheme: dark" in media for media in dark)
    (moving,) = (block for block in blocks if "/demo-light.webp" in block)
    first = re.findall(r'media="([^"]*)" srcset="[^"]*/([\w-]+)\.webp"', moving)
    assert [name for media, name in first if "reduced-motion: reduce" in media] == [
        "demo-still-dark",
        "demo-still-light",
    ]
    assert [name for _, name in first] == ["demo-still-dark", "demo-still-light", "demo-dark"], (
        "the browser takes the first"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_of_the_recording_that_ships_and_small_enough(name: str) -> None:
    """Where this fails after `python -m spec_decode record`: `python tests/pictures.py`."""
    with Image.open(pictures.FOLDER / name) as picture:
        assert picture.getexif()[pictures.DESCRIPTION] == pictures.digest()
        moves = name.startswith("demo-") and "still" not in name
        assert (pictures.FOLDER / name).stat().st_size < (1_500_000 if moves else 250_000)
        assert not name.startswith("demo") or 960 <= picture.width <= 1200
        assert picture.is_animated == moves  # type: ignore[attr-defined]
        if moves:
            with Image.open(pictures.FOLDER / name.replace("demo", "demo-still")) as still:
                assert still.size == picture.size, "the page does not move where one takes the other's place"
            shown = []
            for i in range(picture.n_frames):  # type: ignore[attr-defined]
                picture.seek(i)
                picture.load()
                shown.append(picture.info["duration"])
            assert 8_000 <= sum(shown) <= pictures.LIMIT and picture.info["loop"] == 0


@pytest.mark.long
@pytest.mark.browser
def test_the_command_makes_them(tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api")
    pictures.main(["--out", str(tmp_path)])
    for name in NAMES:
        with Image.open(tmp_path / name) as made, Image.open(pictures.FOLDER / name) as kept:
            assert made.getexif()[pictures.DESCRIPTION] == pictures.digest()
            assert name.startswith("demo") or made.size == kept.size
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(NAMES)
