"""The locked dependencies cover pyproject.toml, with a hash for every file, and image and Makefile
install nothing else. Read offline; `make lock` renews them, `make audit` asks for advisories.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.dockerfile import stages

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The extras that each lock covers beside the dependencies.
EXTRAS = {
    "serve": ("otel",),
    "dev": ("otel", "dev", "train"),
    "load": ("load",),
    "scale": ("scale",),
}
LOCKS = (*EXTRAS, "build")
# Builds for CPU and CUDA have these names and versions, but other files.
FROM_ANOTHER_INDEX = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)")
SHA256 = re.compile(r"--hash=sha256:[0-9a-f]{64}")

LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
MAC = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}
ENVIRONMENTS = [
    {**default_environment(), **system, "python_version": python, "python_full_version": full}
    for system in (LINUX, MAC)
    for python, full in (("3.11", "3.11.7"), ("3.12", "3.12.4"), ("3.13", "3.13.1"))
]

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Pin:
    """An entry of a lock."""

    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> Version:
        (specifier,) = self.requirement.specifier
        assert specifier.operator == "=="
        return Version(specifier.version)

    def applies(self, environment: Environment) -> bool:
        marker = self.requirement.marker
        return marker is None or marker.evaluate(dict(environment))


def entries(name: str) -> Iterator[Pin]:
    text = (REQUIREMENTS / f"{name}.txt").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith(("#", "-r ")):
            requirement, *hashes = re.split(r"\s+(?=--hash)", line.strip())
            yield Pin(Requirement(requirement), tuple(each.strip() for each in hashes))


def locked(name: str, environment: Environment) -> dict[str, Version]:
    """What is installed in the environment, torch and Triton included."""
    pins = [*entries(name), *entries("torch"), *entries("torch-dev")]
    return {pin.name: pin.version for pin in pins if pin.applies(environment)}


def wanted(lock: str) -> list[Requirement]:
    """The requirements of pyproject.toml that the lock covers."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name in EXTRAS[lock] for line in extras[name])]
    return [Requirement(line) for line in lines]


def missing(
    requirements: list[Requirement], versions: Mapping[str, Version], environment: Environment
) -> list[str]:
    applicable = [
        each
        for each in requirements
        if each.marker is None or each.marker.evaluate({**environment, "extra": ""})
    ]
    return [
        str(each)
        for each in applicable
        if (version := versions.get(canonicalize_name(each.name))) is None
        or not each.specifier.contains(version, prereleases=True)
    ]


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_has_a_fitting_version_of_everything_in_pyproject(lock: str) -> None:
    for environment in ENVIRONMENTS:
        assert not missing(wanted(lock), locked(lock, environment), environment), "make lock"


def test_a_requirement_that_pyproject_gains_is_noticed() -> None:
    environment = ENVIRONMENTS[0]
    versions = locked("serve", environment)
    added = [Requirement("flask>=3"), Requirement("fastapi>=999"), Requirement("httpx")]
    assert missing(added, versions, environment) == ["flask>=3", "fastapi>=999"]


def needed(requirement: Requirement, versions: Mapping[str, Version]) -> list[Requirement]:
    """What an installed package of the locked version needs itself; nothing of others is known."""
    name = canonicalize_name(requirement.name)
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    if Version(distribution.version) != versions.get(name):
        return []
    found = [Requirement(line) for line in distribution.requires or ()]
    environments = [
        {**default_environment(), "extra": extra} for extra in (*requirement.extras, "")
    ]
    return [
        each
        for each in found
        if each.marker is None or any(each.marker.evaluate(chosen) for chosen in environments)
    ]


@pytest.mark.parametrize("lock", ["serve", "dev"])
def test_a_lock_is_closed_so_that_nothing_else_needs_to_be_found(lock: str) -> None:
    environment = default_environment()
    versions = locked(lock, environment)
    waiting, seen = wanted(lock), set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        # What torch needs beside these comes from its own index.
        if key not in seen and not FROM_ANOTHER_INDEX.fullmatch(key[0]):
            seen.add(key)
            below = needed(requirement, versions)
            ours = [each for each in below if not FROM_ANOTHER_INDEX.fullmatch(each.name)]
            absent = [each for each in ours if canonicalize_name(each.name) not in versions]
            assert not absent, f"{requirement} needs {absent}: make lock"
            waiting += below
    assert len(seen) > 50


