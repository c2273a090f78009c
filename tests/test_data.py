"""data.py: decoding, data sets, order and crops, features and their scores, image grids."""

import io
import os
import pickle
import signal
import struct
import sys
import traceback
import zlib
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets

import common
import data
import mae
from conftest import draw, golden

MISC = golden("misc")


def save(path, value=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 100, 200)).save(path)


# --------------------------------------------------------------------------------------- decoding
def encoded(image, ending="PNG"):
    file = io.BytesIO()
    image.save(file, ending)
    return file.getvalue()


def test_decode():
    for mode, ending in (("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"),
                         ("LA", "PNG"), ("1", "PNG"), ("L", "TIFF"), ("CMYK", "TIFF"),
                         ("RGB", "WEBP"), ("RGB", "BMP"), ("RGB", "PPM"), ("P", "GIF")):
        assert data.decode(encoded(Image.new(mode, (9, 7)), ending)).shape == (3, 7, 9)


RAMP = np.tile(np.linspace(0, 255, 64), (64, 1))         # 64 grays


@pytest.mark.parametrize("ending", ["PNG", "TIFF", "PPM"])
def test_of_16_bits_the_high_byte_is_taken(ending):
    image = data.decode(encoded(Image.fromarray((RAMP * 257).astype(np.uint16)), ending))
    assert image.float().mean() == 127.5 and len(image.unique()) == 64
    assert (image[0] == image[2]).all()
    signed = data.decode(encoded(Image.fromarray((RAMP * 257).astype(np.int32)), "TIFF"))
    assert len(signed.unique()) == 64
    black = data.decode(encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), ending))
    assert not black.any()


@pytest.mark.parametrize("pixels, match", [
    ((RAMP * 16).astype(np.uint16), "values to 4080: convert to 8 bits"),
    ((RAMP / 255).astype(np.float32), "mode F"),
    ((RAMP * 257).astype(np.int32) * 2, "values to 131070"),
    (-(RAMP * 257).astype(np.int32), "mode I"),
    (RAMP.astype(np.int32), "values to 255")])
def test_what_8_bits_would_spoil_is_unreadable(pixels, match):
    with pytest.raises(OSError, match=match):
        data.decode(encoded(Image.fromarray(pixels), "TIFF"))


def test_more_than_three_bands():
    with pytest.raises(OSError, match="mode RGBX? of 4 bands: convert to 8 bits, gray or RGB"):
        data.decode(encoded(Image.new("RGBX", (8, 8)), "TIFF"))


def jpeg(width, height, size=(32, 32), **options):
    """A JPEG of a few bytes whose header says other sizes."""
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "JPEG", **options)
    packed = bytearray(file.getvalue())
    at = next(packed.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in packed) + 5
    packed[at:at + 4] = struct.pack(">HH", height, width)
    return bytes(packed)


