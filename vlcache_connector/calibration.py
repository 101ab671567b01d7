"""Calibration files: what was measured about reuse on one model, and what follows from it.

`vlcache calibrate` writes one, `vlcache verify` adds its verdict, the connector reads it at start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .config import ConfigError

_MAX_BYTES = 1 << 20

Relation = Literal["single_image", "same_ordinal", "lone_donor", "other_ordinal"]
"""How a donor's place relates to the target's, by the number of images in front of it (ordinal):
none in both; the same number; none in front of the donor's, some in front of the target's; another
number."""
RELATIONS: tuple[Relation, ...] = get_args(Relation)

Verdict = Literal["any", "same_ordinal", "single_image", "none"]
"""Which relations are safe; each is contained in the one before."""

_SAFE: dict[Verdict, frozenset[Relation]] = {
    "any": frozenset(RELATIONS),
    "same_ordinal": frozenset({"single_image", "same_ordinal"}),
    "single_image": frozenset({"single_image"}),
    "none": frozenset(),
}

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Divergence = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


def relation_of(donor_ordinal: int, target_ordinal: int) -> Relation:
    """How a donor with so many images in front of it relates to a target."""
    if donor_ordinal == target_ordinal:
        return "same_ordinal" if target_ordinal else "single_image"
    return "other_ordinal" if donor_ordinal else "lone_donor"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelIdentity(_Strict):
    """The model that was measured."""

    name: str
    fingerprint: str
    """`identity.weights_fingerprint`."""
    num_layers: int = Field(ge=1)


class Sample(_Strict):
    """What was measured on."""

    images: str
    """Folder, or `synthetic`."""
    requests: int = Field(ge=1)
    seed: int


class LayerSchedule(_Strict):
    """How a budget is dealt to the layers."""

    ratio: Share
    """Mean of `layers`."""
    layers: list[Share] = Field(min_length=1)
    """Share of a segment's tokens that each decoder layer recomputes; never rising."""
    kl: Divergence | None = None
    """Mean KL divergence of the first answer token from a full recompute, in nats."""
    first_k_kl: Divergence | None = None
    """The same for `first_k` with the same number of token-layers."""

    @model_validator(mode="after")
    def _check(self) -> LayerSchedule:
        for layer, (below, above) in enumerate(pairwise(self.layers)):
            if above > below:
                raise ValueError(
                    f"shares must not rise: layer {layer + 1} has {above}, layer {layer} {below}"
                )
        mean = sum(self.layers) / len(self.layers)
        if abs(mean - self.ratio) > 1e-3:
            raise ValueError(f"ratio {self.ratio} is not the mean of the layers, {mean:.4f}")
        return self


class RelationResult(_Strict):
    """Reuse under one donor relation, against a full recompute."""

    requests: int = Field(ge=1)
    kl: Divergence
    """Mean KL divergence of the first answer token, in nats."""
    flip_rate: Share
    """Share of the requests whose greedy answer differs."""
    passed: bool


class Thresholds(_Strict):
    """What a relation must keep to pass."""

    kl: Divergence
    flip_rate: Share


class Verification(_Strict):
    """Outcome of `vlcache verify`."""

    selector: str
    recompute_ratio: Share
    sample: Sample
    thresholds: Thresholds
    relations: dict[Relation, RelationResult]
    verdict: Verdict

    @property
    def allowed(self) -> frozenset[Relation]:
        """Relations under which reuse is safe: those of the verdict, and a lone donor if it
        passed by itself."""
        lone = self.relations.get("lone_donor")
        extra: set[Relation] = set()
        if lone is not None and lone.passed and self.verdict == "same_ordinal":
            extra.add("lone_donor")
        return _SAFE[self.verdict] | extra


def verdict_of(relations: Mapping[Relation, RelationResult]) -> Verdict:
    """The widest verdict all of whose relations were measured and passed."""
    passed = {relation for relation, result in relations.items() if result.passed}
    return next(verdict for verdict, safe in _SAFE.items() if safe <= passed)


