"""The settings of a server that is told to take a profile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_tokenselect.method.settings import SettingsError
from vllm_tokenselect.profiles.format import Profile, ProfileModel, read_profile

AUTO = "auto"
SHIPPED = Path(__file__).parent


class ProfileSettings(dict[str, Any]):
    """Settings that took a profile's in the place of `profile`. They know it in every process of an engine.

    Attributes:
        source: which profile.
    """

    def __init__(self, settings: Mapping[str, Any], source: str) -> None:
        super().__init__(settings)
        self.source = source


class Resolved(NamedTuple):
    """Settings without `profile`, and what the log says of where they come from; empty without one."""

    settings: dict[str, Any]
    said: str = ""


def resolve_profile(given: Mapping[str, Any], model: ProfileModel) -> Resolved:
    """Put a profile's settings in the place of the setting `profile`; what is given beside overrides them.

    Args:
        given: settings as the user gave them.
        model: the model that is to be served.

    Raises:
        SettingsError: for a file that is no profile, or the profile of a model of another shape.
    """
    beside = {name: value for name, value in given.items() if name != "profile"}
    wanted = given.get("profile")
    if wanted is None:
        return Resolved(beside)
    if wanted == AUTO:
        profile = _shipped(model)
        if profile is None:
            return Resolved(
                beside, f"its defaults: no profile ships for {model.name} ({model.shape})"
            )
        where = "the profile that ships"
    else:
        profile = read_profile(Path(wanted))
        if not profile.model.is_shaped_like(model):
            raise SettingsError(
                f"tokenselect profile {wanted!r} is for {profile.model.name} ({profile.model.shape}), but "
                f"{model.name} is served ({model.shape}). Leave it out, or write one for this model with "
                "`tokenselect tune --profile`."
            )
        where = f"the profile {wanted}"
    overridden = sorted(set(beside) & set(profile.settings))
    source = f"{where} for {profile.model.name} of {profile.date}"
    return Resolved(
        ProfileSettings({**profile.settings, **beside}, source),
        f"{source}: {profile.settings}"
        + (f"; given beside it: {', '.join(overridden)}" if overridden else ""),
    )


def _shipped(model: ProfileModel) -> Profile | None:
    """The profile in the package for a model of this name and shape."""
    for path in SHIPPED.glob("*.json"):
        if path.stem.lower() == model.name.lower():
            profile = read_profile(path)
            return profile if profile.model.is_shaped_like(model) else None
    return None