@pytest.mark.parametrize("packed, match", [
    (jpeg(30000, 30000), "30000 x 30000 pixels are more than"),
    (jpeg(30000, 30000, progressive=True), "30000 x 30000"),
    (jpeg(3001, 30), "3001 x 30 pixels: one side"),
    (encoded(Image.new("L", (5000, 1))), "5000 x 1 pixels"),
    (encoded(Image.new("L", (1, 101)), "TIFF"), "1 x 101 pixels"),
    (encoded(Image.new("1", (10000, 10000))),
     "10000 x 10000 pixels are more than PIL.Image.MAX_IMAGE_PIXELS, 89478485"),
    (encoded(Image.new("1", (20000, 20000)), "TIFF"),
     "400000000 pixels. exceeds limit of 178956970"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n",
     "other content, no PNG, JPEG"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
    (b"", "an empty file"),
    (b"hello", "other content"),
    (b"\xff\xd8", "the file ends"),
    (b"\xff\xd8\xff\xff\xff", "the file ends"),
    (jpeg(9, 9)[:25], "the file ends"),
    (encoded(Image.new("L", (50, 50)))[:60], ".")])
def test_what_is_refused_and_why(packed, match):
    with pytest.raises(OSError, match=match) as error:
        data.decode(packed)
    assert "0x" not in str(error.value) and "\n" not in str(error.value)


def test_jpeg_size():
    for size in ((31, 50), (640, 1)):
        for options in ({}, {"progressive": True}, {"exif": b"Exif\0\0" + b"\xff\xc0" * 50},
                        {"comment": b"x" * 70}):
            file = io.BytesIO()
            Image.new("RGB", size).save(file, "JPEG", **options)
            assert data.jpeg_size(file.getvalue()) == size
    fill_bytes = b"\xff\xff"                             # before a marker
    padded = file.getvalue().replace(b"\xff\xc0", fill_bytes + b"\xff\xc0")
    assert data.jpeg_size(padded) == size
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None                        # settable
    try:
        data.check_size(10 ** 6, 10 ** 6)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# ------------------------------------------------------------------------------ unreadable images
@pytest.fixture
def block(tmp_path):
    """300 files of which 100 in a row are no images: a copy that broke off."""
    for i in range(300):
        if 100 <= i < 200:
            (tmp_path / f"{i:03}.png").write_text("text")
        else:
            save(tmp_path / f"{i:03}.png", i % 256, (2, 2))
    return data.open_data(str(tmp_path), "", seed=5)


def test_stand_ins(block, monkeypatch, capsys):
    """They are drawn by (seed, epoch, index), whatever a process knows already; each file is read
    once or, if it is a stand-in, a few times; above a tenth there is a warning."""
    dataset = block.pretrain
    dataset.labels = np.arange(300) % 7
    reads = []
    honest = type(dataset).read

    def read(dataset, index):
        reads.append(index)
        return honest(dataset, index)

    monkeypatch.setattr(type(dataset), "read", read)
    first = [dataset[0, i][2] for i in range(300)]
    assert len(reads) <= 600 and not set(first) & set(np.flatnonzero(dataset.unreadable))
    assert max(np.bincount(first)) <= 6
    errors = capsys.readouterr().err
    assert errors.count("skipped, cannot be read: '") == 100 and "other content, no PNG" in errors
    again = [dataset[0, i][2] for i in reversed(range(300))][::-1]                # now all is known
    assert again == first and [dataset[1, i][2] for i in range(300)] != first
    other = data.ImageDataset([os.fsdecode(p) for p in dataset.source], dataset.labels, seed=6)
    assert [other[0, i][2] for i in range(300)] != first
    unreadable = np.flatnonzero(dataset.unreadable)
    image, label, index = dataset[0, int(unreadable[0])]
    assert label == dataset.labels[index] and torch.equal(image, dataset.read(index))
    assert data.count_unreadable(block[:3], "cpu") == 100
    assert "33 % of the images" in capsys.readouterr().out


def test_nothing_readable(tmp_path):
    dataset = data.ImageDataset([str(tmp_path / f"{i}.png") for i in range(3)])
    with pytest.raises(common.UserError, match="none of the 3 images can be read"):
        dataset[0, 1]


def test_unreadable_test_images_are_left_out_and_counted(tmp_path, capsys):
    for i in range(6):
        for split in ("train", "val"):
            save(tmp_path / split / "ab"[i % 2] / f"{i}.jpg", 40 * i)
    whole = (tmp_path / "train/a/2.jpg").read_bytes()
    (tmp_path / "train/a/2.jpg").write_bytes(whole[:len(whole) * 2 // 3])
    (tmp_path / "val/b/1.jpg").write_bytes(b"")
    splits = data.open_data(str(tmp_path), "")
    for _ in range(2):
        table, labels = data.features(lambda x: x.flatten(1), splits.test, 16, "cpu", workers=2)
        assert len(table) == len(labels) == 5 and labels.tolist() == [0, 0, 0, 1, 1]
    assert [splits.train[0, i][2] for i in (0, 2)] == [0, 2] and splits.train[0, 1][2] != 1
    errors = capsys.readouterr().err
    assert errors.count("2.jpg") == 1
    assert "an empty file" not in errors                 # that one was a loader's to say
    assert data.count_unreadable(splits[:3], "cpu") == 2     # training and test images


def test_a_file_in_two_splits_counts_once(tmp_path):
    for i in range(40):
        save(tmp_path / "ab"[i % 2] / f"{i:02}.png")
    (tmp_path / "a/18.png").write_text("text")           # the tenth of its sort: a test image
    (tmp_path / "a/00.png").write_text("text")
    splits = data.open_data(str(tmp_path), "")
    assert len(splits.test) == 4
    for dataset in splits[:3]:
        for i in range(len(dataset)):
            dataset[0, i]
    assert sum(int(d.unreadable.sum()) for d in splits[:3]) == 3
    assert data.count_unreadable(splits[:3], "cpu") == 2


def test_names_are_printed_as_ascii(tmp_path, capsys):
    name = "\x1b[31mred\nerror: not true é.jpg"
    (tmp_path / name).write_text("no image")
    save(tmp_path / "good.png")
    dataset = data.open_data(str(tmp_path), "").pretrain
    for i in (0, 1):
        dataset[0, i]
    printed = capsys.readouterr()
    assert "\x1b" not in printed.err + printed.out
    assert len(printed.err.splitlines()) == 1
    assert r"\x1b[31mred\nerror: not true \xe9.jpg" in printed.err


def test_a_named_pipe_does_not_stop_a_run(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    save(tmp_path / "good.png")
    dataset = data.open_data(str(tmp_path), "").pretrain
    assert len(dataset) == 2 and {dataset[0, i][2] for i in range(2)} == {0}
    assert dataset.unreadable.sum() == 1


# -------------------------------------------------------------------------------- order and crops
def stream(workers=0, processes=1, accumulate=1, first=0, steps=9):
    """(index, bytes of the image) of the global batches, put together from all processes."""
    cfg = mae.Config(batch_size=12, accumulate=accumulate, workers=workers)
    shapes = data.synthetic_shapes("train", np.arange(50))
    parts = []
    for rank in range(processes):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes))
        dataset = data.ImageDataset(torch.from_numpy(shapes["image"]), shapes["shape"], 0,
                                    data.augment(32, 0.2))
        batches = list(data.batches(dataset, cfg, first, steps))
        assert len(batches) == (steps - first) * accumulate
        parts.append([torch.cat([b[i] for b in batches]).view(steps - first, 12 // processes, -1)
                      for i in (2, 0)])
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    return [torch.stack(p, dim=2).view(steps - first, 12, -1) for p in zip(*parts)]


def test_order_and_crops_depend_on_seed_epoch_and_index_only():
    index, images = stream()
    epoch = index[:4].flatten()                          # 4 batches
    assert (epoch.sort().values == epoch.unique()).all()
    assert (index[4:8] != index[:4]).float().mean() > 0.8
    for other in (dict(workers=1), dict(workers=4), dict(processes=2), dict(processes=3),
                  dict(accumulate=3)):
        again = stream(**other)
        assert torch.equal(index, again[0]) and torch.equal(images, again[1]), other
    late = stream(first=5)                               # resumed: from there on the same batches
    assert torch.equal(index[5:], late[0]) and torch.equal(images[5:], late[1])
    crops = []                                           # of two epochs: {index: image}
    for a in (0, 4):
        numbers = index[a:a + 4].flatten().tolist()
        crops.append(dict(zip(numbers, images[a:a + 4].flatten(0, 1))))
    both = crops[0].keys() & crops[1].keys()
    assert len(both) > 40
    assert not any(torch.equal(crops[0][i], crops[1][i]) for i in both)        # new in each epoch


def test_crops_depend_on_the_seed():
    images = torch.arange(3 * 40 * 50, dtype=torch.int32).remainder(251).byte().view(1, 3, 40, 50)
    crops = []
    for seed in (0, 0, 1):
        dataset = data.ImageDataset(images, seed=seed, transform=data.augment(32, 0.2))
        crops.append(dataset[0, 0][0])
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])


def test_augmentation_leaves_the_trainers_random_numbers_alone():
    images = torch.zeros(4, 3, 40, 50, dtype=torch.uint8)
    dataset = data.ImageDataset(images, transform=data.augment(32, 0.2))
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    assert dataset[0, 1][0].shape == (3, 32, 32) and torch.equal(torch.rand(2), want)


def test_augmentation():
    """Half of the images are flipped; the crop's area, the jitter and RandAugment are as asked
    for."""
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 256, 256).contiguous()
    dataset = data.ImageDataset(ramp[None], transform=data.augment(256, 1.0))
    flips = [int(dataset[epoch, 0][0][0, 0, 0]) == 255 for epoch in range(200)]
    assert 70 < sum(flips) < 130
    crops = data.ImageDataset(ramp[None], transform=data.augment(64, 0.2))
    widths = []
    for epoch in range(200):
        line = crops[epoch, 0][0][0, 5]
        widths.append(abs(int(line[60]) - int(line[3])) * 64 / 57)
    assert 90 < min(widths) < 125                        # a fifth of the area: 114 pixels, at 1:1
    assert 225 < max(widths) <= 258
    gray = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)
    jittered = data.ImageDataset(gray, transform=data.augment(8, 1.0, color_jitter=0.4))
    values = [int(jittered[epoch, 0][0][0, 0, 0]) for epoch in range(100)]
    assert 70 < min(values) < 100 and 155 < max(values) < 187            # brightness 0.6 to 1.4
    assert data.augment(8, 1.0, randaugment=9).transforms[-1].magnitude == 9
    assert data.augment(8, 1.0, randaugment=9).transforms[-1].num_magnitude_bins == 11


