"""Images in, metrics of features, images out; nothing here knows of training.

Whoever copies a method into a project with data of its own replaces this file: a script needs a
data set whose items are (image uint8 (3, H, W), label, index), and what else it calls here.
"""

import collections
import copy
import functools
import io
import os
import re
import signal
import sys
import typing
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, UnidentifiedImageError         # comes with torchvision
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision import datasets
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

import common

MEAN = (0.485, 0.456, 0.406)                             # ImageNet's, for every data set
STD = (0.229, 0.224, 0.225)
ENDINGS = datasets.folder.IMG_EXTENSIONS                 # .jpg, .png, ...: files taken for images
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF")                # what Pillow may open
BICUBIC = v2.InterpolationMode.BICUBIC


# --------------------------------------------------------------------------------------- decoding
def decode(data: bytes) -> torch.Tensor:
    """The bytes of an image file -> uint8 (3, H, W). Raises OSError with the reason if not.

    JPEG by torchvision, which is faster; other formats by Pillow. EXIF rotation is not applied and
    an alpha channel is dropped, as torchvision does. Of 16 bits a value the high byte is taken."""
    try:
        if data[:2] == b"\xff\xd8":
            check_size(*jpeg_size(data))
            packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(packed, mode=ImageReadMode.RGB)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")              # Pillow's, of large sizes and of palettes
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_size(image.width, image.height)
                return to_rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        if data.startswith(b"version https://git-lfs"):
            raise OSError("a Git LFS pointer, not the file it stands for") from error
        kinds = ", ".join(FORMATS)
        raise OSError(f"{'other content' if data else 'an empty file'}, no {kinds}") from error
    except Exception as error:                           # a damaged file can raise nearly anything
        raise OSError(common.first_line(error)) from error


def jpeg_size(data: bytes) -> tuple[int, int]:
    """(width, height) in the header of a JPEG. Pillow takes as long as decoding a small one."""
    position = 2
    while position + 9 <= len(data):
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):         # a start of frame
            height = int.from_bytes(data[position + 5:position + 7], "big")
            width = int.from_bytes(data[position + 7:position + 9], "big")
            return width, height
        if marker == 0xFF:                               # a byte of padding
            position += 1
        else:
            position += 2 + int.from_bytes(data[position + 2:position + 4], "big")
    raise ValueError("the file ends before the size of the image")


