from pathlib import Path

import pytest

from launch.recipe import changed_settings, config_yaml, load_recipe, recipe_names, yaml_text
from nd_dist.config import Config
from nd_dist.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_ships_is_valid(name: str) -> None:
    assert isinstance(load_recipe(name), Config)


@pytest.mark.parametrize("name", recipe_names())
def test_a_written_config_is_read_back_to_an_equal_value(name: str, tmp_path: Path) -> None:
    config = load_recipe(name, ["seed=7", "sampler.kappa=12.5"])
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert load_recipe(str(tmp_path / "config.yaml")) == config


def test_overrides_win_over_the_recipe_and_interpolations_follow_them() -> None:
    config = load_recipe("demo", ["nsd_root=elsewhere", "data.subjects=[1,2]", "sampler.eta=1"])
    assert config.nsd_root == Path("elsewhere")
    assert config.data.captions == "elsewhere/captions"
    assert config.data.subjects == (1, 2)
    assert config.sampler.eta == 1.0


def test_the_paper_recipe_holds_the_published_values() -> None:
    config = load_recipe("paper")
    assert (config.sampler.kappa, config.sampler.eta, config.sampler.sag_scale) == (300_000, 0.2, 0.75)
    assert config.decoder.hidden_size == 4096
    assert config.training.steps == (107_100, 107_100)


def test_the_latent_target_is_trained_as_published_unless_the_command_line_says_how_long() -> None:
    def schedule_of(*words: str) -> tuple[int, int]:
        return load_recipe("paper", words).training.schedule(1)

    assert schedule_of("training.targets=[c]") == (107_100, 6)
    assert schedule_of("training.targets=[z]") == (53_550, 12)
    assert schedule_of("training.targets=[z]", "training.steps=[10,10]") == (10, 12)
    assert schedule_of("training.targets=[z]", "training.samples_per_subject=[2,2]") == (53_550, 2)


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("sampler.eta=1.5", ["sampler.eta", "1.5", "less than or equal to 1"]),
        ("eta=0.5", ["eta=0.5: unknown key", "sampler.eta"]),
        ("smapler.kappa=1", ["smapler.kappa=1: unknown key", "sampler"]),
        ("training.batch_size=8", ["did you mean training.samples_per_subject"]),
        ("training.stages=1,2", ["a list is expected: training.stages=[1,2]"]),
        ("data.subjects=1", ["a list is expected: data.subjects=[1]"]),
        ("training.stages.x=1", ["training.stages.x=1"]),
        ("training={stages: [3]}", ["training={stages: [3]}: training.stages.0: Input should be 1 or 2"]),
        ("seed=[1,", ["seed=[1,: its value is no YAML"]),
        ("training.target_subject=9", ["subjects [9]", "[1, 2, 3, 4]"]),
        ("data.targets=[c,q]", ["unknown targets ['q']"]),
        ("seed=-1", ["seed", "greater than or equal to 0"]),
        ("sampler=3", ["sampler=3: a section", "nd config keys sampler."]),
        ("nsd_root=${missing_key}", ["missing_key"]),
        ("noequals", ["key=value", "noequals"]),
    ],
)
def test_a_wrong_override_is_one_clear_config_error(override: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("demo", [override])
    assert caught.value.exit_code == 2
    for fragment in ["where: the command line\n", *fragments]:
        assert fragment in str(caught.value)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"demo_full, laion_fmri, laion_fmri_demo, paper(.|\n)*did you mean demo"):
        load_recipe("demoo")


def test_a_recipe_that_is_no_yaml_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1,\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_recipe(str(path))