def test_center_crop():
    big = torch.randint(0, 255, (3, 300, 500), dtype=torch.uint8)
    assert data.CenterCrop(224)(big).shape == (3, 224, 224)
    small = big[:, :32, :32]
    assert torch.equal(data.CenterCrop(32)(small), small)       # nothing is lost of images that fit
    gradient = torch.arange(512, dtype=torch.float32).div(2).byte().expand(3, 512, 512).contiguous()
    crop = data.CenterCrop(224)(gradient)                # resized to 256, its middle 224
    assert abs(int(crop[0, 0, 0]) - 16) <= 1 and abs(int(crop[0, 0, -1]) - 239) <= 1
    whole = data.CenterCrop(224, margin=False)(gradient)
    assert int(whole[0, 0, 0]) <= 1 and int(whole[0, 0, -1]) >= 254


def test_to_device_normalises():
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean = torch.tensor(data.MEAN).view(3, 1, 1)
    std = torch.tensor(data.STD).view(3, 1, 1)
    want = (x.double() / 255 - mean) / std
    torch.testing.assert_close(data.to_device(x, "cpu"), want.float(), atol=1e-5, rtol=1e-5)


def test_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    assert data.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert data.usable_cores() == os.cpu_count()


class Failing(torch.utils.data.Dataset):
    """A data set whose loader processes end as `how` says."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 4

    def __getitem__(self, key):
        if self.how == "killed":
            os.kill(os.getpid(), 9)
        if self.how == "shm":
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: "
                               "No space left on device (28)")
        if self.how == "user":
            raise common.UserError("none of the images can be read")
        raise RuntimeError("a fault of the code")


@pytest.mark.parametrize("how, kind, match", [
    ("killed", common.UserError, "a loader process ended.*--workers.*--shm-size"),
    ("shm", common.UserError, "No space left on device.*--workers.*--shm-size"),
    ("user", common.UserError, "none of the images"),
    ("fault", RuntimeError, "a fault of the code")])
def test_a_loader_process_that_fails(how, kind, match):
    with pytest.raises(kind, match=match) as error:
        list(data.loader(Failing(how), [[(0, 0)], [(0, 1)]], workers=1))
    if kind is common.UserError and how != "user":
        assert "\n" not in str(error.value)
    cause = error.value
    while cause:                                         # the loader is in their frames: left to
        traceback.clear_frames(cause.__traceback__)      # the garbage collector, it waits 5 s for
        cause = cause.__cause__                          # its process


def test_a_loader_is_silent_when_its_trainer_hangs_up(monkeypatch, capsys):
    """What test_ctrl_c meets now and then: multiprocessing gives the thread's error to
    sys.excepthook."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    at_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        data.ignore_ctrl_c()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, at_ctrl_c)
    for kind in (EOFError, ConnectionResetError, ValueError):
        sys.excepthook(kind, kind(kind.__name__), None)
    assert capsys.readouterr().err.strip() == "ValueError: ValueError"


