"""A profile is read once, checked, and put in the place of the setting that names it."""

import json
from types import SimpleNamespace

import pytest

from vllm_tokenselect.config import SettingsError, TokenSelectConfig
from vllm_tokenselect.profiles import ProfileModel, read_profile, resolve_profile
from vllm_tokenselect.profiles.choice import SHIPPED

MODEL = {
    "name": "small",
    "layers": 8,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 32,
    "hidden_size": 128,
}
PROFILE = {
    "format": 1,
    "settings": {"top_k": 512, "n_local": 256, "anchor_layers": [0, 4]},
    "model": MODEL,
    "lost": [],
    "versions": {},
    "date": "2026-11-29",
}
SERVED = ProfileModel(**MODEL)


@pytest.fixture
def profile(tmp_path) -> str:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(PROFILE))
    return str(file)


def test_what_is_given_beside_a_profile_overrides_it(profile):
    resolved = resolve_profile({"profile": profile, "top_k": 1024, "vote": "global"}, SERVED)
    assert resolved.settings == {
        "top_k": 1024,
        "n_local": 256,
        "anchor_layers": [0, 4],
        "vote": "global",
    }
    assert "given beside it: top_k" in resolved.said
    assert resolve_profile({"top_k": 3}, SERVED).settings == {"top_k": 3}


def test_a_profile_of_another_shape_is_refused_with_both_shapes(profile):
    other = ProfileModel(**{**MODEL, "name": "big", "layers": 9})
    with pytest.raises(SettingsError, match=r"is for small \(8 layers.*big is served \(9 layers"):
        resolve_profile({"profile": profile}, other)
    renamed = ProfileModel(**{**MODEL, "name": "finetuned"})
    assert resolve_profile({"profile": profile}, renamed).settings == PROFILE["settings"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "has the format None; this release reads 1"),
        (json.dumps({**PROFILE, "format": 2}), "has the format 2; this release reads 1"),
        (json.dumps({**PROFILE, "speed": 1}), "speed: a profile has no such entry"),
        (json.dumps({**PROFILE, "model": {"name": "small"}}), "model.layers: is missing"),
        (json.dumps({**PROFILE, "settings": {"top": 1}}), "top: there is no such setting"),
        (
            json.dumps({**PROFILE, "settings": {"positions": "reassigned"}}),
            "positions cannot stand in a profile; give it beside",
        ),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, content, said):
    file = tmp_path / "wrong.json"
    file.write_text(content)
    with pytest.raises(SettingsError) as refused:
        resolve_profile({"profile": str(file)}, SERVED)
    assert "wrong.json" in str(refused.value)
    assert said in str(refused.value)


def test_a_file_that_is_not_there_is_refused_by_name():
    with pytest.raises(SettingsError, match=r"nowhere\.json.*cannot be read.*No such file"):
        resolve_profile({"profile": "nowhere.json"}, SERVED)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_a_profile_that_ships_is_found_by_its_models_name_and_shape(path):
    profile = read_profile(path)
    assert path.stem == profile.model.name.lower()
    assert profile.lost, "it says what it loses"
    config = SimpleNamespace(
        num_hidden_layers=profile.model.layers,
        num_attention_heads=profile.model.heads,
        num_key_value_heads=profile.model.kv_heads,
        hidden_size=profile.model.hidden_size,
    )
    served = ProfileModel.of(f"Somebody/{profile.model.name.upper()}", config)
    resolved = resolve_profile({"profile": "auto"}, served)
    assert resolved.settings == profile.settings
    assert "the profile that ships" in resolved.said
    TokenSelectConfig.from_mapping(resolved.settings)
    config.num_hidden_layers += 1
    other = resolve_profile({"profile": "auto"}, ProfileModel.of(profile.model.name, config))
    assert other.settings == {}
    assert "no profile ships" in other.said