class Calibration(_Strict):
    """A calibration file.

    Attributes:
        format: version of this layout.
        schedules: of the `layer_aware` selector, by ascending ratio.
    """

    format: Literal[1] = 1
    model: ModelIdentity
    sample: Sample | None = None
    schedules: list[LayerSchedule] = []
    verification: Verification | None = None

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        for schedule in self.schedules:
            if len(schedule.layers) != self.model.num_layers:
                raise ValueError(
                    f"the schedule for ratio {schedule.ratio} has {len(schedule.layers)} layers, "
                    f"the model {self.model.num_layers}"
                )
        ratios = [schedule.ratio for schedule in self.schedules]
        if ratios != sorted(set(ratios)):
            raise ValueError(f"ratios must rise from schedule to schedule: {ratios}")
        if self.verification and verdict_of(self.verification.relations) != (
            self.verification.verdict
        ):
            raise ValueError(
                f"verdict {self.verification.verdict!r} does not follow from the relations"
            )
        return self

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file.

        Raises:
            ConfigError: it can't be read, or is malformed; the message names file and field.
        """
        try:
            too_large = path.stat().st_size > _MAX_BYTES
            content = None if too_large else yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: can't be read as YAML: {error}") from None
        if too_large:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES} bytes")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(
                "\n".join(
                    f"{path}: {'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}"
                    for item in error.errors()
                )
            ) from None

    def save(self, path: Path) -> None:
        """Write the file in one step: readers see the old one or the new one."""
        content = yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True), sort_keys=False, width=100
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        work = path.with_suffix(f".{os.getpid()}.part")
        try:
            work.write_text(content, encoding="utf-8")
            work.replace(path)
        finally:
            work.unlink(missing_ok=True)

    def check_model(self, fingerprint: str | None, num_layers: int, path: Path) -> None:
        """Refuse a file that was made for another model.

        Raises:
            ConfigError: names both.
        """
        if num_layers != self.model.num_layers:
            raise ConfigError(
                f"{path}: made for a model with {self.model.num_layers} layers "
                f"({self.model.name}), this one has {num_layers}; run vlcache verify"
            )
        if fingerprint is None:
            raise ConfigError(
                f"{path}: made for weights with the fingerprint {self.model.fingerprint[:12]}; "
                "those of this model are in no local file that could be compared; leave it out"
            )
        if fingerprint != self.model.fingerprint:
            raise ConfigError(
                f"{path}: made for another model ({self.model.name}, fingerprint "
                f"{self.model.fingerprint[:12]}), this one is {fingerprint[:12]}; "
                "run vlcache verify"
            )


def name_of(model: str) -> str:
    """Name of a model's calibration file: the last part of its path or hub id."""
    return Path(model.rstrip("/")).name.lower()


def _folders() -> Iterator[Path]:
    yield Path(__file__).resolve().parent.parent / "configs" / "schedules"
    yield Path(sys.prefix) / "share" / "vlcache" / "schedules"


def default_path(model: str) -> Path:
    """Where a model's file is written, so that `find` knows it by the model's name."""
    checkout, installed = _folders()
    folder = checkout if checkout.parent.is_dir() else installed
    return folder / f"{name_of(model)}.yaml"


def find(name_or_path: str) -> Path | None:
    """The file with this path, or this name among those that come with VLCache."""
    if os.sep in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        return path if path.is_file() else None
    candidates = (folder / f"{name_or_path}.yaml" for folder in _folders())
    return next((path for path in candidates if path.is_file()), None)


def known_names() -> list[str]:
    """Names that `find` knows."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def load_for(
    model: str, calibration: str | None, fingerprint: str | None, num_layers: int
) -> Calibration | None:
    """The calibration to serve `model` with.

    Args:
        calibration: the configured name or path; None looks for the model's own name, and takes a
            file only if it was made for this very model.
        fingerprint: `identity.weights_fingerprint`.

    Raises:
        ConfigError: the configured file is missing, malformed or made for another model.
    """
    path = find(calibration or name_of(model))
    if path is None:
        if calibration is None:
            return None
        raise ConfigError(
            f"kv_connector_extra_config: calibration={calibration!r}: no such file, nor a name "
            f"among {', '.join(known_names()) or 'those that come with VLCache (none)'}"
        )
    loaded = Calibration.load(path)
    if calibration is None and loaded.model.fingerprint != fingerprint:
        return None
    loaded.check_model(fingerprint, num_layers, path)
    return loaded