# ---------------------------------------------------------------------------------------- folders
def test_folder_with_train_and_val(tmp_path):
    for split in ("train", "val"):
        for c in ("cat", "dog"):
            for i in range(3):
                save(tmp_path / split / c / f"{i}.jpg")
    splits = data.open_data(str(tmp_path), "")
    assert splits.classes == ["cat", "dog"] and len(splits.train) == len(splits.test) == 6
    assert splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.train.read(0).shape == (3, 16, 20)
    save(tmp_path / "val" / "cow" / "0.jpg")
    words = "classes that the training images do not have: .'cow'"
    with pytest.raises(common.UserError, match=words):
        data.open_data(str(tmp_path), "")


def test_a_class_without_test_images(tmp_path, capsys):
    for c in ("cat", "dog", "eel"):
        save(tmp_path / "train" / c / "0.jpg")
    for c in ("cat", "eel"):
        save(tmp_path / "val" / c / "0.jpg")
    assert data.open_data(str(tmp_path), "").test.labels.tolist() == [0, 2]
    assert "has no images of ['dog']" in capsys.readouterr().out


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("test", ["val", "valid", "VALIDATION", "test", "Testing"])
def test_names_of_the_splits(tmp_path, train, test):
    for c in ("cat", "dog"):
        for i in range(6):
            save(tmp_path / train / c / f"{i}.jpg")
        save(tmp_path / test / c / "0.jpg")
    splits = data.open_data(str(tmp_path), "")
    assert (len(splits.pretrain), len(splits.train), len(splits.test)) == (12, 12, 2)
    assert splits.classes == ["cat", "dog"]


def test_a_test_folder_without_labels_is_refused(tmp_path):
    """Kaggle's layout of many sets: test/ holds images in no class folder."""
    for c in ("cat", "dog"):
        save(tmp_path / "train" / c / "0.jpg")
    save(tmp_path / "test/1.jpg")
    with pytest.raises(common.UserError, match="test has images outside class folders, so without"):
        data.open_data(str(tmp_path), "")


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX"])
def test_hidden_folders_make_no_split(tmp_path, hidden):
    for c in ("bus", "car", "train"):
        for i in range(10):
            save(tmp_path / "all" / c / f"{i}.jpg")
    (tmp_path / "all/train" / hidden).mkdir()            # so `train` stays a class
    assert data.open_data(str(tmp_path / "all"), "").classes == ["bus", "car", "train"]
    for c in ("cat", "dog"):
        for i in range(10):
            save(tmp_path / "one/train" / c / f"{i}.jpg")
    (tmp_path / "one/notes" / hidden).mkdir(parents=True)        # so `train` stays the split
    assert data.open_data(str(tmp_path / "one"), "").classes == ["cat", "dog"]


