"""Named protocols and the table of metrics."""

import json

import pytest

from nd_dist.errors import ConfigError
from nd_dist.metrics.protocols import PROTOCOLS, protocol_named
from nd_dist.metrics.table import METRICS, metric_of, ordered

OTHERS = ("brain-diffuser", "dynadiff", "takagi")


def test_all_protocols_of_the_field_are_there_and_are_json() -> None:
    assert set(PROTOCOLS) == {"nd", "paper", "mindeye2", "mindeye1", "mindbridge", *OTHERS}
    for protocol in PROTOCOLS.values():
        assert json.loads(json.dumps(protocol.describe()))["name"] == protocol.name


def test_protocols_differ_where_the_released_code_does() -> None:
    mindeye2, diffuser, dynadiff = (protocol_named(name) for name in ("mindeye2", "brain-diffuser", "dynadiff"))
    assert (mindeye2.ssim, diffuser.ssim, dynadiff.ssim) == ("2d", "columns", "2d")
    assert (mindeye2.distractors, diffuser.distractors, dynadiff.distractors) == ("real", "real", "reconstruction")
    assert (mindeye2.judges.efficientnet_weights, diffuser.judges.efficientnet_weights) == ("V2", "V1")
    assert (mindeye2.judges.inception, diffuser.judges.inception) == (342, 224)
    assert (mindeye2.num_test_images, protocol_named("mindeye1").num_test_images) == (1000, 982)


def test_mindbridge_is_mindeye1_without_the_first_resize() -> None:
    first, bridge = protocol_named("mindeye1").settings(), protocol_named("mindbridge").settings()
    assert {name for name in first if first[name] != bridge[name]} == {"recon_first", "original_first"}
    assert bridge["recon_first"]["size"] is None


def test_what_the_authors_did_otherwise_is_listed() -> None:
    departures = protocol_named("mindeye2").departures(num_images=1000, num_repeats=1)
    assert any("outputs" in line for line in departures)
    assert any("blurry" in line for line in departures)
    assert not any("test images" in line for line in departures)
    assert protocol_named("nd").departures(24, 5) == []
    assert protocol_named("paper").departures(1000, 5) == []


def test_texts_are_no_part_of_what_decides_numbers() -> None:
    settings = protocol_named("mindeye1").settings()
    assert "source" not in settings
    assert settings == protocol_named("mindeye2").settings()


def test_a_misspelt_protocol_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="evaluation.protocol=mindeye2"):
        protocol_named("mindeye-2")


def test_numbers_are_written_as_the_field_prints_them() -> None:
    assert metric_of("pixcorr").text(0.3219) == ".322"
    assert metric_of("pixcorr").text(-0.05) == "−.050"
    assert metric_of("pixcorr").text(1.0) == "1.000"
    assert metric_of("pixcorr").text(10.5) == "10.500"
    assert metric_of("clip").text(0.9301) == "93.0 %"
    assert metric_of("clip").change(-0.012) == "−1.2"
    assert metric_of("ssim").change(0.0123) == "+.012"


def test_columns_stand_in_the_papers_order() -> None:
    names = ["swav", "repeat_ssim", "new_judge", "clip", "ssim", "image_retrieval", "pixcorr", "alexnet_2"]
    expected = ["pixcorr", "ssim", "alexnet_2", "clip", "swav", "new_judge", "image_retrieval", "repeat_ssim"]
    assert ordered(names) == expected


def test_only_distances_are_better_when_lower() -> None:
    lower = {name for name, metric in METRICS.items() if not metric.higher_is_better}
    assert lower == {"effnet_b", "swav", "depthwise", "lpips", "fid", "kid"}
    assert not metric_of("new_distance", higher_is_better=False).higher_is_better