def check_size(width: int, height: int):
    """Raises OSError on sizes that would take too much memory, before anything is decoded."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise OSError(f"{width} x {height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS, "
                      f"{limit}")
    if max(width, height) > 100 * min(width, height):
        raise OSError(f"{width} x {height} pixels: one side is more than 100 times the other")


def to_rgb(image: Image.Image) -> torch.Tensor:
    """An opened image -> uint8 (3, H, W). Raises OSError where 8 bits would lose what is in it."""
    if image.mode.startswith("I"):                       # I;16 and its like; I is 32 bits
        values = np.asarray(image).astype(np.int64)
        most = int(values.max())
        if values.min() < 0 or most >= 2 ** 16 or 0 < most < 2 ** 12:
            raise OSError(f"mode {image.mode}, values to {most}: convert to 8 bits")
        gray = torch.from_numpy((values >> 8).astype(np.uint8))
        return gray.expand(3, -1, -1).contiguous()
    bands = len(image.getbands())
    if image.format == "TIFF":                           # Pillow ignores bands beyond the colors'
        bands = max(bands, image.tag_v2.get(277, 1))     # samples per pixel
    if image.mode in ("F", "RGBX") or bands > len(image.getbands()):
        raise OSError(f"mode {image.mode} of {bands} bands: convert to 8 bits, gray or RGB")
    return v2.functional.pil_to_tensor(image.convert("RGB"))


class ImageDataset(Dataset):
    """Images with labels, held in memory or decoded from files when asked for.

    source: uint8 tensor (n, 3, H, W) or list of paths; labels: n ints or None; transform: image ->
    image, random numbers from torch's generator. dataset[epoch, index] -> (image uint8 (3, H, W),
    label or -1, index), the same for the same (seed, epoch, index). If an image cannot be read,
    `unreadable` (n,) marks it, and another one, drawn by the same three numbers, stands in for it
    with a label and an index of its own."""

    def __init__(self, source, labels=None, seed: int = 0, transform=None):
        if not torch.is_tensor(source):                  # one array: loader processes share it
            source = np.array([os.fsencode(path) for path in source])
        self.source = source
        self.labels = np.full(len(source), -1) if labels is None else np.asarray(labels, np.int64)
        self.seed = seed
        self.transform = transform
        self.unreadable = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.source)

    def read(self, index: int) -> torch.Tensor:
        """Image `index` as uint8 (3, H, W). Raises OSError if it cannot be read."""
        if torch.is_tensor(self.source):
            return self.source[index]
        path = Path(os.fsdecode(self.source[index]))
        if not path.is_file():                           # reading a named pipe would never end
            raise OSError("no such file, or not a regular one")
        return decode(path.read_bytes())

    def is_readable(self, index: int) -> bool:
        try:
            self.read(index)
            return True
        except OSError:
            return False

    def __getitem__(self, key):
        epoch, index = key
        random = None
        while True:
            if not self.unreadable[index]:
                try:
                    image = self.read(index)
                    break
                except OSError as error:
                    self.mark_unreadable(index, error)
            if self.unreadable.all():
                raise common.UserError(f"none of the {len(self)} images can be read")
            if random is None:
                random = np.random.RandomState(common.derive_seed(self.seed, epoch, index))
            index = int(random.randint(len(self)))
        if self.transform:
            with torch.random.fork_rng(devices=[]):      # may be the trainer's own generator
                torch.default_generator.manual_seed(common.derive_seed(self.seed, epoch, index))
                image = self.transform(image)
        return image, int(self.labels[index]), index

    def mark_unreadable(self, index: int, error: OSError):
        name = ascii(os.fsdecode(self.source[index]))
        tqdm.write(f"skipped, cannot be read: {name} ({error})", file=sys.stderr)
        self.unreadable[index] = True

    def with_transform(self, transform):
        """The same images with another transform."""
        dataset = copy.copy(self)
        dataset.transform = transform
        return dataset


def subset(dataset: ImageDataset, shots: int, percent: float, seed: int) -> ImageDataset:
    """`shots` images of each class, or `percent` of them (at least one), drawn by the seed."""
    random = np.random.RandomState(seed)
    rows = []
    for label in np.unique(dataset.labels):
        of_class = random.permutation(np.flatnonzero(dataset.labels == label))
        count = shots or max(1, round(len(of_class) * percent / 100))
        rows.append(of_class[:count])
    rows = np.sort(np.concatenate(rows))
    return ImageDataset(dataset.source[rows], dataset.labels[rows], dataset.seed)


def count_unreadable(datasets, device) -> int:
    """How many files of all data sets could not be read so far by any process, each counted once.
    datasets: ImageDataset or None each."""
    everything = set()
    unreadable = set()
    for dataset in datasets:
        if dataset is None or torch.is_tensor(dataset.source):
            continue
        flags = dataset.unreadable.to(device, torch.int32)
        if common.world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)    # each process met its own
        everything |= set(dataset.source)
        unreadable |= set(dataset.source[flags.cpu().bool().numpy()])
    if len(unreadable) > len(everything) / 10:
        share = len(unreadable) / len(everything)
        common.log(f"warning: {100 * share:.0f} % of the images cannot be read")
    return len(unreadable)


# ----------------------------------------------------------------------------------- augmentation
def augment(size: int, crop_scale: float, color_jitter: float = 0.0, randaugment: int = 0):
    """Random crop of `crop_scale` to 1 of the area (1: the center instead), resized to size x size;
    random flip (both MAE's); brightness, contrast and saturation changed by up to `color_jitter`
    (BEiT's); RandAugment of magnitude 0 (none) to 10.

    The magnitude counts 11 bins, so that 9 is 9 tenths of the strongest (27 degrees of rotation),
    as the papers mean it; torchvision's own 31 bins would make it 30 percent."""
    if crop_scale < 1:
        crop = v2.RandomResizedCrop(size, (crop_scale, 1.0), interpolation=BICUBIC)
    else:
        crop = CenterCrop(size)
    steps = [crop, v2.RandomHorizontalFlip()]
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    if randaugment:
        fill = [round(255 * value) for value in MEAN]
        steps.append(v2.RandAugment(2, randaugment, 11, v2.InterpolationMode.BILINEAR, fill=fill))
    return v2.Compose(steps)


def mixing(mixup: float, cutmix: float, classes: int):
    """A function (images, labels) -> (mixed images, soft labels (B, classes)): MixUp or CutMix with
    these alphas, each half of the time; an alpha of 0 turns one off. Both 0: nothing is changed."""
    kinds = []
    if mixup:
        kinds.append(v2.MixUp(alpha=mixup, num_classes=classes))
    if cutmix:
        kinds.append(v2.CutMix(alpha=cutmix, num_classes=classes))
    return v2.RandomChoice(kinds) if kinds else lambda images, labels: (images, labels)


class CenterCrop:
    """Resize the shorter side to size / 0.875 (to size, if that is above 224 or without margin),
    but enlarge it no further than needed; then crop the center, size x size."""

    def __init__(self, size: int, margin: bool = True):
        self.size = size
        self.margin = margin

    def __call__(self, image):
        if image.shape[-2:] == (self.size, self.size):
            return image
        short_side = self.resized(min(image.shape[-2:]))
        image = v2.functional.resize(image, [short_side], BICUBIC)
        return v2.functional.center_crop(image, [self.size])

    def resized(self, short_side: int) -> int:
        """What the shorter side of an image is made before the crop."""
        wanted = self.size
        if self.size <= 224 and self.margin:
            wanted = round(self.size / 0.875)
        return max(self.size, min(short_side, wanted))


@functools.cache
def mean_std(device) -> list[torch.Tensor]:
    """MEAN and STD as (3, 1, 1) tensors on the device; made once, so that no step copies them."""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD)]