def test_a_class_called_train(tmp_path):
    for c in ("bus", "car", "train"):
        for i in range(20):
            save(tmp_path / c / f"{i}.jpg")
    assert data.open_data(str(tmp_path), "").classes == ["bus", "car", "train"]
    assert len(data.open_data(str(tmp_path), "").pretrain) == 54
    for c in ("cat", "dog"):         # it alone has class folders: the training images
        for i in range(20):
            save(tmp_path / "other" / "train" / c / f"{i}.jpg")
    splits = data.open_data(str(tmp_path / "other"), "")
    assert splits.classes == ["cat", "dog"] and len(splits.test) == 4


def test_what_is_left_out_is_said(tmp_path, capsys):
    for split in ("train", "val", "test"):
        for c in ("cat", "dog"):
            save(tmp_path / split / c / "0.jpg")
    data.open_data(str(tmp_path), "")
    assert "taken are ['train', 'val'], left out ['test']" in capsys.readouterr().out


def test_plain_class_folders_keep_a_tenth(tmp_path):
    for i in range(20):
        save(tmp_path / "ab"[i % 2] / f"{i}.png")
    splits = data.open_data(str(tmp_path), "")
    assert (len(splits.pretrain), len(splits.train), len(splits.test)) == (18, 18, 2)
    assert not set(splits.train.source) & set(splits.test.source)


def test_flat_folder_has_no_labels(tmp_path):
    for i, ending in enumerate(("jpg", "PNG", "bmp", "webp")):
        save(tmp_path / f"{i}.{ending}", 10 * i)
    (tmp_path / "notes.txt").write_text("not an image")
    splits = data.open_data(str(tmp_path), "")
    assert len(splits.pretrain) == 4 and splits.test is None and splits.pretrain[0, 2][1] == -1
    assert all(splits.pretrain.read(i).shape == (3, 16, 20) for i in range(4))


def test_images_beside_folders_are_all_taken(tmp_path, capsys):
    for i in range(6):
        save(tmp_path / f"{i}.jpg")
        save(tmp_path / "old/deep" / f"{i}.jpg")
    splits = data.open_data(str(tmp_path), "")
    assert len(splits.pretrain) == 12 and splits.test is None and splits.classes == []
    said = capsys.readouterr().out
    assert "12 images, no class folders" in said and "6 of them are in folders below it" in said


def test_one_class_has_no_scores(tmp_path, capsys):
    for i in range(20):
        save(tmp_path / "images" / f"{i}.jpg")
    splits = data.open_data(str(tmp_path), "")
    assert len(splits.pretrain) == 20 and splits.train is None and splits.test is None
    assert "fewer than two classes: there will be no scores" in capsys.readouterr().out
    scores = data.score_encoders({"pixels": data.small_pixels}, splits, mae.Config(), "cpu")
    assert scores == {"unreadable": 0}


def test_files_of_systems_are_skipped(tmp_path, capsys):
    for c in ("cat", "dog"):
        for i in range(20):
            save(tmp_path / c / f"{i}.jpg")
            for hidden in (f"__MACOSX/{c}/._{i}.jpg", f"{c}/._{i}.jpg", f"{c}/@eaDir/{i}.jpg",
                           f".cache/{i}.jpg", f"{c}/deep/.thumbs/{i}.jpg", f"lost+found/{i}.jpg"):
                (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / hidden).write_bytes(b"\0\5\x16\7")
    splits = data.open_data(str(tmp_path), "")
    assert splits.classes == ["cat", "dog"] and len(splits.train) + len(splits.test) == 40
    said = capsys.readouterr().out
    assert "47 hidden or system files and folders were skipped" in said        # 40, 2 + 2, 3


def test_links_do_not_lead_in_circles(tmp_path):
    for i in range(40):
        save(tmp_path / "a" / f"{i}.jpg")
        save(tmp_path / "b" / f"{i}.jpg")
    for name in "ab":
        os.symlink("..", tmp_path / name / "up")
        os.symlink("itself", tmp_path / name / "itself")
    os.symlink("../b", tmp_path / "a" / "sibling")       # as a's they would be in the wrong class
    os.symlink("../a", tmp_path / "b" / "sibling")
    os.symlink("../b/0.jpg", tmp_path / "a" / "copy.jpg")
    splits = data.open_data(str(tmp_path), "")
    assert sum(np.bincount(s.labels) for s in (splits.train, splits.test)).tolist() == [40, 40]
    store = tmp_path / "store"                           # clusters have data sets made of links
    for c in ("x", "y"):
        for i in range(10):
            save(store / c / f"{i}.jpg")
    for split in ("train", "val"):
        (tmp_path / "linked" / split).mkdir(parents=True)
    for c in ("x", "y"):
        os.symlink(store / c, tmp_path / "linked/train" / c)
        (tmp_path / "linked/val" / c).mkdir()
        os.symlink(store / c / "3.jpg", tmp_path / "linked/val" / c / "3.jpg")
        save(tmp_path / "linked/val" / c / "new.jpg")
    splits = data.open_data(str(tmp_path / "linked"), "")
    assert len(splits.train) == 20
    assert len(splits.test) == 2                         # what was trained on is no test image


