"""Facts of the report's page in words: how a point was chosen, the protocol, what is absent, provenance."""

from __future__ import annotations

from typing import Any

from nd_dist.evaluation.points.units import CONTROLS
from nd_dist.metrics.table import METRICS, metric_of
from nd_dist.report.findings import Findings, point_label


def selection_sentence(findings: Findings) -> str:
    """Return how the main point was chosen; empty where none was."""
    selection = findings.selection
    if not selection:
        return ""
    metric = metric_of(selection["metric"], bool(selection["higher_is_better"]))
    num_images = sum(len(ids) for ids in selection["images"].values())
    trained_on = "held out from training" if selection["heldout"] else "which training has seen"
    rule = {"best": "the best", "least_guidance": "the least guidance within the interval of the best"}
    return (
        f"The point {point_label(findings.chosen or findings.recipe)} was chosen on {num_images} training images, "
        f"{trained_on}, by {rule[selection['rule']]} {metric.label} of {len(selection['candidates'])} points "
        f"({metric.text(selection['chosen']['value'])} there); test images had no part in it."
    )


def cost_facts(findings: Findings) -> list[tuple[str, str]]:
    """Return what the run's ranks worked, as they said when they were done; empty where none did."""
    phases: dict[str, float] = {}
    launches, hosts, devices = set(), set(), set()
    for rank in findings.work():
        launches.add(rank["launch"])
        hosts.add(rank["host"])
        devices.add(rank.get("device", "device unknown"))
        for phase, work in rank["work"].items():
            phases[phase] = phases.get(phase, 0.0) + float(work["busy_s"])
    if not sum(phases.values()):
        return []
    made = sum(
        len(findings.repeats(row, findings.image_ids(row.subject)[0])) * len(findings.image_ids(row.subject))
        for row in (*findings.rows, *findings.controls)
        if row.shown == row.point and row.subject in findings.subjects
    )
    each = f"; {phases.get('reconstruct', 0.0) / made:.2g} s a picture made and judged" if made else ""
    hours = f"{sum(phases.values()) / 3600:.3g} device-hours, {len(launches)} launch(es), {len(hosts)} host(s){each}"
    parts = [f"{name} {seconds:,.0f} s" for name, seconds in phases.items() if seconds >= 0.5]
    return [("Cost", hours), ("Hardware", ", ".join(sorted(devices))), ("By phase", ", ".join(parts))]


def absent_lines(findings: Findings) -> list[str]:
    """Return one line per metric or control that is missing, with the reason."""
    lines = []
    for name, reason in findings.metrics.get("absent", {}).items():
        control = name.removeprefix("control ")
        label = CONTROLS.get(control, METRICS[name].label if name in METRICS else name)
        lines.append(f"{label}: {reason}")
    return lines


def protocol_facts(details: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the protocol in words."""
    if not details:
        return []

    def resize(item: dict[str, Any]) -> str:
        if item["size"] is None:
            return "as it is"
        smooth = ", antialiased" if item["antialias"] or item["backend"] == "pil" else ", no antialias"
        return f"{item['size']} px, {item['filter']}, {item['backend']}{smooth}"

    recon = resize(details["recon_pixels"]) if details["recon_pixels"]["size"] else "the original's size"
    return [
        ("Source", details["source"]),
        (
            "First resize",
            f"reconstruction {resize(details['recon_first'])}; original {resize(details['original_first'])}",
        ),
        ("PixCorr and SSIM at", f"reconstruction {recon}; original {resize(details['original_pixels'])}"),
        ("SSIM", {"2d": "two-dimensional", "columns": "column-wise (scikit-image up to 0.19)"}[details["ssim"]]),
        (
            "Two-way distractors",
            {"real": "other originals", "reconstruction": "other reconstructions"}[details["distractors"]],
        ),
        ("Repeats", details["repeats"].replace("_", " ")),
        ("Intervals", "95 %, expanded percentile bootstrap over images; none with fewer than ten images"),
        ("p values", "paired, by flipping signs, corrected over all points that are compared (step-down maximum)"),
        ("Means over subjects", "images are drawn for all subjects at once"),
    ]


def provenance_facts(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return provenance as lines: code, seed, hashes, versions, and how to repeat it."""
    decoding = provenance.get("decoding", {})
    facts = [
        ("Repeat with", "nd evaluate config.yaml (in this run's folder)"),
        ("Code", provenance.get("code", "unknown")),
        ("Seed", provenance.get("seed", "unknown")),
        ("Config hash", provenance.get("config_hash", "unknown")),
        ("Shards", provenance.get("shards", "unknown")),
        (
            "Targets",
            f"{decoding.get('embeddings', 'unknown')}; calibration: {decoding.get('z_calibration', 'none')} "
            f"({', '.join(decoding.get('calibrated', ['initial']))}; by {decoding.get('calibrated_by', 'element')})",
        ),
        ("Decoder", decoding.get("decoder", "none")),
        *(
            (f"Network: {name}", value)
            for name, value in provenance.get("networks", {}).items()
            if name != "scheduler"
        ),
        *((f"Judge: {name}", value) for name, value in provenance.get("judges", {}).items()),
        ("Platform", provenance.get("platform", "unknown")),
        ("Versions", ", ".join(f"{name} {value}" for name, value in provenance.get("versions", {}).items())),
    ]
    facts += [
        (f"Joined run {number}", f"{item['run']}, code {item['code']}, config {item['config_hash']}")
        for number, item in enumerate(provenance.get("merged", []), start=1)
    ]
    return [(name, str(value)) for name, value in facts]