def wrong(recipe: str, *words: str) -> list[str]:
    """Return the lines of the error of a recipe with words: its place, then what is wrong."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, words)
    return [caught.value.where, *(line.strip() for line in caught.value.found.splitlines()[1:])]


@pytest.mark.parametrize(
    ("words", "guilty"),
    [
        (["seed=1", "sampler.eta=1.5", "noequals", "run_dir=x"], {"sampler.eta=1.5", "noequals"}),
        (["seed=-1", "nsd_root=${missing}", "foo=1"], {"seed=-1", "nsd_root=${missing}", "foo=1"}),
        (["seed=1", "seed=-1"], {"seed=-1"}),
        (["seed=-1", "seed=-1"], {"seed=-1"}),
        (["decoder.num_blocks=2", "training.target_subject=9"], {"training.target_subject=9"}),
        (["data.subjects=[1,2]", "training.target_subject=4"], {"data.subjects=[1,2] training.target_subject=4"}),
        (["data.subjects=[1,", "training.target_subject=4"], {"data.subjects=[1,"}),
    ],
)
def test_every_wrong_word_is_named_once_and_no_right_one(words: list[str], guilty: set[str]) -> None:
    where, *lines = wrong("demo", *words)
    assert where == "the command line"
    assert {line.split(": ")[0] for line in lines} == guilty
    assert len(lines) == len(guilty)


def test_a_wrong_recipe_is_told_from_wrong_words(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: -1\nsampler: {eta: 3}\n")
    assert wrong(str(path), "run_dir=x")[0] == str(path)
    where, *lines = wrong(str(path), "seed=-2", "run_dir=x")
    assert where == f"{path} and the command line"
    assert lines[0].startswith("seed=-2: ")
    assert lines[1].startswith("sampler.eta: ")


def test_a_list_whose_entries_are_wrong_is_one_fault() -> None:
    _, *lines = wrong("demo", "training.stages=[a]")
    assert lines == ["training.stages=[a]: training.stages.0: Input should be 1 or 2 (got 'a')"]


def test_what_differs_from_the_defaults_is_a_recipe_of_the_same_configuration(tmp_path: Path) -> None:
    for name in recipe_names():
        config = load_recipe(name, ["nsd_root=elsewhere", "sweep.axes={sampler.cfg_scale: [3, 7.5]}"])
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml_text(changed_settings(config)))
        assert load_recipe(str(path)) == config
    changed = changed_settings(load_recipe("demo"))
    assert changed["sampler"]["kappa"] == 300
    assert not {"slurm", "launch", "remote"} & set(changed)
    assert "captions" not in changed["data"], "it follows nsd_root, as the default does"


@pytest.mark.parametrize("recipe", ["demo", "demo_full"])
def test_the_demos_report_held_out_objects_apart_wherever_their_world_lies(recipe: str) -> None:
    config = load_recipe(recipe, ["nsd_root=elsewhere/nsd"])
    assert config.evaluation.image_groups == Path("elsewhere/nsd/image_groups.json")
    assert config.evaluation.image_classes == Path("elsewhere/nsd/image_classes.json")
    assert config.training.heldout_fraction > 0, "the sweep chooses on pictures that training left out"


def test_a_kept_configuration_of_an_earlier_version_is_still_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config_yaml(load_recipe("demo")) + "phantom_networks:\n  stages: [vae]\n")
    assert load_recipe(str(path)) == load_recipe("demo")


@pytest.mark.parametrize("text", ["24:00:00", "1-00:00:00", "30", "90:00", "0:30:00"])
def test_a_time_of_slurm_stays_what_was_written_on_the_command_line_and_in_a_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"slurm:\n  time: {text}  # at most\n  sbatch: {{begin: 16:00, nice: 100, qos: 'a:1'}}\n")
    config = load_recipe(str(path))
    assert config.slurm.time == text
    assert config.slurm.sbatch == {"begin": "16:00", "nice": "100", "qos": "a:1"}
    words = [f"slurm.time={text}", "slurm.sbatch.time-min=4:00:00"]
    assert load_recipe("demo", words).slurm.time == text
    assert load_recipe("demo", words).slurm.sbatch == {"time-min": "4:00:00"}
    path.write_text(config_yaml(config))
    assert load_recipe(str(path)) == config
