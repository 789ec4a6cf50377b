"""What is built from the tree: the wheel, away from the checkout, and the first steps of the container.

The wheel is built without build isolation and installed without dependencies, so nothing is fetched. The environment it
is installed in sees the packages of this one, but not the checkout.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import spec_decode

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("pyproject.toml", "requirements.txt", "requirements-peers.txt", "requirements-mcp.txt", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
LOOK = """
import json, spec_decode
from spec_decode.paths import ASSETS
from spec_decode.ui import launch_options
from spec_decode.ui.head import FILES
from spec_decode.ui.layout import examples
print(json.dumps({
    "package": spec_decode.__file__,
    "assets": str(ASSETS),
    "there": launch_options()["favicon_path"].is_file() and all((ASSETS / name).is_file() for name in FILES),
    "examples": len(examples()),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy: setuptools leaves files where it builds."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in BUILT_FROM:
        shutil.copy2(ROOT / name, tree)
    for name in ("spec_decode", "assets"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    called([*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", out, tree], tree)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the executables of an environment that has the wheel and the packages of this environment."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    python = Path(paths["scripts"]) / Path(sys.executable).name
    called([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel], home)
    site = Path(paths["purelib"])
    ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "others.pth").write_text("".join(f"{path}\n" for path in ours))
    for kept in (ROOT / "spec_decode").rglob("*.nbc"):  # compiled kernels: else they would be compiled once more
        place = site / kept.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(kept, place)
    yield Path(paths["scripts"])
    shutil.rmtree(home)


def called(command: list[Any], folder: Path) -> str:
    """Standard output of a command run in `folder`, which sees nothing of the checkout; fails with what it said."""
    seen = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=seen, text=True, capture_output=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def packages() -> list[str]:
    """The packages that pyproject.toml names."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named: list[str] = settings["tool"]["setuptools"]["packages"]
    return named


def test_every_package_is_named() -> None:
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "spec_decode").rglob("*.py")}
    ours = {name for name in packages() if not name.startswith("spec_decode.assets")}
    assert found - ours == set(), "not in [tool.setuptools] packages of pyproject.toml"
    assert ours - found == set(), "in [tool.setuptools] packages of pyproject.toml, and not there"


def test_the_wheel_holds_the_package_and_what_it_reads_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {str(file.relative_to(ROOT)) for file in (ROOT / "spec_decode").rglob("*.py")}
    assets = {f"spec_decode/{file.relative_to(ROOT)}" for file in (ROOT / "assets").rglob("*") if file.is_file()}
    assert held == code | {name for name in assets if "/screenshots/" not in name}


def test_the_wheel_says_what_it_is_and_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = HeaderParser().parsestr(archive.read(name).decode())
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert (told["Name"], told["Version"]) == ("spec-decode", spec_decode.__version__)
    assert (told["Requires-Python"], told["License-Expression"]) == (">=3.11", "Apache-2.0")
    needed = {Requirement(line) for line in told.get_all("Requires-Dist", [])}
    plain = {need for need in needed if "extra" not in str(need.marker)}
    assert plain == set(listed("requirements.txt"))
    extras = listed("requirements-peers.txt") + listed("requirements-mcp.txt")
    assert {need.name for need in needed - plain} == {need.name for need in extras}


def listed(name: str) -> list[Requirement]:
    """The requirements of a file."""
    lines = (line.partition(" #")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_page_finds_its_assets_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    told = json.loads(called([installed / "python", "-c", LOOK], tmp_path))
    environment = installed.parent
    assert Path(told["package"]).is_relative_to(environment) and Path(told["assets"]).is_relative_to(environment)
    assert told["there"] and told["examples"] >= 6


@pytest.mark.slow  # compiles the kernels where the checkout has none compiled
def test_the_wheel_races_outside_the_checkout(installed: Path, tmp_path: Path, embedded_dir: Path) -> None:
    command = [installed / "python", "-m", "spec_decode", "race", "--device", "cpu"]
    told = json.loads(called([*command, "--json", "--max-new-tokens", 8, "--prompt", "Hi"], tmp_path))
    assert told["identical"] and told["pair"]["drafter"] == "mtp+lookup"
    assert told["speculative"]["token_ids"] and told["speculative"]["text"] == told["baseline"]["text"]


def test_the_command_refuses_bad_input_with_exit_code_2(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(installed / "spec-decode"), "race", "--prompt", "Hi", "--temperature", "warm"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_the_container_prepares_the_model_from_the_files_it_has_by_then(tmp_path: Path) -> None:
    """The Dockerfile copies a few modules first, so that a change elsewhere does not prepare the model anew."""
    recipe = (ROOT / "Dockerfile").read_text(encoding="utf-8").partition("RUN PIP_NO_CACHE_DIR")[0]
    for line in re.findall(r"^COPY .*?--chown=\S+ (spec_decode/.*)$", recipe, re.M):
        *files, folder = line.split()
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy2(ROOT / file, tmp_path / folder)
    said = called(
        [sys.executable, "-c", "from spec_decode.loading import embedded; print(embedded.__file__)"], tmp_path
    )
    assert Path(said.strip()).is_relative_to(tmp_path)