def to_device(images: torch.Tensor, device) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> normalised float32 there: a quarter of the bytes travel."""
    mean, std = mean_std(device)
    return (images.to(device, non_blocking=True) - 255 * mean) / (255 * std)


# -------------------------------------------------------------------------------------- data sets
class Splits(typing.NamedTuple):
    """pretrain: what to pre-train on; train, test: labelled, or None; classes: their names."""
    pretrain: ImageDataset
    train: ImageDataset | None
    test: ImageDataset | None
    classes: list


def open_data(name: str, root: str, seed: int = 0) -> Splits:
    """shapes, cifar10, cifar100, stl10, tiny-imagenet, imagenet (the last five under `root`), or a
    folder as `open_folder` describes it. Raises UserError."""
    if name == "shapes":
        train_shapes = synthetic_shapes("train", np.arange(10_000))
        test_shapes = synthetic_shapes("test", np.arange(2_000))
        train = ImageDataset(torch.from_numpy(train_shapes["image"]), train_shapes["shape"], seed)
        test = ImageDataset(torch.from_numpy(test_shapes["image"]), test_shapes["shape"], seed)
        return Splits(train, train, test, list(SHAPES))
    if name in ("cifar10", "cifar100", "stl10"):
        return open_torchvision(name, root, seed)
    places = {"imagenet": ("imagenet", "ILSVRC/Data/CLS-LOC", ""),
              "tiny-imagenet": ("tiny-imagenet-200", "tiny-imagenet", "")}
    if name not in places:
        try:
            return open_folder(Path(name), seed)
        except OSError as error:                         # folders that this user may not read
            raise common.UserError(f"{name} cannot be read ({error})") from error
    for folder in (Path(root, place) for place in places[name]):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return open_folder(folder, seed)
    raise common.UserError(f"no train/ and val/ in {Path(root, places[name][0])}; put the data "
                           "there, or say with --data-root where it is")


def open_torchvision(name: str, root: str, seed: int) -> Splits:
    """CIFAR-10, CIFAR-100 or STL-10, downloaded if need be. Raises UserError if that fails."""
    kinds = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}
    kind = kinds[name]
    parts = ("train+unlabeled", "train", "test") if name == "stl10" else (True, False)
    try:
        with common.rank_zero_first():
            sets = [kind(root, part, download=True) for part in parts]
    except (OSError, RuntimeError) as error:
        reason = common.first_line(error)
        raise common.UserError(f"{name} is not in {root} and cannot be downloaded ({reason}); "
                               f"fetch {kind.url}, put it there, and start again") from error
    if name == "stl10":                                  # pre-training sees unlabelled images, too
        pretrain = ImageDataset(torch.from_numpy(sets[0].data), None, seed)
        train, test = (ImageDataset(torch.from_numpy(s.data), s.labels, seed) for s in sets[1:])
        return Splits(pretrain, train, test, sets[1].classes)
    images = [torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous() for s in sets]
    train, test = (ImageDataset(x, s.targets, seed) for x, s in zip(images, sets))
    return Splits(train, train, test, sets[0].classes)


def open_folder(folder: Path, seed: int) -> Splits:
    """Images in a folder. Raises UserError if there is none, or no readable image in it.

    Three layouts are known:
    - train/ and val/ (or training/; valid/, validation/, test/, testing/; in any case), each with a
      folder for each class;
    - a folder for each class: every tenth image is kept for testing;
    - images in the folder itself: they and those in folders below it have no labels."""
    if not folder.is_dir():
        raise common.UserError(f"no folder {folder}; --data is a folder of images or one of "
                               "shapes, cifar10, cifar100, stl10, tiny-imagenet, imagenet")
    top, test_top = find_splits(folder)
    seen = set()
    files = np.array(list_images(top, seen), object)
    parts = [Path(file).relative_to(top).parts for file in files]
    names = [part[0] for part in parts]
    directly = sum(len(part) == 1 for part in parts)
    classes = [] if directly else sorted(set(names))
    labels = np.searchsorted(classes, names) if classes else None
    everything = ImageDataset(files, labels, seed)
    if not any(everything.is_readable(i) for i in range(len(files))):
        raise common.UserError(f"no readable image in {top} or in its folders ({len(files)} files "
                               f"tried; read are {' '.join(ENDINGS)})")
    common.log(f"{top}: {len(files)} images, {len(classes) or 'no'} class folders")
    if 0 < directly < len(files):
        common.log(f"{len(files) - directly} of them are in folders below it; no labels are taken "
                   "from folders that stand beside images")
    if len(classes) < 2:
        common.log("fewer than two classes: there will be no scores")
        return Splits(everything, None, None, classes)
    if test_top:
        train = everything
        test = ImageDataset(*list_labelled(test_top, classes, seen), seed)
    else:                                                # a test image is for nothing else
        common.log("no val/ or test/ beside the training images: every tenth is kept for testing")
        held_out = np.arange(len(files)) % 10 == 9
        train = ImageDataset(files[~held_out], labels[~held_out], seed)
        test = ImageDataset(files[held_out], labels[held_out], seed)
    if not any(test.is_readable(i) for i in range(len(test))):
        common.log(f"no readable image to test on in {test_top or top}: there will be no scores")
        return Splits(everything, None, None, classes)
    return Splits(train, train, test, classes)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a system's, not a user's."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "lost+found")


def has_folders(folder: Path) -> bool:
    return any(path.is_dir() and not is_hidden(path.name) for path in folder.iterdir())


def find_splits(folder: Path) -> tuple[Path, Path | None]:
    """The folders of training and test images: `folder` itself and None if it has no such parts.

    A folder train/ may also be a class. It is taken for the training images if a test folder stands
    beside it, or if it alone of all folders there has folders in it."""
    parts = {path.name.lower(): path for path in sorted(folder.iterdir())
             if path.is_dir() and not is_hidden(path.name)}
    train = parts.get("train") or parts.get("training")
    test_names = ("val", "valid", "validation", "test", "testing")
    tests = [parts[name] for name in test_names if name in parts]
    if not train:
        return folder, None
    test = tests[0] if tests else None
    if not test:
        with_folders = [path for path in parts.values() if has_folders(path)]
        if with_folders != [train]:
            return folder, None
    left_out = sorted(path.name for path in parts.values() if path not in (train, test))
    if left_out:
        taken = [path.name for path in (train, test) if path]
        common.log(f"{folder}: taken are {taken}, left out {left_out}")
    return train, test


def list_images(top: Path, seen: set) -> list[str]:
    """Paths of all images below `top`, sorted, each real file once. `seen` holds the real paths
    that were listed before, and is added to.

    Symbolic links are followed after everything else, so that a file keeps its own place."""
    files = []
    pending = collections.deque([str(top)])              # folders before links
    hidden = 0
    while pending:
        path = pending.popleft()
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        if not os.path.isdir(path):                      # a link to a file
            files.append(path)
            continue
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            is_image = entry.name.lower().endswith(ENDINGS)
            if is_hidden(entry.name):
                hidden += 1
            elif entry.is_symlink():
                if is_image or os.path.isdir(entry.path):
                    pending.append(entry.path)
            elif entry.is_dir():
                pending.appendleft(entry.path)
            elif is_image:
                seen.add(f"{real}/{entry.name}")
                files.append(entry.path)
    if hidden:
        common.log(f"{top}: {hidden} hidden or system files and folders were skipped")
    return sorted(files, key=os.path.split)


def list_labelled(folder: Path, classes: list, seen: set) -> tuple[list, np.ndarray]:
    """Paths and labels of the test images in `folder`: in class folders, or flat with a list of
    their classes, as Tiny ImageNet and Kaggle's ImageNet have them. Raises UserError on others."""
    number = {name: i for i, name in enumerate(classes)}
    tiny = folder / "val_annotations.txt"
    lists = (parent / "LOC_val_solution.csv" for parent in folder.resolve().parents)
    kaggle = next((path for path in lists if path.is_file()), None)
    if tiny.is_file():                                   # "val_0.JPEG<tab>n03444034<tab>0<tab>..."
        lines = tiny.read_text().split("\n")
        rows = [line.split("\t")[:2] for line in lines if "\t" in line]
        pairs = [(str(folder / "images" / file), name) for file, name in rows if name in number]
    elif kaggle and not has_folders(folder):             # "ILSVRC2012_val_00048981,n03995372 85..."
        lines = kaggle.read_text().split("\n")
        rows = [re.split("[, ]", line)[:2] for line in lines[1:] if "," in line]
        pairs = [(str(folder / f"{file}.JPEG"), name) for file, name in rows if name in number]
    else:
        files = list_images(folder, seen)
        parts = [Path(file).relative_to(folder).parts for file in files]
        if any(len(part) == 1 for part in parts):
            raise common.UserError(f"{folder} has images outside class folders, so without labels; "
                                   "move it elsewhere to test on every tenth training image")
        pairs = [(file, part[0]) for file, part in zip(files, parts)]
        names = {name for _, name in pairs}
        if names - set(classes):
            raise common.UserError(f"{folder} has classes that the training images do not have: "
                                   f"{sorted(names - set(classes))[:5]}")
        if pairs and set(classes) - names:
            common.log(f"{folder} has no images of {sorted(set(classes) - names)[:5]}")
    return [file for file, _ in pairs], np.array([number[name] for _, name in pairs], int)