def test_tiny_imagenet(tmp_path):
    top = tmp_path / "tiny-imagenet-200"
    for w in ("n01", "n02"):
        save(top / "train" / w / "images" / f"{w}_0.JPEG")
    wnids = ("n02", "n01", "n02")
    for i in range(3):
        save(top / "val" / "images" / f"val_{i}.JPEG", i)
    lines = [f"val_{i}.JPEG\t{w}\t0\t0\t9\t9\n" for i, w in enumerate(wnids)]
    (top / "val" / "val_annotations.txt").write_text("".join(lines))
    splits = data.open_data("tiny-imagenet", str(tmp_path))
    assert splits.classes == ["n01", "n02"] and len(splits.train) == 2
    assert splits.test.labels.tolist() == [1, 0, 1]


def test_imagenet_and_kaggles_layout(tmp_path):
    for w in ("n01", "n02"):
        save(tmp_path / "plain/imagenet/train" / w / "a.JPEG")
        save(tmp_path / "plain/imagenet/val" / w / "b.JPEG")
        save(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC/train" / w / "a.JPEG")
    assert data.open_data("imagenet", str(tmp_path / "plain")).test.labels.tolist() == [0, 1]
    assert len(data.open_data("imagenet", str(tmp_path / "plain/imagenet")).train) == 2
    save(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "kaggle/LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n02 1 2 3 4 n02 5 6 7 8\n")
    splits = data.open_data("imagenet", str(tmp_path / "kaggle"))
    assert splits.test.labels.tolist() == [1] and splits.test.is_readable(0)
    with pytest.raises(common.UserError, match="--data-root"):
        data.open_data("imagenet", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar(tmp_path, monkeypatch, name, classes):
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)     # the files are small
    (tmp_path / kind.base_folder).mkdir()
    for file, _ in kind.train_list + kind.test_list:
        entry = {"data": np.arange(3 * 3072, dtype=np.uint8).reshape(3, 3072),
                 "labels": [0, 1, 9], "fine_labels": [0, 1, 9]}
        (tmp_path / kind.base_folder / file).write_bytes(pickle.dumps(entry))
    meta = {"label_names": list("0123456789"), "fine_label_names": [str(i) for i in range(100)]}
    (tmp_path / kind.base_folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))

    def load_meta(dataset):
        dataset.classes = list(range(classes))

    monkeypatch.setattr(kind, "_load_meta", load_meta)
    splits = data.open_data(name, str(tmp_path))
    assert len(splits.classes) == classes and splits.test.labels.tolist() == [0, 1, 9]
    assert splits.pretrain.read(0).shape == (3, 32, 32)
    assert splits.pretrain.read(0)[0, 0, :3].tolist() == [0, 1, 2]


def test_stl10(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for part, count in (("train", 3), ("test", 2), ("unlabeled", 5)):
        np.zeros((count, 3, 96, 96), np.uint8).tofile(folder / f"{part}_X.bin")
        np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    splits = data.open_data("stl10", str(tmp_path))
    assert len(splits.pretrain) == 8 and set(splits.pretrain.labels) == {-1}
    assert splits.train.labels.tolist() == [0, 1, 2]     # no -1 among the labelled
    assert splits.test.labels.tolist() == [0, 1] and len(splits.classes) == 10


def test_no_network_is_one_line(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(common.UserError, match="cifar10.*no network.*cifar-10-python.tar.gz"):
        data.open_data("cifar10", str(tmp_path))


@pytest.mark.parametrize("content", ["nothing", "text", "missing"])
def test_folder_without_a_readable_image(tmp_path, content):
    if content == "text":
        (tmp_path / "a.jpg").write_text("hello")
    folder = tmp_path / "nowhere" if content == "missing" else tmp_path
    match = "no readable image.* files tried; read are .jpg .jpeg .png"
    if content == "missing":
        match = "no folder"
    with pytest.raises(common.UserError, match=match):
        data.open_data(str(folder), "")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))
    save(tmp_path / "a.jpg")
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(common.UserError, match="cannot be read .*Permission denied"):
        data.open_data(str(tmp_path), "")


