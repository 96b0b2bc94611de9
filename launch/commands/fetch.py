"""`nd fetch`: downloads what a run reads, where there is a network, into the folders that it is read from.

Of a hub's repository it takes those files that are opened (``nd_dist.frozen.folders``) and no others. What is there
and whole is kept, so the same command resumes after an interruption. Data sets come by the `aws` client, after terms
that people accept: the commands are printed (``shards.sources.download``).
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console

from launch.console import aligned, make_console
from nd_dist.config import Config
from nd_dist.errors import ConfigError, DataError
from nd_dist.files import atomic_path, read_json, sha256_file, write_bytes
from nd_dist.frozen.folders import NETWORK, STABLE_DIFFUSION, choose_files

CLIP_JUDGE = "openai/clip-vit-large-patch14"
COCO = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
CAPTIONS = ("captions_train2017.json", "captions_val2017.json")
_TORCHVISION = "https://download.pytorch.org/models"
_JUDGES = {
    "alexnet": f"{_TORCHVISION}/alexnet-owt-7be5be79.pth",
    "inception_v3": f"{_TORCHVISION}/inception_v3_google-0cc3c7bd.pth",
    "efficientnet_b1_v1": f"{_TORCHVISION}/efficientnet_b1_rwightman-bac287d4.pth",
    "efficientnet_b1_v2": f"{_TORCHVISION}/efficientnet_b1-c27df63c.pth",
    "swav_resnet50": "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",
    "inception_fid": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
}
"""Weight file -> where its publisher keeps it; the eight digits in a name begin the file's sha256."""
# What a failed connection raises differs between releases of huggingface_hub; its own error has it as a base
_FAILURES: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError, RuntimeError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Fetcher:
    """Downloads into a folder and says what it does.

    Args:
        mirror: Address of a server that takes the publishers' place: a hub, and files by their last name; "" is none.
        dry_run: Say what would be downloaded; change nothing.
        console: Where it is said.
    """

    mirror: str
    dry_run: bool
    console: Console

    def model(self, repo: str, parts: Sequence[str], folder: Path | None) -> None:
        """Fetch what is opened of a hub's model, without a folder into the Hugging Face cache.

        Raises:
            DataError: the hub cannot be reached, does not have it, or sent something else.
            CheckpointError: the model lacks a part.
        """
        endpoint = self.mirror or constants.ENDPOINT
        with _reaching(f"{endpoint}/{repo}"):
            info = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True)
            siblings: dict[str, Any] = {each.rfilename: each for each in info.siblings or ()}  # Any: RepoSibling
            get = partial(hf_hub_download, repo, revision=info.sha, local_dir=folder, endpoint=endpoint)
            chosen = choose_files(siblings, parts, lambda name: read_json(Path(get(name))), repo)
            self.console.print(f"{repo}, revision {info.sha} -> {folder or constants.HF_HUB_CACHE}")
            rows = []
            for name in chosen:
                cached = None if folder else try_to_load_from_cache(repo, name, revision=info.sha)
                path = folder / name if folder else Path(cached) if isinstance(cached, str) else None
                is_there = path is not None and _is_whole(path, siblings[name])
                if not is_there and not self.dry_run:
                    path = Path(get(name, force_download=path is not None and path.exists()))
                    if not _is_whole(path, siblings[name]):
                        raise DataError("A downloaded file does not match what the hub announced.", where=str(path))
                rows.append((name, _megabytes(siblings[name].size), self._state(is_there)))
        self.console.print(aligned(rows))

    def judge(self, name: str, url: str, folder: Path) -> None:
        """Fetch the weights of a metric network and write them as safetensors.

        Raises:
            DataError: the server cannot be reached, or sent something else.
        """
        from safetensors.torch import save_file

        from nd_dist.frozen.weights import iterate_tensors

        path = folder / f"{name}.safetensors"
        with self._download(url, [path], folder) as source:
            if source is None:
                return
            state = {key.removeprefix("module."): read() for key, read in iterate_tensors([source])}
            with atomic_path(path) as part:
                save_file(state, part)

    def captions(self, folder: Path) -> None:
        """Fetch COCO's captions.

        Raises:
            DataError: the server cannot be reached, or sent no archive.
        """
        with self._download(COCO, [folder / name for name in CAPTIONS], folder) as source:
            if source is None:
                return
            with zipfile.ZipFile(source) as archive:
                for name in CAPTIONS:
                    write_bytes(folder / name, archive.read(f"annotations/{name}"))

    @contextmanager
    def _download(self, url: str, targets: Sequence[Path], folder: Path) -> Iterator[Path | None]:
        """Yield the downloaded file, which is removed afterwards, or None where nothing is to be done."""
        from torch.hub import download_url_to_file

        address = f"{self.mirror}/{url.rpartition('/')[2]}" if self.mirror else url
        is_there = all(path.is_file() for path in targets)
        size = ""
        with _reaching(address):
            if not is_there:
                with urlopen(Request(address, method="HEAD")) as answer:
                    size = _megabytes(int(answer.headers["Content-Length"]))
            if is_there or self.dry_run:
                yield None
            else:
                folder.mkdir(parents=True, exist_ok=True)
                digits = re.search(r"-([0-9a-f]{8})\.pth$", url)
                with tempfile.TemporaryDirectory(dir=folder) as staging:
                    source = Path(staging) / "download"
                    download_url_to_file(address, str(source), digits and digits[1], progress=False)
                    yield source
        files = ", ".join(path.name for path in targets)
        self.console.print(aligned([(files, size, self._state(is_there), address)]))

    def _state(self, is_there: bool) -> str:
        return "is there" if is_there else "to download" if self.dry_run else "downloaded"