# -------------------------------------------------------------------------------- sampler, loader
class BatchSampler(Sampler):
    """This process's share of the global batches of the steps first_step ... last_step - 1: lists
    of (epoch, index), one for each micro-batch.

    The order is DistributedSampler's: a function of (seed, epoch), dealt out in turn."""

    def __init__(self, cfg, images: int, first_step: int, last_step: int):
        self.per_epoch = images // cfg.batch_size * cfg.accumulate
        self.micro_batches = range(first_step * cfg.accumulate, last_step * cfg.accumulate)
        self.size = cfg.batch_size // (common.world_size() * cfg.accumulate)
        self.sampler = DistributedSampler(range(images), common.world_size(), common.rank(),
                                          seed=cfg.seed, drop_last=True)

    def __len__(self):
        return len(self.micro_batches)

    def __iter__(self):
        epoch_of_order = None
        for i in self.micro_batches:
            epoch, position = divmod(i, self.per_epoch)
            if epoch != epoch_of_order:
                self.sampler.set_epoch(epoch)
                order = list(self.sampler)
                epoch_of_order = epoch
            batch = order[position * self.size:(position + 1) * self.size]
            yield [(epoch, index) for index in batch]


def usable_cores() -> int:
    """Cores that this process may use: Slurm and containers allow fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def loader(dataset, batches, workers: int):
    """Batches (images uint8 (B, 3, H, W), labels (B), indices (B)) from lists of (epoch, index).

    batches: None for an IterableDataset whose items are batches. Raises UserError if a loader
    process dies or shared memory is full."""
    workers = min(workers, max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    batching = {"batch_size": None} if batches is None else {"batch_sampler": batches}
    iterator = iter(DataLoader(
        dataset, **batching, num_workers=workers, pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_ctrl_c))

    def with_worker_errors():
        while True:
            try:
                batch = next(iterator, None)
            except RuntimeError as error:
                if not re.search(r"worker \(pid|shared memory|No space left", str(error)):
                    raise
                reason = str(error).strip().splitlines()[-1]
                raise common.UserError(
                    f"a loader process ended ({reason}); fewer --workers need less memory, and in "
                    "Docker --shm-size=8g gives them more shared memory") from error
            if batch is None:
                return
            yield batch

    return with_worker_errors()


def batches(dataset: ImageDataset, cfg, first_step: int, last_step: int):
    """The micro-batches of a run's steps, in order, from `loader`."""
    sampler = BatchSampler(cfg, len(dataset), first_step, last_step)
    return loader(dataset, sampler, cfg.workers)