def test_dataset_pickles_and_too_few_test_images(tmp_path, capsys):
    dataset = data.ImageDataset(torch.zeros(4, 3, 9, 9, dtype=torch.uint8),
                                np.array([0, 1, 1, 0], np.uint8), transform=data.augment(8, 1.0))
    copy = pickle.loads(pickle.dumps(dataset))           # for spawned loaders
    assert copy[0, 1][0].shape == (3, 8, 8)
    table, y = data.features(lambda x: x.flatten(1), dataset, 8, "cpu")
    assert data.knn(table + 1, y, table + 1, y, 2, k=4)[1] == 100              # uint8 labels, too
    for i in range(4):
        save(tmp_path / "ab"[i % 2] / f"{i}.jpg")
    assert data.open_data(str(tmp_path), "").test is None
    assert "no readable image to test on" in capsys.readouterr().out


# ------------------------------------------------------------------------------ k-NN, linear probe
def labels(name, count):
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).randint(0, 7, count))


def test_knn_golden_figures():
    centers = draw("knn/centres", 7, 16)
    train_labels, test_labels = labels("knn/train_labels", 400), labels("knn/test_labels", 100)
    train = F.normalize(centers[train_labels] + 1.8 * draw("knn/train", 400, 16), dim=1)
    test = F.normalize(centers[test_labels] + 1.8 * draw("knn/test", 100, 16), dim=1)
    for k, figures in MISC["knn"]["results"].items():
        got = data.knn(train, train_labels, test, test_labels, 7, k=int(k))
        assert got == pytest.approx((figures["top1"], figures["top5"]), abs=1e-3)


def test_knn_votes():
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(300, 8, generator=generator)
    test = torch.randn(2500, 8, generator=generator)
    y = torch.randint(0, 5, (300,), generator=generator)
    z = torch.randint(0, 5, (2500,), generator=generator)
    near = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).argmax(1)
    expected = 100 * (y[near] == z).float().mean().item()
    assert data.knn(train, y, test, z, 5, k=1)[0] == pytest.approx(expected)
    similarity = F.normalize(test.double(), dim=1) @ F.normalize(train.double(), dim=1).T
    votes = []                                           # by brute force
    for row in similarity.numpy():
        chosen = np.argsort(-row)[:20]
        votes.append(np.bincount(y[chosen], np.exp(row[chosen] / 0.07), 5).argmax())
    expected = 100 * np.mean(votes == z.numpy())
    assert data.knn(train, y, test, z, 5)[0] == pytest.approx(expected, abs=0.05)
    assert data.knn(train, y, train, y, 5, k=1)[0] == 100
    assert data.knn(train[:3], y[:3], test, z, 5, k=200)[0] > 0      # k beyond the training set
    assert data.knn(1e4 * train.half(), y, test.half(), z, 5)[0] > 0           # and no overflow


