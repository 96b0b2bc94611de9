"""What can stop a command, looked at before anything is started or queued: one list for all that starts or advises.

A check opens what ranks will open, without their work: folders, names of files, the index, records in the run folder.
It returns what it found, in words, or raises the error that a rank would meet.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.keys import did_you_mean
from launch.supervise.decoder import check_decoder
from launch.supervise.images import check_choice_images, check_test_images, check_trained_images
from nd_dist.config import Config, EvaluationConfig
from nd_dist.errors import CheckpointError, ConfigError, DataError, NdDistError, StorageError
from nd_dist.plugins import named_object
from nd_dist.schema import INITIAL, TARGETS

if TYPE_CHECKING:
    from shards.format.index import Index

Checks = dict[str, Callable[[], str]]


def checks_of(command: str, config: Config, ranks: int = 1, coming: Collection[str] = ()) -> Checks:
    """Return name -> check of everything that a command needs.

    Args:
        command: pack, train, evaluate, sweep or estimate.
        config: Its recipe.
        ranks: Ranks that will be started.
        coming: Commands that will be done before this one (jobs in a queue): what they make is not looked for.
    """
    if command == "pack":
        return {"data set": lambda: _check_data_set(config), **model_checks(config)}
    checks: Checks
    on_shards: dict[str, Callable[[Config, Index], str]]
    if command == "train":
        checks = {"teacher": partial(_check_teacher, config), "monitors": partial(_check_monitors, config)}
        on_shards = {
            "subjects": _check_subjects,
            "targets": _check_targets,
            "sessions": _check_sessions,
            "images": check_trained_images,
            "run folder": partial(_check_run_folder, ranks=ranks),
            "room": partial(_check_room, ranks=ranks),
        }
    else:
        checks = {
            **model_checks(config),
            "judges": partial(check_metrics, config.evaluation),
            "axes": partial(_check_axes, config),
            "guidance": partial(_check_guidance, config),
        }
        on_shards = {"subjects": _check_subjects, "images": check_test_images, "networks": _check_sources}
        if command != "evaluate":
            checks["choice"] = partial(_check_choice, config)
            on_shards["images of the choice"] = check_choice_images
        if config.evaluation.embeddings == "decoded" and "train" not in coming:
            on_shards["decoder"] = check_decoder
    if "pack" in coming:
        return checks
    index = cache(partial(read_index, config))
    return {**{name: partial(_with_index, config, index, check) for name, check in on_shards.items()}, **checks}


def run_checks(checks: Checks) -> tuple[dict[str, str], dict[str, NdDistError]]:
    """Return what checks found, and what is wrong, each thing once."""
    found: dict[str, str] = {}
    problems: dict[str, NdDistError] = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except NdDistError as problem:
            if str(problem) not in map(str, problems.values()):
                problems[name] = problem
    return found, problems


def read_index(config: Config) -> Index:
    """Return the index of a recipe's shards, with the data split that it chose."""
    from shards.format.splits import open_index

    return open_index(config)


def _with_index(config: Config, index: Callable[[], Index], check: Callable[[Config, Index], str]) -> str:
    return check(config, index())


def _check_data_set(config: Config) -> str:
    """Plan the packing, which opens the data set's files, and look for its space."""
    from shards.packing.pack import plan_pack

    plan = plan_pack(config)
    _require_space(config.shards_folder, plan.num_bytes)
    return plan.describe()


def model_checks(config: Config) -> Checks:
    """Return the checks of the diffusion model and the guidance model."""
    from nd_dist.frozen.folders import NETWORK, STABLE_DIFFUSION

    return {
        "model": lambda: _check_model(config.model, STABLE_DIFFUSION),
        "guidance model": lambda: _check_model(config.guidance_model, NETWORK),
    }


def _check_model(model: str, parts: Sequence[str]) -> str:
    """Refuse a model that could not be opened."""
    from nd_dist.frozen.folders import list_files, resolve_folder

    list_files(resolve_folder(model), parts)
    return model


def check_metrics(evaluation: EvaluationConfig) -> str:
    """Refuse a protocol, groups of images or metric networks that are not there; say what cannot be computed."""
    from nd_dist.evaluation.scoring.groups import read_groups
    from nd_dist.metrics.protocols import protocol_named

    protocol, judges = protocol_named(evaluation.protocol), evaluation.judges_dir
    if evaluation.image_groups is not None:
        read_groups(evaluation.image_groups)
    if evaluation.image_classes is not None:
        _check_classes(evaluation.image_classes)
    if judges is None:
        return "no folder is given (evaluation.judges_dir): using those next to the model, or pixel metrics only"
    if not judges.is_dir():
        raise ConfigError(
            "The folder of metric networks is not there.",
            where="evaluation.judges_dir",
            found=str(judges),
            todo=f"run `nd fetch judges --to {judges}` on a machine with internet access",
        )
    from nd_dist.frozen.field_judges import require_field_judges
    from nd_dist.frozen.judges import has_phantom_judges
    from nd_dist.frozen.optional_judges import absent_metrics

    if has_phantom_judges(judges):
        return f"{judges} (the phantom's)"
    require_field_judges(judges, protocol.judges)
    absent = absent_metrics(judges)
    return f"{judges}" + "".join(f"; no {name}: {reason}" for name, reason in absent.items())