def ignore_ctrl_c(worker: int = 0):
    """In a loader process: Ctrl-C is the trainer's to answer. When the trainer goes, the thread
    that hands it a batch fails and would print a traceback, which helps nobody."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print_traceback = sys.excepthook

    def hook(kind, *details):
        if not issubclass(kind, (EOFError, ConnectionError)):
            print_traceback(kind, *details)

    sys.excepthook = hook


# -------------------------------------------------- evaluation of features: k-NN, linear probe
@torch.no_grad()
def features(encode, dataset: ImageDataset, size: int, device, batch_size: int = 100,
             workers: int = 0, limit: int = 0, transform=None):
    """Features of images, without augmentation: encode(images (B, 3, size, size)) -> (B, D).

    transform: image -> image, in place of the center crop. limit: at most so many images, evenly
    spread; 0: all. Each process encodes a share and all get all of them: features fp32 (n, D) and
    labels (n,) on the device, in order, less the unreadable images.
    Small batches suit a CPU: the micro encoder is 1.5 times as fast with 125 images as with 500
    (tests/measure/benchmark.md)."""
    count = min(limit or len(dataset), len(dataset))
    rows = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    share = np.arange(common.rank(), len(rows), common.world_size())
    if len(share) == 0:                                  # more processes than rows
        share = np.array([0])
    parts = [share[i:i + batch_size] for i in range(0, len(share), batch_size)]
    keys = [[(0, i) for i in rows[part]] for part in parts]
    loaded = loader(dataset.with_transform(transform or CenterCrop(size)), keys, workers)
    loaded = tqdm(loaded, "features", len(parts), leave=False,
                  disable=None if common.rank() == 0 else True)
    table = None
    read = torch.zeros(len(rows), device=device)
    for part, (images, _, index) in zip(parts, loaded):
        encoded = encode(to_device(images, device)).float()
        if table is None:
            table = encoded.new_zeros(len(rows), encoded.shape[1])
        table[part] = encoded
        read[part] = (index == torch.from_numpy(rows[part])).float().to(device)
    if common.world_size() > 1:
        dist.all_reduce(table)
        dist.all_reduce(read)
        table /= read.clamp(min=1)[:, None]              # row 0 may be encoded several times
    labels = torch.from_numpy(dataset.labels[rows]).to(device)
    if read.all():                                       # no copy: ImageNet's take gigabytes
        return table, labels
    return table[read > 0], labels[read > 0]


def nearest_neighbors(test, train, k: int):
    """For each feature of test (n, D) the k of train (m, D) with the largest cosine, best first:
    similarity (n, k) and row numbers (n, k). k may exceed m."""
    test = F.normalize(test.float(), dim=1)
    train = F.normalize(train.float(), dim=1)
    nearest = [(query @ train.T).topk(min(k, len(train))) for query in test.split(1000)]
    similarity = torch.cat([values for values, _ in nearest])
    rows = torch.cat([indices for _, indices in nearest])
    return similarity, rows


def knn_vote(similarity, neighbor_labels, labels, classes: int, temperature: float = 0.07):
    """Neighbors' similarity (n, k), their labels (n, k), labels (n,) -> (top-1, top-5) in percent.

    Weighted k-NN (DINO): each votes with exp(similarity / temperature); the largest possible vote
    is taken out, so nothing overflows. Top-5 counts min(5, k) classes."""
    votes = torch.zeros(len(labels), classes, device=labels.device)
    votes.scatter_add_(1, neighbor_labels, ((similarity - 1) / temperature).exp())
    ranking = votes.sort(descending=True).indices                              # (n, classes)
    hits = ranking[:, :min(5, neighbor_labels.shape[1])] == labels[:, None]    # (n, 5)
    top1 = hits[:, 0].float().mean().item()
    top5 = hits.any(dim=1).float().mean().item()
    return 100 * top1, 100 * top5


def knn(train, train_labels, test, test_labels, classes: int, k: int = 20):
    """Weighted k-NN: (top-1, top-5) accuracy in percent; features (n, D), labels (n,)."""
    similarity, rows = nearest_neighbors(test, train, k)
    return knn_vote(similarity, train_labels[rows], test_labels, classes)


def linear_probe(train, train_labels, test, test_labels, classes: int) -> float:
    """Top-1 accuracy in percent of a linear classifier in closed form, for features (n, D) and
    labels (n,).

    Ridge regression of one-hot labels on standardised features. The penalty is chosen on every
    tenth training image, with weights that were computed without these."""
    mean = train.mean(dim=0)
    std = train.std(dim=0) + 1e-6
    x = (train - mean) / std                                                   # (n, D)
    y = F.one_hot(train_labels, classes).float()
    share = y.mean(dim=0)                                                      # (classes,)
    y = y - share
    held_out = torch.arange(len(x), device=x.device) % 10 == 9
    x_held, y_held = x[held_out], y[held_out]
    gram = (x.T @ x).cpu().double()                                            # (D, D)
    moment = (x.T @ y).cpu().double()                                          # (D, classes)
    gram_rest = gram - (x_held.T @ x_held).cpu().double()
    moment_rest = moment - (x_held.T @ y_held).cpu().double()

    def accuracy(gram, moment, penalty, features, labels) -> float:
        ridge = len(x) * penalty * torch.eye(len(gram), dtype=torch.float64)
        weights = torch.cholesky_solve(moment, torch.linalg.cholesky(gram + ridge))
        logits = features @ weights.to(features) + share                       # (n, classes)
        return 100 * (logits.argmax(dim=1) == labels).float().mean().item()

    penalties = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    held_out_accuracy = [accuracy(gram_rest, moment_rest, penalty, x_held, train_labels[held_out])
                         for penalty in penalties]
    best = penalties[int(np.argmax(held_out_accuracy))]
    return accuracy(gram, moment, best, (test - mean) / std, test_labels)


def topk_accuracy(logits, labels) -> dict:
    """Percent of logits (n, C) whose largest, or five largest, hold the label (n,)."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]     # (n, 5)
    top1 = hits[:, 0].float().mean().item()
    top5 = hits.any(dim=1).float().mean().item()
    return {"top1": 100 * top1, "top5": 100 * top5}