def test_linear_probe():
    """It is ridge regression with the best of its penalties, and finds what is linear."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.01, 100, 12)               # they do not matter
    x = torch.randn(2000, 12, generator=generator) * scales + 5
    noise = 20 * torch.randn(2000, 3, generator=generator)
    y = (x @ torch.randn(12, 3, generator=generator) + noise).argmax(dim=1)
    train = slice(0, 1500)
    test = slice(1500, 2000)
    got = data.linear_probe(x[train], y[train], x[test], y[test], 3)
    z = (x - x[train].mean(0)) / x[train].std(0)
    a = torch.cat([z, torch.ones(2000, 1)], dim=1).double()      # the weights' last row: the bias
    best = []
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        ridge = 1500 * penalty * torch.diag(torch.tensor([1.0] * 12 + [0.0])).double()
        moment = a[train].T @ F.one_hot(y[train], 3).double()
        weights = torch.linalg.solve(a[train].T @ a[train] + ridge, moment)
        correct = (a[test] @ weights).argmax(1) == y[test]
        best.append(100 * correct.double().mean().item())
    assert min(abs(got - value) for value in best) < 0.11 and got > 80
    assert data.linear_probe(x[train], y[train], x[train][:, :1] * 0 + x[train], y[train], 3) > 80
    constant = torch.cat([x[train], torch.ones(1500, 1)], dim=1)     # a feature that never changes
    assert data.linear_probe(constant, y[train], constant, y[train], 3) > 80
    few = data.linear_probe(x[:5], y[:5], x[:5], y[:5], 3)           # fewer images than penalties
    assert 0 <= few <= 100


def test_linear_probe_chooses_the_penalty_on_a_tenth():
    """With as many features as images the smallest penalty is best for the training images only."""
    generator = torch.Generator().manual_seed(1)
    signal = torch.randint(0, 2, (700,), generator=generator)
    x = torch.randn(700, 300, generator=generator)
    x[:, 0] += 1.5 * signal
    accuracy = data.linear_probe(x[:350], signal[:350], x[350:], signal[350:], 2)
    assert accuracy > 62                                 # with the smallest penalty: 55.4


def test_score_encoders_takes_so_many_images(monkeypatch):
    """50 voters a class, but 20,000 in all; 500 images a class for the probe, but 20,000 in all."""
    met = {}

    def knn(train, labels, *rest):
        met["voters"] = labels
        return 1.0, 2.0

    def linear_probe(train, *rest):
        met["probe"] = len(train)
        return 3.0

    monkeypatch.setattr(data, "knn", knn)
    monkeypatch.setattr(data, "linear_probe", linear_probe)

    def scores(n, classes):
        images = torch.zeros(n, 3, 1, 1, dtype=torch.uint8)
        train = data.ImageDataset(images, np.arange(n) % classes)
        test = data.ImageDataset(train.source[:9], train.labels[:9])
        splits = data.Splits(train, train, test, list(range(classes)))
        cfg = SimpleNamespace(image_size=1, workers=0)
        return data.score_encoders({"a": lambda x: x[:, 0, 0]}, splits, cfg, "cpu")

    assert scores(900, 3) == {"knn_a": 1.0, "linear_a": 3.0, "unreadable": 0}
    assert np.bincount(met["voters"]).tolist() == [50] * 3 and met["probe"] == 900
    scores(1700, 3)
    assert met["probe"] == 1500
    scores(21_000, 1000)
    assert met["probe"] == 20_000 and max(np.bincount(met["voters"])) <= 20


# ------------------------------------------------------------------------------------- image grids
def test_image_grid(tmp_path):
    """Pixels come back as they were; a file that a kill cut off is replaced as a whole."""
    pixels = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    path = tmp_path / "grid.png"
    path.write_bytes(b"cut off")
    images = data.to_device(pixels, "cpu")
    data.save_image_grid(path, {"first": images, "second": images})
    written = np.asarray(Image.open(path))
    tile = written[14 + 2:14 + 98, 2:98].transpose(2, 0, 1).astype(int)
    assert np.abs(tile - pixels[0].numpy()).max() <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_patches_of_one_color():
    black_white = data.solid_patches(torch.tensor([[0.0, 0, 0], [255, 255, 255]]), 2)
    assert black_white.shape == (2, 12)
    images = mae.unpatchify(black_white.unsqueeze(1), 2, (1, 1))
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, 3, 2, 2)
    torch.testing.assert_close(images, data.to_device(pixels, "cpu"))
    heat = mae.unpatchify(data.heat_patches(torch.tensor([[0.0], [1.0]]), 2), 2, (1, 1))
    mean, std = data.mean_std("cpu")
    colors = 255 * (heat * std + mean)[:, :, 0, 0]
    torch.testing.assert_close(colors, torch.tensor([[30.0, 30, 110], [255, 230, 60]]))


# --------------------------------------------------------------------------------- synthetic shapes
def test_shapes_are_a_function_of_split_and_index():
    everything = data.synthetic_shapes("train", np.arange(1000))
    some = data.synthetic_shapes("train", np.array([7, 999, 3]))
    for name in everything:
        assert (everything[name][[7, 999, 3]] == some[name]).all()
    other = data.synthetic_shapes("test", np.arange(9))
    assert (other["image"] != everything["image"][:9]).mean() > 0.5
    assert everything["image"].shape == (1000, 3, 32, 32) and everything["image"].dtype == np.uint8
    for name in ("shape", "color"):
        assert np.bincount(everything[name], minlength=8).min() > 80
    mean = everything["image"].mean()
    assert mean == pytest.approx(126.677, abs=1e-3)      # every figure rests on them
    assert np.bincount(everything["shape"])[:3].tolist() == [122, 128, 113]


def test_shapes_captions_masks_and_pairs():
    shapes = data.synthetic_shapes("train", np.arange(500))
    words = set(data.COLORS) | set(data.SHAPES)
    frames = set()                                       # captions without color and shape
    for caption, color, shape in zip(shapes["caption"], shapes["color"], shapes["shape"]):
        color = list(data.COLORS)[color]
        shape = list(data.SHAPES)[shape]
        assert words & set(caption.split()) == {color, shape}
        frames.add(caption.replace(color, "").replace(shape, ""))
    assert len(frames) >= len(data.CAPTIONS)
    colors = np.array(list(data.COLORS.values()))[shapes["color"]]
    inside = np.stack([p[:, m].mean(1) for p, m in zip(shapes["image"], shapes["mask"])])
    assert np.abs(inside - colors).mean() < 20           # the mask lies on the object
    assert 0.05 < shapes["mask"].mean() < 0.4
    assert len(set(data.HELD_OUT)) == 12
    for side in (0, 1):                                  # one word alone names no held-out pair
        held = [pair[side] for pair in data.HELD_OUT]
        assert max(held.count(v) for v in set(held)) == 2
    assert all([pair[0] for pair in data.HELD_OUT].count(c) == 2 for c, _ in data.HELD_OUT)