def _check_classes(path: Path) -> None:
    """Refuse classes that cannot be read; COCO's files, of which each takes minutes, are only looked for."""
    from nd_dist.evaluation.scoring.groups import read_groups
    from shards.sources.classes import instances_paths

    if not path.is_dir():
        read_groups(path)
    elif missing := [file for file in instances_paths(path) if not file.is_file()]:
        raise DataError("A file of COCO's instances is missing.", where=str(missing[0]), todo="download it")


def _check_axes(config: Config) -> str:
    from nd_dist.evaluation.points.axes import check_axes

    check_axes(config)
    return ", ".join(config.sweep.all_axes()) or "kappa, eta"


def _check_guidance(config: Config) -> str:
    """Refuse a guidance term that cannot be imported."""
    for name in config.sampler.guidance:
        if ":" in name:
            named_object("sampler.guidance", name)
    return ", ".join(config.sampler.guidance)


def _check_choice(config: Config) -> str:
    """Refuse to choose by a metric that does not exist, or that cannot be computed."""
    from nd_dist.frozen.optional_judges import absent_metrics
    from nd_dist.metrics.table import METRICS

    name, judges = config.sweep.select, config.evaluation.judges_dir
    if name not in METRICS:
        raise ConfigError(
            "The metric of the choice does not exist.",
            where="sweep.select",
            expected=", ".join(sorted(METRICS)),
            found=name,
            todo=did_you_mean(difflib.get_close_matches(name, METRICS, n=1)),
        )
    if reason := absent_metrics(judges).get(name) if judges is not None else None:
        raise ConfigError("The metric of the choice cannot be computed.", where=f"sweep.select={name}", found=reason)
    return name


def _check_subjects(config: Config, index: Index) -> str:
    """Refuse subjects that were not packed."""
    wanted = {*config.data.subjects, *config.evaluated_subjects, config.training.target_subject}
    if missing := sorted(wanted - set(index.subjects)):
        raise ConfigError(
            f"Subjects {missing} are not in the shards.",
            where=str(config.shards_dir),
            expected=f"some of {sorted(index.subjects)}",
            todo="choose data.subjects= and training.target_subject= from these, or pack them",
        )
    return ", ".join(map(str, sorted(wanted)))


def _check_targets(config: Config, index: Index) -> str:
    """Refuse targets that were not packed."""
    from shards.format.codec import stores_of

    stores = stores_of(config.training.targets, config.training.int8_targets)
    if missing := [name for name in stores if name not in index.features]:
        raise DataError(
            f"Target stores {missing} are not in the shards.",
            where=str(config.shards_dir),
            found=", ".join(sorted(index.features)),
            todo=f"run `nd pack` with data.targets=[{','.join(config.data.targets)}] (int8 stores: data.int8_targets)",
        )
    return ", ".join(stores)


def _require_packed(config: Config, index: Index) -> None:
    """Refuse what cannot be looked at further; two checks that refuse the same are one problem."""
    _check_subjects(config, index)
    _check_targets(config, index)


def _check_sessions(config: Config, index: Index) -> str:
    """Refuse stages without subjects, and sessions that were not packed."""
    from nd_dist.training.source import stage_request

    for stage in config.made_stages:
        request = stage_request(config, stage, 1)
        for subject in set(request.subjects) & set(index.subjects):
            packed = index.subjects[subject].sessions
            if missing := [session for session in request.sessions or () if session > packed]:
                raise ConfigError(
                    f"Sessions {missing} of subject {subject} are not in the shards.",
                    where="training.sessions",
                    expected=f"sessions 1 to {packed}",
                    todo="choose from these, or pack more (data.max_sessions)",
                )
    return "all" if config.training.sessions is None else ", ".join(map(str, config.training.sessions))


def _check_teacher(config: Config) -> str:
    """Refuse a teacher that is not there, or is no ConvNeXt with its projector."""
    from nd_dist.files import read_json
    from nd_dist.frozen.convnext_teacher import PROJECTOR
    from nd_dist.frozen.folders import NETWORK, resolve_folder

    teacher = config.training.teacher if INITIAL in config.training.targets else None
    if not teacher:
        return "none"
    _check_model(teacher, NETWORK)
    folder = resolve_folder(teacher)
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "convnext" or not (folder / PROJECTOR).is_file():
        raise CheckpointError(
            "The teacher is not a ConvNeXt with a projector.",
            where=f"training.teacher={teacher}",
            expected=f"model_type convnext in config.json, and {PROJECTOR}",
            found=f"model_type {kind}" + ("" if (folder / PROJECTOR).is_file() else f", no {PROJECTOR}"),
        )
    return teacher


