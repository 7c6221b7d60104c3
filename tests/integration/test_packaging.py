"""The wheel carries all that a user without a clone needs, and works there; the pins cover the dependencies."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import so3krates_dist
from so3krates_dist.errors import EXIT_CONFIG


@pytest.fixture(scope="module")
def built(clone, tmp_path_factory) -> Path:
    """A folder with the wheel and the source archive, built from the clone."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    result = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel has been installed into, without its dependencies."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    return target


def run_installed(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_wheel_holds_both_packages_and_every_config(clone, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(p.relative_to(clone))
        for package in ("so3krates_dist", "data_tools")
        for p in (clone / package).rglob("*.py")
    }
    expected |= {f"so3krates_dist/{p.relative_to(clone)}" for p in (clone / "configs").rglob("*.yaml")}
    expected |= {"so3krates_dist/py.typed"}
    assert expected - names == set()
    assert "so3krates_dist/configs/run/quickstart.yaml" in names
    strangers = {n for n in names - expected if ".dist-info/" not in n}
    assert strangers == set()


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = f"so3krates_dist-{so3krates_dist.__version__}.dist-info"
    metadata = archive.read(f"{folder}/METADATA").decode()
    assert f"\nVersion: {so3krates_dist.__version__}\n" in metadata
    assert "\nRequires-Python: <3.13,>=3.11\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert "so3krates = so3krates_dist.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()


def test_the_source_archive_can_build_the_wheel_and_run_the_tests(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "launch/constraints.txt", "configs/base.yaml", "launch/train.py",
        "launch/quickstart.sh", "launch/environment.sh", "tests/conftest.py", "data_tools/generate.py",
    ):  # fmt: skip
        assert name in names, name


def test_an_installed_wheel_finds_its_configs(installed, tmp_path):
    code = (
        "import so3krates_dist, data_tools; from so3krates_dist.config import find_configs, load_config\n"
        "print(so3krates_dist.__file__, data_tools.__file__, find_configs(), load_config(['run=quickstart']).run.name, sep='\\n')"
    )
    result = run_installed(installed, tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr
    *files, name = result.stdout.splitlines()
    assert all(Path(file).is_relative_to(installed) for file in files), files
    assert name == "quickstart"


def test_settings_can_be_listed_without_a_clone(installed, tmp_path):
    result = run_installed(installed, tmp_path, "-m", "so3krates_dist.cli", "info", "--config")
    assert result.returncode == 0, result.stderr
    assert "train.num_steps = 10000    (int)\n    optimizer steps" in result.stdout
    assert "run=" in result.stdout


def test_the_launch_script_uses_the_installed_package(clone, installed, tmp_path):
    """Neither the clone beside the script nor a folder of the same name where the user stands is imported."""
    (tmp_path / "so3krates_dist").mkdir()
    (tmp_path / "so3krates_dist/__init__.py").write_text("raise SystemExit('the wrong package')\n")
    own = installed / "so3krates_dist/configs/run/only_in_the_wheel.yaml"
    own.write_text("train: {zero_stage: 7}\n")
    result = run_installed(
        installed, tmp_path, str(clone / "launch/train.py"), "--local_rank=0", "run=only_in_the_wheel"
    )
    own.unlink()
    assert result.returncode == EXIT_CONFIG
    assert result.stderr == "so3krates: train.zero_stage must be 0, 1, 2 or 3; got 7. Change the value.\n"


def test_an_installed_wheel_makes_a_data_set(installed, tmp_path):
    pytest.importorskip("tblite")
    words = ("-m", "so3krates_dist.cli")
    made = run_installed(
        installed, tmp_path, *words, "generate", "--out", "made", "--num-conformers", "20", "--processes", "1"
    )
    assert made.returncode == 0, made.stderr
    manifest = json.loads((tmp_path / "made/manifest.json").read_text())
    assert sum(manifest["groups"].values()) == 20
    checked = run_installed(installed, tmp_path, *words, "validate", "made")
    assert checked.returncode == 0, checked.stderr


def test_the_readme_is_finished(clone):
    """No place is left for a figure that is to be filled in, and every file that it points to is there."""
    text = (clone / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z0-9_]+@", text) == []
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    relative = {target for target in targets if target and not re.match(r"[a-z]+:", target)}
    assert relative, "the pattern finds links"
    assert {target for target in relative if not (clone / target).exists()} == set()


def _read_pins(clone: Path) -> dict[str, str]:
    lines = [line.strip() for line in (clone / "launch" / "constraints.txt").read_text().splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins), (
        "exact, without builds or addresses"
    )
    return {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}


def test_every_dependency_is_pinned_within_its_range(clone):
    project = tomllib.loads((clone / "pyproject.toml").read_text())["project"]
    pins = _read_pins(clone)
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in launch/constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} does not allow {pins[name]}"
    assert pins["torch"] == "2.13.0"


def test_pins_are_sorted_and_cover_what_the_dependencies_need(clone):
    from importlib.metadata import PackageNotFoundError, requires

    pins = _read_pins(clone)
    missing, seen, todo = set(), set(), ["so3krates-dist"]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            needed = [Requirement(r) for r in requires(name) or []]
        except PackageNotFoundError:
            continue  # belongs to another platform, or to an extra that is not installed here
        missing |= {name} - set(pins) - {"so3krates-dist"}
        extra = "generate" if name == "so3krates-dist" else ""
        environment = {**default_environment(), "extra": extra}
        todo += [r.name for r in needed if r.marker is None or r.marker.evaluate(environment)]
    # PyTorch's own GPU libraries: each torch release names their exact versions.
    missing = {n for n in missing if not n.startswith(("nvidia-", "cuda-", "triton"))}
    assert missing == set()
    assert list(pins) == sorted(pins)