def mean_patch_token(model):
    """The feature that is scored: the mean of an image's patch tokens, images -> (B, D)."""
    return lambda images: model.encode(images)[:, 1:].mean(dim=1)


def small_pixels(images: torch.Tensor) -> torch.Tensor:
    """A baseline without any network: images (B, 3, H, W) -> 16 x 16 pixels (B, 768)."""
    return F.adaptive_avg_pool2d(images, 16).flatten(1)


def score_encoders(encoders: dict, splits: Splits, cfg, device) -> dict:
    """Score {name: images -> features (B, D)} on the test set, where there are labels:
    knn_NAME and linear_NAME in percent, and how many images could not be read.

    Training images are taken evenly spread: for the linear probe 500 times the number of classes,
    at most 20,000; of these at most 50 a class vote in the k-NN (k = 20), at most 20,000 in all."""
    scores = {}
    if splits.test is not None:
        classes = len(splits.classes)
        limit = min(20_000, 500 * classes)
        options = {"size": cfg.image_size, "device": device, "workers": cfg.workers}
        for name, encode in encoders.items():
            train, labels = features(encode, splits.train, limit=limit, **options)
            test, test_labels = features(encode, splits.test, **options)
            per_class = min(50, max(1, 20_000 // classes))
            rows = [(labels == label).nonzero()[:per_class, 0] for label in range(classes)]
            voters = torch.cat(rows)
            top1, _ = knn(train[voters], labels[voters], test, test_labels, classes)
            scores[f"knn_{name}"] = top1
            scores[f"linear_{name}"] = linear_probe(train, labels, test, test_labels, classes)
        for kind, title in (("knn", f"k-NN of {len(voters)} images"), ("linear", "linear probe")):
            figures = ", ".join(f"{name} {scores[f'{kind}_{name}']:.1f} %" for name in encoders)
            common.log(f"{title}, {classes} classes, {len(test)} test images: {figures}")
    return scores | {"unreadable": count_unreadable(splits[:3], device)}


# ------------------------------------------------------------------------------------ images out
def sample_images(dataset: ImageDataset, size: int, count: int, device) -> torch.Tensor:
    """The centers of `count` images spread over a data set, normalised (count, 3, size, size)."""
    dataset = dataset.with_transform(CenterCrop(size))
    chosen = np.linspace(0, len(dataset) - 1, count).astype(int)
    images = torch.stack([dataset[0, i][0] for i in chosen])
    return to_device(images, device)


def solid_patches(colors, patch_size: int):
    """Colors (..., 3) of 0 to 255 -> normalised patches of one color (..., P*P*3)."""
    mean, std = (values.flatten() for values in mean_std(colors.device))
    return ((colors / 255 - mean) / std).tile((patch_size ** 2,))


def heat_patches(values, patch_size: int):
    """Values (...) of 0 to 1 -> normalised patches (..., P*P*3) from blue, 0, to yellow, 1."""
    blue, yellow = torch.tensor([(30.0, 30.0, 110.0), (255.0, 230.0, 60.0)], device=values.device)
    return solid_patches(blue + values.unsqueeze(-1) * (yellow - blue), patch_size)


def save_image_grid(path: Path, rows: dict):
    """Write a PNG: for each {title: normalised images (n, 3, H, W)} a line of text, then a row."""
    mean, std = mean_std("cpu")
    strips = []
    for title, images in rows.items():
        images = (images.float().cpu() * std + mean).clamp(0, 1)
        images = F.interpolate(images, scale_factor=max(1, 96 // images.shape[-1]), mode="nearest")
        row = make_grid(images, nrow=len(images), padding=2, pad_value=1.0).mul(255).byte()
        strip = Image.new("RGB", (row.shape[2], row.shape[1] + 14), "white")
        ImageDraw.Draw(strip).text((3, 1), title, fill="black")
        strip.paste(v2.functional.to_pil_image(row), (0, 14))
        strips.append(np.asarray(strip))
    with common.writing_to(path):
        new = path.with_name(path.name + ".new")         # a kill leaves one image or the other
        Image.fromarray(np.concatenate(strips)).save(new, "PNG")
        os.replace(new, path)


# ------------------------------------------------------------------------------- synthetic shapes
COLORS = {"red": (220, 40, 40), "orange": (240, 140, 30), "yellow": (235, 220, 50),
          "green": (50, 170, 60), "cyan": (60, 200, 210), "blue": (50, 80, 220),
          "purple": (140, 60, 180), "pink": (245, 140, 190)}


def star(x, y):
    sector = np.abs(1 - 2 * (np.arctan2(x, y) / 1.2566 % 1))                   # 0 to 1, five times
    return 0.6 * (np.hypot(x, y) - 0.42 - 0.58 * sector)


SHAPES = {                                               # signed distances; y points down
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.22,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.78,
    "triangle": lambda x, y: np.maximum(0.866 * np.abs(x) - 0.5 * y, y) - 0.5,
    "cross": lambda x, y: np.minimum(np.maximum(np.abs(x) - 0.3, np.abs(y) - 0.95),
                                     np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.3)),
    "star": star,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.5, y)),
    "bar": lambda x, y: np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.36)}
