"""Datasets by name -> `Data`: whole sets of images in memory, batched and augmented there.

`digits` comes with scikit-learn; `cifar10` and `cifar100` through torchvision; `folder:<path>` is any tree of
`train/<class>/<image>` and `test/` or `val/<class>/<image>`. `NBS_DATA` names where downloads and relative folders lie.
"""

import hashlib
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

from nbs_lib.models.torchvision_ops import ensure_torchvision
from nbs_lib.paths import cache_dir

ensure_torchvision()  # before anything that imports torchvision

from torchvision import datasets  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; what public checkpoints were trained with
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(eq=False)
class Batches:
    """Images (uint8, (N, 3, H, W)) and labels (int64, (N,)) in memory, on the GPU where there is one with room.

    Iterating yields (images, labels): float32 (B, 3, H, W), normalised, and int64 (B,). `shuffle` and `augment` draw
    from torch's global generator: `torch.manual_seed` repeats an epoch."""

    images: torch.Tensor
    labels: torch.Tensor
    batch_size: int = 128
    shuffle: bool = False
    crop: int = 0  # zero pixels around an image, out of which a random window is taken
    flip: bool = False  # mirrored, left to right, every second time

    def __len__(self) -> int:
        """Batches in an epoch. When shuffling, a last batch of one image is left out: batch norm cannot take it."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest > (1 if self.shuffle and whole else 0))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device = self.images.device
        order = torch.randperm(len(self.images)) if self.shuffle else torch.arange(len(self.images))
        mean, std = ((torch.tensor(value) * 255).view(3, 1, 1).to(device) for value in (MEAN, STD))
        for chosen in order.to(device).split(self.batch_size)[: len(self)]:
            images = self._augmented(self.images[chosen])
            yield (images.float() - mean) / std, self.labels[chosen]

    def _augmented(self, images: torch.Tensor) -> torch.Tensor:
        count, _, height, width = images.shape
        if self.crop:
            windows = F.pad(images, (self.crop,) * 4).unfold(2, height, 1).unfold(3, width, 1)
            down, right = torch.randint(2 * self.crop + 1, (2, count)).to(images.device)
            images = windows[torch.arange(count, device=images.device), :, down, right]
        if self.flip:
            mirrored = (torch.rand(count) < 0.5).to(images.device)
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: `train` (shuffled, augmented) and `test` batches, `classes` (names), `skipped` (unreadable files)."""

    name: str
    train: Batches
    test: Batches
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of an image."""
        return tuple(self.train.images.shape[1:])

    def subset(self, count: int) -> "Data":
        """The same test images, and `count` training images, as many of each class as can be, always the same ones."""
        if not len(self.classes) <= count <= len(self.train.labels):
            raise ValueError(f"Expected {len(self.classes)}..{len(self.train.labels)} training images. Got {count}.")
        labels = self.train.labels.cpu().numpy()
        rank = pd.Series(labels).groupby(labels).cumcount().to_numpy()  # a label's how-manieth image this is
        chosen = torch.from_numpy(np.sort(np.lexsort((labels, rank))[:count])).to(self.train.images.device)
        train = replace(self.train, images=self.train.images[chosen], labels=self.train.labels[chosen])
        return replace(self, name=f"{self.name}[:{count}]", train=train)


def load_data(
    name: str = "digits", batch_size: int = 128, size: int | None = None, augment=True, skip_bad=False, device=None
) -> Data:
    """The data set called `digits`, `cifar10`, `cifar100` or `folder:<path>`, decoded once and held in memory.

    size: pixels an edge; images of a folder are scaled and cut to it (by default all must have one size), digits are
    scaled (by default to 32). augment: random shifts by an eighth of an edge, and mirroring, but not of digits.
    skip_bad: leave out images that cannot be read, with a warning that names them, instead of raising. device: where
    the images lie, by default the GPU, if there is one with room. Decoded folders are kept in the cache folder.
    Raises KeyError for an unknown name, FileNotFoundError for missing data and ValueError for what is damaged or
    mislabelled; each names the file and what is to be done."""
    kind, _, path = name.partition(":")
    if kind not in SOURCES or (kind == "folder") != bool(path):
        raise KeyError(f"Expected a data set out of digits, cifar10, cifar100 or folder:<path>. Got {name!r}.")
    if batch_size < 1 or (size is not None and size < 4):
        raise ValueError(f"Expected batch_size >= 1 and size >= 4 pixels. Got {batch_size} and {size}.")
    train, test, classes, skipped = SOURCES[kind](path, size, skip_bad)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and 2 * sum(part[0].nbytes for part in (train, test)) > torch.cuda.mem_get_info(device)[0]:
        device = torch.device("cpu")  # the network needs the rest; `fit` moves batch by batch
    train, test = ((images.to(device), labels.to(device)) for images, labels in (train, test))
    crop = train[0].shape[2] // 8 if augment else 0
    shuffled = Batches(*train, batch_size, shuffle=True, crop=crop, flip=augment and kind != "digits")
    name += f", {size} px" if size else ""
    return Data(name, shuffled, Batches(*test, batch_size), tuple(classes), tuple(skipped))


def _digits(_path: str, size: int | None, _skip_bad: bool):
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images.reshape(-1, 1, 8, 8) / 16).float()
    images = F.interpolate(images, size=(size or 32,) * 2, mode="bilinear", antialias=True)
    images = (images * 255).round().to(torch.uint8).repeat(1, 3, 1, 1)
    parts = train_test_split(images, torch.from_numpy(labels), test_size=360, random_state=0, stratify=labels)
    return parts[::2], parts[1::2], [str(digit) for digit in range(10)], []


def _cifar(name: str, _path: str, size: int | None, _skip_bad: bool):
    if size not in (None, 32):
        raise ValueError(f"Expected size 32 for {name}. Got {size}.")
    make, root = getattr(datasets, name.upper()), Path(os.environ.get("NBS_DATA") or cache_dir() / "data").expanduser()
    try:  # downloads what is not there, or not whole: torchvision checks sums
        sets = [make(root, train=train, download=True) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        how = f"Expected {name} in {root} (NBS_DATA names another folder), or a connection to download it."
        raise FileNotFoundError(f"{how} Delete damaged files there, or use folder:<path>. Got: {error}") from error
    parts = [(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in sets]
    return *parts, sets[0].classes, []


def _folder(path: str, size: int | None, skip_bad: bool):
    root = Path(os.environ.get("NBS_DATA", "")).expanduser() / Path(path).expanduser()
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise FileNotFoundError(f"Expected {root} to hold train/<class>/ and test/<class>/ or val/<class>/.")
    train, test = _listed(root / "train"), _listed(tests[0])
    if odd := set(train) ^ set(test):
        raise ValueError(f"Expected the same class folders in {root / 'train'} and {tests[0]}. Got in one only: {odd}.")
    parts, skipped = [], []
    for name, files in ((root / "train", train), (tests[0], test)):
        images, bad = _decoded(name, [file for label in files for file in files[label]], size, skip_bad)
        labels = np.repeat(np.arange(len(files)), [len(files[label]) for label in files])
        images, labels = (np.delete(array, list(bad), 0) if bad else array for array in (images, labels))
        if lost := [label for place, label in enumerate(files) if place not in labels]:
            raise ValueError(f"Expected an image that can be read in every class folder of {name}. Got none in {lost}.")
        parts.append((torch.from_numpy(images), torch.from_numpy(labels)))
        skipped += bad.values()
    if (shapes := [images.shape[1:] for images, _ in parts])[0] != shapes[1]:
        raise ValueError(f"Expected size= for training and test images of different sizes. Got {shapes}.")
    return *parts, list(train), skipped


def _listed(folder: Path) -> dict[str, list[Path]]:
    classes = {entry.name: entry for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.name[0] != "."}
    files = {k: sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGES) for k, path in classes.items()}
    if not classes or (empty := [str(classes[name]) for name in files if not files[name]]):
        what = f"folders without one: {', '.join(empty)}" if classes else "no class folder"
        raise FileNotFoundError(f"Expected images ({' '.join(IMAGES)}) in every class folder of {folder}. Got {what}.")
    return files


def _decoded(folder: Path, files: list[Path], size: int | None, skip_bad: bool) -> tuple[np.ndarray, dict[int, str]]:
    """The images, uint8 (N, 3, H, W), mapped from a file in the cache folder, and {position: file} of the bad ones."""
    facts = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((size, facts)).encode()).hexdigest()[:24]
    cached = cache_dir() / "data" / f"{key}.npy"
    with suppress(FileNotFoundError, ValueError):  # a damaged file is decoded anew
        return np.load(cached, mmap_mode="c"), {}
    readable = (image for file in files if isinstance(image := _try(partial(_read, size=size), file), np.ndarray))
    shape = (size, size) if size else next((image.shape[1:] for image in readable), (1, 1))
    needed = len(files) * 3 * shape[0] * shape[1]
    with (
        _temporary(cached, needed) as temporary,
        ThreadPoolExecutor() as pool,
        closing(pool.map(partial(_try, partial(_read, size=size)), files)) as reading,  # a failure stops the rest
    ):
        images, bad = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(files), 3, *shape)), {}
        for place, image in enumerate(tqdm(reading, f"Decoding {folder}", len(files), mininterval=1)):
            if isinstance(image, Exception) and skip_bad:
                bad[place] = str(files[place])
            elif isinstance(image, Exception):
                how = "Mend or remove it, or leave such files out with skip_bad=True."
                raise ValueError(f"Expected an image. Got {files[place]}: {image}. {how}") from image
            elif image.shape[1:] != shape:
                what = f"Got {files[place]} of {image.shape[1:]}, others of {tuple(shape)}."
                raise ValueError(f"Expected size= for images of different sizes. {what}")
            else:
                images[place] = image
        if bad:
            warnings.warn(f"{len(bad)} of {len(files)} images left out: {', '.join(bad.values())}.", stacklevel=4)
        else:
            images.flush()
            temporary.replace(cached)
        return images, bad  # the mapping outlives its name


@contextmanager
def _temporary(cached: Path, needed: int) -> Iterator[Path]:
    """A name beside `cached` for a file of `needed` bytes; gone in the end, with what killed processes have left."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    for left in cached.parent.glob("*.part"):
        with suppress(Timeout, OSError), _locked(left):  # no longer locked: its process is dead
            pass
    if needed > (free := shutil.disk_usage(cached.parent).free):
        raise OSError(f"Expected {needed / 1e9:.1f} GB free in {cached.parent} (NBS_CACHE). Got {free / 1e9:.1f} GB.")
    with _locked(cached.with_suffix(f".{secrets.token_hex(4)}.part")) as part:
        yield part


@contextmanager
def _locked(part: Path) -> Iterator[Path]:
    """Hold the lock of a temporary file, which the system frees when its process dies; in the end, remove both."""
    with FileLock(f"{part}.lock", timeout=0):
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)
            with suppress(OSError):  # some systems keep a file that is open
                Path(f"{part}.lock").unlink()


def _try(read: Callable, file: Path) -> np.ndarray | Exception:
    try:
        return read(file)
    except Exception as error:  # PIL raises whatever its decoders raise
        return error


def _read(file: Path, size: int | None) -> np.ndarray:
    """uint8 (3, H, W); with `size`, the shorter edge is scaled to 8/7 of it (as on ImageNet) and the middle cut out."""
    with Image.open(file) as image:
        image = image.convert("RGB")
        if size and image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, bleed=1 / 16)
        return np.asarray(image).transpose(2, 0, 1)


SOURCES = {"digits": _digits, "cifar10": partial(_cifar, "cifar10"), "cifar100": partial(_cifar, "cifar100")}
SOURCES["folder"] = _folder
