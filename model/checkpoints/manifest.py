"""Read `weights/manifest.toml`: published files, recipes and bundles. No torch here."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter

from model.config import BundleConfig, Recipe

Network = Literal["denoiser", "vqgan", "prior", "byt5", "clip"]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class PublishedFile:
    """One file as its authors published it.

    repository, path: on the hub; without a repository the file lies elsewhere, and `source` says in
    words where. revision: a commit, or `main`, which may move. bytes: of the file, rounded to its
    last digit that is not 0; 0 is unknown, for files that are not on the hub. sha256: None where
    nobody states it.
    """

    __pydantic_config__ = _STRICT

    network: Network
    generation: Literal["v1", "v3"]
    path: str
    licence: str
    format: str
    repository: str | None = None
    source: str | None = None
    revision: Annotated[str, Field(pattern=r"^([0-9a-f]{40}|main)$")] = "main"
    bytes: Annotated[int, Field(ge=0)] = 0
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    def __post_init__(self) -> None:
        if self.repository is not None and not self.bytes:
            raise ValueError(f"{self.path} is on the hub, so its size must be given")

    def has_size(self, found: int) -> bool:
        """Return whether a file of `found` bytes may be this one: its size is checked as stated.

        A stated 4,030,000,000 covers the sizes that are 10,000,000 away.
        """
        zeros = len(str(self.bytes)) - len(str(self.bytes).rstrip("0"))
        # Fewer than three zeros may end an exact size.
        return abs(found - self.bytes) <= (10**zeros if zeros > 2 else 0)

    @property
    def pinned(self) -> bool:
        """Return whether the revision is a commit."""
        return self.revision != "main"

    @property
    def where(self) -> str:
        """The file's place, for messages."""
        return (
            f"{self.repository}/{self.path}" if self.repository else f"{self.path} ({self.source})"
        )


@dataclass(frozen=True)
class PublishedBundle:
    """The files of a whole bundle, and its configuration.

    recipes: the first is the default.
    """

    __pydantic_config__ = _STRICT

    files: tuple[str, ...]
    recipes: tuple[str, ...]
    config: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The published files, recipes and bundles."""

    __pydantic_config__ = _STRICT

    files: dict[str, PublishedFile]
    recipes: dict[str, Recipe] = field(default_factory=dict)
    bundles: dict[str, PublishedBundle] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse a manifest.

        Raises pydantic.ValidationError, FileNotFoundError, or tomllib.TOMLDecodeError.
        """
        return TypeAdapter(cls).validate_python(tomllib.loads(path.read_text()))

    def select(self, name: str) -> dict[str, PublishedFile]:
        """Return the files of a bundle, or the one file of this key or file name.

        Raises ValueError if there is none, or more than one.
        """
        if name in self.bundles:
            return {key: self.files[key] for key in self.bundles[name].files}
        named = {
            key: file for key, file in self.files.items() if name in {key, file.path, file.where}
        }
        if len(named) != 1:
            known = ", ".join((*self.bundles, *self.files))
            count = "more than one" if named else "no"
            raise ValueError(f"{name!r} is {count} published file or bundle; there are {known}")
        return named

    def recipe(self, name: str) -> Recipe:
        """Return a recipe by name. Raises ValueError."""
        if name not in self.recipes:
            raise ValueError(
                f"{name!r} is no published recipe; there are {', '.join(self.recipes)}"
            )
        return self.recipes[name]

    def config(self, bundle: str, recipe: str | None = None) -> BundleConfig:
        """Return a published bundle's configuration, without files. Raises ValueError."""
        published = self.bundles[bundle]
        chosen = self.recipe(recipe or published.recipes[0])
        return BundleConfig.parse({"name": bundle, "recipe": chosen, **published.config})


@cache
def published() -> Manifest:
    """Return Paellera's own manifest."""
    import weights

    return Manifest.read(Path(weights.__file__).with_name("manifest.toml"))