BACKGROUNDS = {                                          # (x, y, frequency, phase) -> -1 to 1
    "plain": lambda x, y, frequency, phase: 0 * x,
    "ramp": lambda x, y, frequency, phase: x / 16,
    "stripes": lambda x, y, frequency, phase: np.sin(1.5 * frequency * x + phase),
    "blobs": lambda x, y, frequency, phase: (np.sin(frequency * x + phase)
                                             * np.sin(frequency * y + 2 * phase))}
CAPTIONS = ("{color} {shape}", "{a} {color} {shape}", "the {color} {shape}", "{shape} in {color}")
# Color-shape pairs that a caption task never trains on. Each of these colors is left out with two
# shapes and each shape with at most two colors, so knowing the color does not tell the pair.
HELD_OUT = [(color, (color + step) % 8) for color in range(6) for step in (0, 4)]


def random_bits(stream: int, index: np.ndarray, count: int) -> np.ndarray:
    """uint64 (len(index), count): random bits that depend on (stream, index) alone; splitmix64."""
    x = np.asarray(index, np.uint64)[:, None] * np.uint64(count)
    x = x + np.arange(count, dtype=np.uint64)
    x = (x + (np.uint64(stream) << np.uint64(56)) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def pixel_coordinates(center_x, center_y, angle):
    """Coordinates (n, 32, 32), each, of the pixels about centers (n, 1, 1), turned by angles."""
    grid = np.arange(32, dtype=np.float32)
    dx = grid - center_x
    dy = grid[:, None] - center_y
    x = np.cos(angle) * dx + np.sin(angle) * dy
    y = np.cos(angle) * dy - np.sin(angle) * dx
    return x, y


def synthetic_shapes(split: str, index: np.ndarray) -> dict:
    """32 x 32 images of one object on a textured ground; number i of a split is always the same.

    image uint8 (n, 3, 32, 32); mask bool (n, 32, 32), True on the object; shape (the class), color,
    background int (n,); x, y, radius in pixels, angle in radians (n,); caption: n strings that name
    color and shape and nothing else."""
    if len(index) > 256:                                 # what fits the caches
        chunks = np.array_split(index, len(index) // 256 + 1)
        parts = [synthetic_shapes(split, chunk) for chunk in chunks]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    stream = ("train", "test").index(split)
    bits = random_bits(stream, index, 18)
    u = (bits >> np.uint64(40)).astype(np.float32) / 2 ** 24                   # (n, 18) in [0, 1)
    u = u[..., None, None]                                                     # (n, 18, 1, 1)
    kinds = np.array([8, 8, 4, len(CAPTIONS)], np.float32)
    shape, color, background, text = (kinds * u[:, [0, 1, 2, 15], 0, 0]).astype(int).T
    radius = 10 + u[:, 3]                                                      # (n, 1, 1)
    x = 6.5 + 18 * u[:, 4]
    y = 6.5 + 18 * u[:, 5]
    angle = 0.2 * u[:, 6] - 0.1
    object_x, object_y = (p / radius for p in pixel_coordinates(x, y, angle))  # (n, 32, 32)
    middle = np.float32(15.5)
    ground_x, ground_y = pixel_coordinates(middle, middle, 2 * np.pi * u[:, 7])
    frequency = 0.15 + 0.6 * u[:, 8]
    phase = 2 * np.pi * u[:, 9]
    distance = np.empty_like(object_x)
    for number, signed_distance in enumerate(SHAPES.values()):
        of = shape == number
        distance[of] = signed_distance(object_x[of], object_y[of]) * radius[of]
    ground = np.empty_like(ground_x)
    for number, texture in enumerate(BACKGROUNDS.values()):
        of = background == number
        ground[of] = texture(ground_x[of], ground_y[of], frequency[of], phase[of])
    ground = 0.25 + 0.5 * u[:, 10] + 0.3 * (u[:, 11] - 0.5) * ground
    object_color = np.array(list(COLORS.values()), np.float32)[color, :, None, None] / 255
    object_color = object_color + 0.2 * (u[:, 12:15] - 0.5)                    # (n, 3, 1, 1)
    cover = np.clip(0.5 - distance, 0, 1)[:, None]                             # a smooth edge
    noise = random_bits(2 + stream, index, 384).view(np.uint8).reshape(-1, 3, 32, 32)
    image = 255 * (ground[:, None] * (1 - cover) + object_color * cover)
    image = image + noise * 0.07 - 9                     # 9: the mean of this noise
    return {"image": np.clip(image, 0, 255).astype(np.uint8), "mask": cover[:, 0] > 0.5,
            "shape": shape, "color": color, "background": background,
            "x": x.ravel(), "y": y.ravel(), "radius": radius.ravel(), "angle": angle.ravel(),
            "caption": captions_of(text, color, shape)}


def captions_of(text, color, shape) -> np.ndarray:
    """Numbers of caption templates, colors and shapes (n,) each -> n strings."""
    colors = list(COLORS)
    shapes = list(SHAPES)
    captions = []
    for t, c, s in zip(text, color, shape):
        article = "an" if colors[c] == "orange" else "a"
        captions.append(CAPTIONS[t].format(a=article, color=colors[c], shape=shapes[s]))
    return np.array(captions)
