import pytest

from launch.keys import all_keys, called_elsewhere, nearest, nearest_keys, settings_of
from launch.recipe import load_recipe
from nd_dist.config import Config
from shards.phantom.networks.settings import NetworksRecipe


def test_every_setting_has_a_type_and_a_meaning_and_is_one_that_a_recipe_can_set() -> None:
    settings = {each.key: each for each in settings_of()}
    assert set(settings) == set(Config().flat())
    assert [key for key, each in settings.items() if not each.meaning or each.kind == "any"] == []
    load_recipe("demo", [f"{each.key}={each.default}" for each in settings.values()])


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("training.steps", "[int >= 1, int >= 1]", "[107100, 107100]"),
        ("training.stages", "list[1 | 2]", "[1, 2]"),
        ("training.learning_rate", "float > 0", "0.0003"),
        ("sampler.strength", "float > 0 and <= 1", "0.75"),
        ("sampler.eta", "float 0 to 1", "0.2"),
        ("training.teacher", "str or null", "null"),
        ("shards_dir", "path or URL", "shards_out"),
        ("launch.interface", "str", '""'),
        ("sweep.axes", "mapping", "{}"),
    ],
)
def test_types_and_defaults_are_written_as_a_user_would(key: str, kind: str, default: str) -> None:
    setting = next(each for each in settings_of() if each.key == key)
    assert (setting.kind, setting.default) == (kind, default)


def test_the_nearest_key_prefers_the_same_last_word() -> None:
    assert nearest_keys("kappa")[0] == "sampler.kappa"
    assert "sampler" in nearest_keys("smapler")
    assert "training.learning_rate" in all_keys()


def test_other_programs_words_lead_to_the_setting_that_is_meant() -> None:
    assert nearest_keys("training.batch_size")[0] == "training.samples_per_subject"
    assert nearest_keys("evaluation.batch_sizes")[0] == "evaluation.batch_size"
    assert nearest_keys("lr") == ["training.learning_rate"]
    assert called_elsewhere("") <= set(all_keys())


def test_the_keys_of_another_configuration_are_its_own() -> None:
    assert nearest_keys("vae.stepz", NetworksRecipe)[0] == "vae.steps"
    assert "training.samples_per_subject" not in nearest_keys("vae.batch_size", NetworksRecipe)


def test_a_word_near_a_known_one_is_asked_about_and_another_is_not() -> None:
    assert nearest("trian", ["pack", "train"]) == "did you mean train?"
    assert nearest("xyz", ["pack", "train"]) == ""