@pytest.mark.parametrize("lock", LOCKS)
def test_every_entry_is_one_version_with_hashes_and_none_comes_from_another_index(
    lock: str,
) -> None:
    pins = list(entries(lock))
    assert len(pins) > 3
    for pin in pins:
        assert pin.requirement.url is None
        assert pin.version
        assert pin.hashes
        assert all(SHA256.fullmatch(each) for each in pin.hashes), pin
        assert not FROM_ANOTHER_INDEX.fullmatch(pin.name), f"{pin.name}: requirements/excluded.txt"


def test_the_packages_of_another_index_are_pinned_by_version() -> None:
    pins = {pin.name: pin.version for pin in (*entries("torch"), *entries("torch-dev"))}
    assert set(pins) == {"torch", "torchvision", "triton"}
    (torch,) = (each for each in wanted("serve") if each.name == "torch")
    assert torch.specifier.contains(pins["torch"])


def test_servers_run_on_the_versions_that_were_tested() -> None:
    for environment in ENVIRONMENTS:
        tested = locked("dev", environment)
        for lock in ("serve", "build"):
            assert locked(lock, environment).items() <= tested.items()


# ── what installs them ────────────────────────────────────────────────────────────────────────────


def is_pinned(command: str) -> bool:
    """Return whether a `pip install` takes only files with a hash, torch, or this project."""
    if "--extra-index-url" in command:
        return False
    if "requirements/torch" in command:
        return True
    if re.search(r"--no-deps --no-build-isolation (-e )?\.$", command):
        return True
    return {"--require-hashes", "--no-deps"} <= set(command.split())


def test_the_image_installs_nothing_without_a_hash_but_torch_from_a_single_index() -> None:
    runs = [rest for keyword, rest in stages()[0] if keyword == "RUN"]
    commands = [
        re.sub(r"\s+", " ", command).strip()
        for run in runs
        for command in run.split("&&")
        if "pip install" in command
    ]
    assert len(commands) == 3
    assert all(map(is_pinned, commands)), commands
    (torch,) = (command for command in commands if "requirements/torch" in command)
    assert '--index-url "$index"' in torch


def test_the_makefile_installs_nothing_without_a_hash_but_torch() -> None:
    variables = dict(
        re.findall(r"^(INSTALL\w*) := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    text = re.sub(r"\$\((INSTALL\w*)\)", lambda m: variables[m[1]], (ROOT / "Makefile").read_text())
    commands = [line.strip() for line in text.splitlines() if line.startswith("\t")]
    installing = [command for command in commands if "/pip install" in command]
    assert len(installing) >= 8
    assert all(map(is_pinned, installing)), installing


@pytest.mark.parametrize(
    "command",
    [
        "pip install fastapi",
        "pip install -e .[dev]",
        "pip install -r requirements/serve.txt",
        "pip install --no-deps .",
        "pip install --extra-index-url https://x --no-deps --require-hashes -r requirements/a.txt",
    ],
)
def test_an_unpinned_command_is_noticed(command: str) -> None:
    assert not is_pinned(command)


@pytest.mark.process
def test_the_bill_of_materials_lists_what_the_image_installs_with_its_hashes(
    tmp_path: Path,
) -> None:
    """`cyclonedx-py` checks the file against CycloneDX's schema before it writes it."""
    path = tmp_path / "paellera.cdx.json"
    variables = [f"BIN={Path(sys.executable).parent}", f"SBOM={path}"]
    # The environment that runs this has everything already.
    done = subprocess.run(
        ["make", "-o", ".venv/.dev", "sbom", *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bill = json.loads(path.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "paellera"
    pins = [*entries("serve"), *entries("build"), *entries("torch")]
    components = {(each["name"], each["version"]): each for each in bill["components"]}
    assert {(pin.name, str(pin.version)) for pin in pins} == {
        (canonicalize_name(name), version) for name, version in components
    }
    fastapi = next(each for (name, _), each in components.items() if name == "fastapi")
    (pin,) = (pin for pin in entries("serve") if pin.name == "fastapi")
    listed = {
        f"--hash=sha256:{each['content']}"
        for reference in fastapi["externalReferences"]
        for each in reference.get("hashes", ())
    }
    assert listed == set(pin.hashes)
