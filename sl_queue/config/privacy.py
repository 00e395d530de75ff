"""A party file's [privacy]: the secret that keys its draws, its defences, and what it measures and allows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sl_queue.config.paths import from_folder
from sl_queue.config.schema import Schema, shown
from sl_queue.privacy.settings import Settings
from sl_queue.protocol.fingerprints import SEED

MAX_NORM = "max-norm"


class LabelResponse(Schema):
    """Every label answered at random, once for each row."""

    epsilon: float = Field(
        gt=0, le=50, description="a number above 0, at most 50: how much a response may give away of a label"
    )
    prior_ok: bool = Field(
        default=False, description="true or false: goes on although hardly any row that says positive is"
    )


class GradientNoise(Schema):
    """Noise on gradients in all directions, half of it drawn once for each row."""

    noise: float = Field(gt=0, description="a number above 0: times the largest gradient of a micro-batch")


class ActivationNoise(Schema):
    """Activations clipped row by row, and noise on them."""

    clip: float = Field(gt=0, description="a number above 0: the largest norm of a row's activation")
    sigma: float = Field(
        default=0.0, ge=0, description="a number of at least 0: the noise's deviation, in units of clip"
    )


class PrivacyFile(Schema):
    """Settings that keep this party's own numbers from the other parties."""

    secret: Any = Field(
        default=None,
        repr=False,
        description='the name of a file with 32 secret bytes, or "seed": keys this party\'s '
        "random draws; without it, a new secret",
    )
    labels: LabelResponse | None = Field(
        default=None, description="a table { epsilon = 2.0 }: labels answered at random, once for each row"
    )
    gradients: Any = Field(default=None, description='"max-norm" or a table { noise = 1.0 }: noise on gradients')
    activations: ActivationNoise | None = Field(
        default=None, description="a table { clip = 1.0, sigma = 4.0 }: activations clipped, with noise"
    )
    nopeek: float = Field(default=0.0, ge=0, description="a number of at least 0: the weight of distance correlation")
    meter: bool = Field(default=False, description="true or false: attacks on its own traffic, each epoch")
    budget: float | None = Field(
        default=None, gt=0, description="a number above 0: the epsilon after which nothing more is sent"
    )
    delta: float = Field(
        default=1e-6, gt=0, lt=1, description="a number between 0 and 1: that of every epsilon here; below 1 / rows"
    )

    @field_validator("gradients")
    @classmethod
    def _is_a_defence(cls, value: Any) -> Any:
        return None if value is None else gradients_of(value)

    @field_validator("secret")
    @classmethod
    def _is_a_place(cls, value: Any, info: ValidationInfo) -> Path | str | None:
        if value is None or value == SEED:
            return None if value is None else SEED
        if isinstance(value, str | Path) and str(value):
            return from_folder(Path(value), info)
        raise ValueError(f"= {shown(value)}; it must be {cls.model_fields['secret'].description}")


def gradients_of(value: Any) -> Literal["max-norm"] | GradientNoise:
    """Read `gradients`. Raises ValueError for anything that is neither max-norm nor a table with noise."""
    if value == MAX_NORM or isinstance(value, GradientNoise):
        return value  # type: ignore[no-any-return]
    wanted = f'it must be "{MAX_NORM}" or a table {{ noise = 1.0 }}'
    if isinstance(value, dict) and set(value) == {"noise"}:
        noise = value["noise"]
        if isinstance(noise, int | float) and not isinstance(noise, bool) and 0 < noise < float("inf"):
            return GradientNoise(noise=float(noise))
        raise ValueError(f"= {{ noise = {shown(noise)} }}; noise must be a number above 0")
    raise ValueError(f"= {shown(value)}; {wanted}")


def about_defences(privacy: PrivacyFile, *, holds_labels: bool, party: str, label_holder: str) -> Iterator[str]:
    """Say which defences this party has nothing to defend with."""
    if holds_labels:
        for name in ("activations", "nopeek"):
            if getattr(privacy, name):
                yield f"privacy.{name} has no use; {party!r} holds the labels and sends gradients, no activations"
    else:
        for name in ("labels", "gradients"):
            if getattr(privacy, name) is not None:
                yield f"privacy.{name} has no use; only {label_holder!r} has labels and sends gradients"
    if (
        privacy.budget is not None
        and privacy.labels is None
        and not (privacy.activations and privacy.activations.sigma)
    ):
        own = "labels = { epsilon = ... }" if holds_labels else "activations = { clip = ..., sigma = ... }"
        yield f"privacy.budget = {privacy.budget:g} counts epsilon, and nothing here has one; set {own}"


def settings_of(file: PrivacyFile) -> Settings:
    """Return what a file's [privacy] says, as values."""
    gradients, activations = file.gradients, file.activations
    return Settings(
        labels=None if file.labels is None else file.labels.epsilon,
        prior_ok=file.labels is not None and file.labels.prior_ok,
        gradients=gradients.noise if isinstance(gradients, GradientNoise) else None,
        max_norm=gradients == MAX_NORM,
        clip=None if activations is None else activations.clip,
        sigma=0.0 if activations is None else activations.sigma,
        nopeek=file.nopeek,
        meter=file.meter,
        budget=file.budget,
        delta=file.delta,
    )