def _check_monitors(config: Config) -> str:
    """Refuse a monitor whose package is not installed."""
    missing = [name for name in config.training.monitors if name != "csv" and find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Packages of monitors are not installed: {', '.join(missing)}.",
            where=f"training.monitors={list(config.training.monitors)}",
            todo='pip install "nd-dist[track]", or leave them out',
        )
    return ", ".join(config.training.monitors) or "none"


def _check_run_folder(config: Config, index: Index, ranks: int) -> str:
    """Refuse a run folder that another recipe was trained in."""
    _require_packed(config, index)
    stages = [stage for stage in config.made_stages if check_stage(config, index, stage, ranks)]
    return f"{config.run_dir}" + "".join(f", holds stage {stage}" for stage in stages)


def check_stage(config: Config, index: Index, stage: int, ranks: int | None = None) -> bool:
    """Return whether a stage was begun in the run folder, or finished.

    Args:
        config: The recipe.
        index: Of the shards.
        stage: The stage.
        ranks: Ranks that would go on; None: as many as there were.

    Raises:
        CheckpointError: it was made with another recipe.
    """
    from nd_dist.checkpoint import MANIFEST, read_pointer
    from nd_dist.files import read_json
    from nd_dist.training.records import check_fingerprint, read_done, stage_dir, training_fingerprint
    from nd_dist.training.ridge import ridge_facts
    from nd_dist.training.source import stage_request
    from shards.format.codec import stores_of

    folder = stage_dir(config.run_dir, stage)
    found: dict[str, Any] = read_done(folder).get("fingerprint", {})
    manifest = folder / read_pointer(folder) / MANIFEST
    if not found and manifest.is_file():
        found = read_json(manifest)["facts"]["fingerprint"]
    if not found:
        return False
    own_ranks = ranks or found.get("launch.ranks", 1)
    request = stage_request(config, stage, own_ranks)
    stores = stores_of(request.targets, config.training.int8_targets)
    data = index.identity(request.subjects, stores, request.sessions)
    if config.decoder.kind == "ridge":
        check_fingerprint(ridge_facts(config, data), found, folder)
    else:
        check_fingerprint(training_fingerprint(config, data, stage, found["start"], own_ranks), found, folder)
    return True


def _check_room(config: Config, index: Index, ranks: int) -> str:
    """Refuse a training that this machine's GPUs, or the disk of the run folder, are too small for."""
    from launch.supervise.memory import checkpoint_bytes, gpu_bytes, memory_note, needed_bytes, stage_counts

    _require_packed(config, index)
    if config.decoder.kind == "ridge":
        from launch.supervise.memory import ridge_cost

        ridge_cost(config, index)
        return "see the note on its cost"
    specs = [spec for spec in index.target_specs if spec.name in config.training.targets]
    counts = stage_counts(config, index.num_voxels, specs, ranks)
    note = memory_note(needed_bytes(counts, config.training, ranks), gpu_bytes(), config, ranks)
    on_disk = checkpoint_bytes(counts, config.training)
    if not any(config.run_dir.glob("checkpoints/*/*")):
        _require_space(config.run_dir, on_disk)
    return f"{note}, {on_disk / 1e9:.1f} GB of checkpoints"


def _check_sources(config: Config, index: Index) -> str:
    """Refuse targets that other networks or settings made; networks are read only where a name or setting differs."""
    from nd_dist.frozen.folders import model_name

    own = {"model": model_name(config.model), "guidance_model": model_name(config.guidance_model)}
    own |= config.frozen.model_dump(mode="json", include={"normalize", "antialias", "vae_encode"})
    sources = {name: info.source for name, info in index.features.items() if name in TARGETS}
    if all(source.get(key, value) == value for source in sources.values() for key, value in own.items()):
        return "as recorded in the shards"
    import torch

    from nd_dist.evaluation.reconstruction.networks import check_sources
    from nd_dist.frozen import stable_diffusion
    from nd_dist.frozen.vision_tower import load_guidance_network

    sd, clip = stable_diffusion.load(config.model, parts=()), load_guidance_network(config, torch.float32, "cpu")
    check_sources(sources, sd, clip, config)
    return "those that made the shards' targets"


def _require_space(folder: Path, needed: float) -> None:
    """Refuse a disk with less room than is needed at least.

    Raises:
        StorageError: says how much is free.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            "The disk is too small.",
            where=str(folder),
            expected=f"{needed / 1e9:,.1f} GB free",
            found=f"{free / 1e9:,.1f} GB",
            todo="free some space, or choose a folder on another disk",
        )
