"""Settings that were found for a model, kept in a file: the format, and which one a server takes.

`tokenselect tune` writes a profile. Those that ship lie in this folder, named after their model.
"""

from vllm_tokenselect.profiles.choice import ProfileSettings, resolve_profile
from vllm_tokenselect.profiles.format import BESIDE, Lost, Profile, ProfileModel, read_profile

__all__ = [
    "BESIDE",
    "Lost",
    "Profile",
    "ProfileModel",
    "ProfileSettings",
    "read_profile",
    "resolve_profile",
]
