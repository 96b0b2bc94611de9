import json
from pathlib import Path

import pytest
import yaml

from launch.keys import all_keys
from launch.recipe import load_recipe, recipe_names
from tests.support.command_line import nd, nd_process


def test_settings_are_listed_in_a_line_each_with_type_default_and_meaning() -> None:
    lines = nd_process("config", "keys", COLUMNS="40").stdout.splitlines()
    keys = [line.split()[0] for line in lines]
    assert set(keys) <= set(all_keys())
    assert len(keys) == len(set(keys)) > 100
    (line,) = (line for line in lines if line.split()[0] == "launch.stop_grace_s")
    assert "45 (int >= 5): Seconds that ranks get to save" in line


def test_settings_are_found_by_their_key_their_meaning_and_other_programs_words() -> None:
    assert nd("config", "keys", "eta").stdout.splitlines()[0].split()[0] == "data.betas"
    assert "slurm.signal_s" in nd("config", "keys", "time limit").stdout
    assert "training.samples_per_subject" in nd("config", "keys", "batch").stdout
    nothing = nd("config", "keys", "lerning_rate")
    assert nothing.returncode == 2
    assert "did you mean training.learning_rate?" in nothing.stderr


@pytest.mark.parametrize("flags", [[], ["--diff"]])
def test_a_configuration_is_shown_resolved_and_is_a_recipe_itself(flags: list[str], tmp_path: Path) -> None:
    shown = nd("config", "show", "demo", "nsd_root=elsewhere", "sampler.kappa=7", *flags)
    values = yaml.safe_load(shown.stdout)
    assert values["sampler"]["kappa"] == 7
    assert ("slurm" in values) == (not flags)
    (tmp_path / "mine.yaml").write_text(shown.stdout)
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe("demo", ["nsd_root=elsewhere", "sampler.kappa=7"])


def test_the_schema_is_json_and_describes_every_section() -> None:
    schema = json.loads(nd("config", "schema").stdout)
    assert set(yaml.safe_load(nd("config", "show", "paper").stdout)) == set(schema["properties"])
    assert schema["$defs"]["SamplerConfig"]["properties"]["kappa"]["description"] == "Guidance scale."


def test_recipes_are_listed_with_what_they_are_for() -> None:
    lines = nd("config", "recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(line.endswith(".yaml") and len(line.split()) > 5 for line in lines)