def fetch_command(what: str, to: Path | None, fetcher: Fetcher, config: Config, subjects: Sequence[int]) -> None:
    """Fetch ``models``, ``judges`` or ``captions``; of a data set print the commands that do.

    Raises:
        ConfigError: another word, or no folder.
        DataError: see ``Fetcher``.
    """
    from shards.sources.download import COMMANDS

    say = fetcher.console.print
    if what not in (known := ("models", "judges", "captions", *COMMANDS)):
        raise ConfigError("There is nothing by this name to fetch.", found=what, expected=", ".join(known))
    if what == "models":
        models = ((config.model, STABLE_DIFFUSION, "model"), (config.guidance_model, NETWORK, "guidance_model"))
        for repo, parts, _ in models:
            fetcher.model(repo, parts, to / repo if to else None)
        say("Settings: " + " ".join(f"{key}={to / repo if to else repo}" for repo, _, key in models))
        return
    if to is None:
        raise ConfigError("Only models have a default place, the Hugging Face cache.", todo="add --to FOLDER")
    if what == "judges":
        for name, url in _JUDGES.items():
            fetcher.judge(name, url, to)
        fetcher.model(CLIP_JUDGE, NETWORK, to / CLIP_JUDGE.rpartition("/")[2])
        say(f"Setting: evaluation.judges_dir={to}")
    elif what == "captions":
        fetcher.captions(to)
        say(f"Setting: data.captions={to}")
    else:
        commands = COMMANDS[what](to, subjects or config.data.subjects, config.data)
        say("\n".join(commands), highlight=False, markup=False)


def recipe_of(what: str) -> str:
    """Return the recipe whose settings decide what is fetched, where none is given."""
    return "laion_fmri" if what == "laion-fmri" else "paper"


def make_fetcher(mirror: str, dry_run: bool) -> Fetcher:
    """Return what downloads, and says so on the console."""
    return Fetcher(mirror.rstrip("/"), dry_run, make_console())


def _is_whole(path: Path, sibling: Any) -> bool:  # Any: huggingface_hub's RepoSibling
    """Return whether a file has the size and, where the hub gives one, the sha256 that it should have."""
    if not path.is_file() or path.stat().st_size != sibling.size:
        return False
    return sibling.lfs is None or sha256_file(path) == sibling.lfs.sha256


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


@contextmanager
def _reaching(address: str) -> Iterator[None]:
    """Turn what goes wrong on the way to a server into an error with a next step."""
    try:
        yield
    except _FAILURES as error:
        raise DataError(
            "A download failed; what is whole was kept.",
            where=address,
            found=(str(error).strip() or type(error).__name__).splitlines()[0],
            todo="run it on a machine with internet access, or give a mirror with --mirror URL (of a hub also "
            "HF_ENDPOINT); the same command resumes",
        ) from error
