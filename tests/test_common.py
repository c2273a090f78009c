"""common.py: flags, schedule, data, k-NN, checkpoints."""

import io
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import mae
from conftest import ROOT, draw, golden

MISC = golden("misc")


# ------------------------------------------------------------------------------- learning rate, k-NN
def test_learning_rate():
    figures = MISC["cosine_lr"]
    for epoch, lr in figures["at_epoch"].items():
        got = common.learning_rate(float(epoch), figures["warmup_epochs"], figures["epochs"], figures["lr"], figures["min_lr"])
        assert got == pytest.approx(lr, rel=1e-6)
    points = [common.learning_rate(e, 2, 10, 1.0) for e in (0, 0.5, 1, 2, 6, 10)]
    assert points == pytest.approx([0, 0.25, 0.5, 1, 0.5, 0])
    line = [common.learning_rate(e, 2, 10, 1.0, 0.2, "linear") for e in (0, 1, 2, 4, 10)]
    assert line == pytest.approx([0, 0.5, 1, 0.8, 0.2])


def labels(name, count):
    import zlib
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).randint(0, 7, count))


def test_knn_golden_figures():
    centres, train_labels, test_labels = draw("knn/centres", 7, 16), labels("knn/train_labels", 400), labels("knn/test_labels", 100)
    train = F.normalize(centres[train_labels] + 1.8 * draw("knn/train", 400, 16), dim=1)
    test = F.normalize(centres[test_labels] + 1.8 * draw("knn/test", 100, 16), dim=1)
    for k, figures in MISC["knn"]["results"].items():
        got = common.knn(train, train_labels, test, test_labels, 7, k=int(k))
        assert got == pytest.approx((figures["top1"], figures["top5"]), abs=1e-3)


def test_knn_votes():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(300, 8, generator=generator), torch.randn(2500, 8, generator=generator)
    y, z = torch.randint(0, 5, (300,), generator=generator), torch.randint(0, 5, (2500,), generator=generator)
    near = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).argmax(1)
    assert common.knn(train, y, test, z, 5, k=1)[0] == pytest.approx(100 * (y[near] == z).float().mean().item())
    similarity = F.normalize(test.double(), dim=1) @ F.normalize(train.double(), dim=1).T       # by brute force
    chosen = [np.argsort(-row)[:20] for row in similarity.numpy()]
    votes = [np.bincount(y[c], np.exp(row[c] / 0.07), 5).argmax() for row, c in zip(similarity.numpy(), chosen)]
    assert common.knn(train, y, test, z, 5)[0] == pytest.approx(100 * np.mean(votes == z.numpy()), abs=0.05)
    assert common.knn(train, y, train, y, 5, k=1)[0] == 100
    assert common.knn(train[:3], y[:3], test, z, 5, k=200)[0] > 0                # k beyond the training set
    assert common.knn(1e4 * train.half(), y, test.half(), z, 5)[0] > 0           # and no overflow


# ------------------------------------------------------------------------------------------- shapes
def test_shapes_are_a_function_of_split_and_index():
    all_, some = common.shapes("train", np.arange(1000)), common.shapes("train", np.array([7, 999, 3]))
    for name in all_:
        assert (all_[name][[7, 999, 3]] == some[name]).all()
    assert (common.shapes("test", np.arange(9))["picture"] != all_["picture"][:9]).mean() > 0.5
    assert all_["picture"].shape == (1000, 3, 32, 32) and all_["picture"].dtype == np.uint8
    assert np.bincount(all_["shape"], minlength=8).min() > 80 and np.bincount(all_["colour"], minlength=8).min() > 80


def test_shapes_captions_masks_and_pairs():
    drawn = common.shapes("train", np.arange(500))
    words = set(common.COLOURS) | set(common.SHAPES)
    for caption, colour, shape in zip(drawn["caption"], drawn["colour"], drawn["shape"]):
        assert words & set(caption.split()) == {list(common.COLOURS)[colour], list(common.SHAPES)[shape]}
    assert len(set(c.replace(list(common.COLOURS)[k], "").replace(list(common.SHAPES)[s], "")
                   for c, k, s in zip(drawn["caption"], drawn["colour"], drawn["shape"]))) >= len(common.CAPTIONS)
    paint = np.array(list(common.COLOURS.values()))[drawn["colour"]]
    inside = np.stack([p[:, m].mean(1) for p, m in zip(drawn["picture"], drawn["mask"])])
    assert np.abs(inside - paint).mean() < 20            # the mask lies on the object
    assert 0.05 < drawn["mask"].mean() < 0.4
    assert len(set(common.HELD_OUT)) == 12
    for side in (0, 1):                                  # one word alone never names a held-out pair
        held = [pair[side] for pair in common.HELD_OUT]
        assert max(held.count(v) for v in set(held)) == 2
    assert all([pair[0] for pair in common.HELD_OUT].count(c) == 2 for c, _ in common.HELD_OUT)


# ------------------------------------------------------------------------------------ order and crops
def stream(workers=0, processes=1, accumulate=1, first=0, steps=9):
    """(index, bytes of the picture) of the global batches, put together from all processes."""
    cfg = mae.Config(batch_size=12, accumulate=accumulate)
    drawn = common.shapes("train", np.arange(50))
    parts = []
    for rank in range(processes):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes))
        pictures = common.Pictures(torch.from_numpy(drawn["picture"]), drawn["shape"], 0, common.augment(32, 0.2))
        batches = list(common.loader(pictures, common.Batches(cfg, 50, first, steps), workers))
        parts.append([torch.cat([b[i] for b in batches]).view(steps - first, 12 // processes, -1) for i in (2, 0)])
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    return [torch.stack(p, dim=2).view(steps - first, 12, -1) for p in zip(*parts)]


def test_order_and_crops_depend_on_seed_epoch_and_index_only():
    index, pictures = stream()
    assert (index[:4].flatten().sort().values == index[:4].flatten().unique()).all()       # an epoch: 4 batches
    assert (index[:4] != index[4:8]).any() and (index[4:8] != index[[0, 1, 2, 3]]).float().mean() > 0.8
    for other in (dict(workers=1), dict(workers=4), dict(processes=2), dict(processes=3), dict(accumulate=3)):
        again = stream(**other)
        assert torch.equal(index, again[0]) and torch.equal(pictures, again[1]), other
    late = stream(first=5)                               # a resumed run: the same batches from there on
    assert torch.equal(index[5:], late[0]) and torch.equal(pictures[5:], late[1])


def test_noise_is_cut_from_one_draw(monkeypatch):
    cfg = mae.Config(batch_size=12)
    whole = common.uniform(cfg, 5, 7, "cpu")[0]
    for processes, accumulate in ((2, 1), (3, 2), (1, 4)):
        parts = []
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", str(processes))
            parts.append(common.uniform(replace(cfg, accumulate=accumulate), 5, 7, "cpu").flatten(0, 1))
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)
    assert not torch.equal(common.uniform(cfg, 6, 7, "cpu")[0], whole)


def test_augmentation_leaves_the_trainers_random_numbers_alone():
    pictures = common.Pictures(torch.zeros(4, 3, 40, 50, dtype=torch.uint8), transform=common.augment(32, 0.2))
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    assert pictures[0, 1][0].shape == (3, 32, 32) and torch.equal(torch.rand(2), want)


def test_centre():
    big = torch.randint(0, 255, (3, 300, 500), dtype=torch.uint8)
    assert common.Centre(224)(big).shape == (3, 224, 224)
    small = big[:, :32, :32]
    assert torch.equal(common.Centre(32)(small), small)  # nothing is lost of pictures that fit


def test_to_device_normalises():
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    want = (x.double() / 255 - torch.tensor(common.MEAN).view(3, 1, 1)) / torch.tensor(common.STD).view(3, 1, 1)
    torch.testing.assert_close(common.to_device(x, "cpu"), want.float(), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------- folders
def save(path, value=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 100, 200)).save(path)


def test_folder_with_train_and_val(tmp_path):
    for split in ("train", "val"):
        for c in ("cat", "dog"):
            for i in range(3):
                save(tmp_path / split / c / f"{i}.jpg")
    data = common.open_data(str(tmp_path), "")
    assert data.classes == ["cat", "dog"] and len(data.train) == len(data.test) == 6
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.train.read(0).shape == (3, 16, 20)
    save(tmp_path / "val" / "cow" / "0.jpg")
    with pytest.raises(common.UserError, match="cow"):
        common.open_data(str(tmp_path), "")


def test_plain_class_folders_keep_a_tenth(tmp_path):
    for i in range(20):
        save(tmp_path / "ab"[i % 2] / f"{i}.png")
    data = common.open_data(str(tmp_path), "")
    assert (len(data.pretrain), len(data.train), len(data.test)) == (20, 18, 2)
    assert not set(data.train.source) & set(data.test.source)


def test_flat_folder_has_no_labels(tmp_path):
    for i, ending in enumerate(("jpg", "PNG", "bmp", "webp")):
        save(tmp_path / f"{i}.{ending}", 10 * i)
    (tmp_path / "notes.txt").write_text("not a picture")
    data = common.open_data(str(tmp_path), "")
    assert len(data.pretrain) == 4 and data.test is None and data.pretrain[0, 2][1] == -1
    assert all(data.pretrain.read(i).shape == (3, 16, 20) for i in range(4))


def test_tiny_imagenet(tmp_path):
    top = tmp_path / "tiny-imagenet-200"
    for w in ("n01", "n02"):
        save(top / "train" / w / "images" / f"{w}_0.JPEG")
    for i, w in enumerate(("n02", "n01", "n02")):
        save(top / "val" / "images" / f"val_{i}.JPEG", i)
    (top / "val" / "val_annotations.txt").write_text("".join(f"val_{i}.JPEG\t{w}\t0\t0\t9\t9\n" for i, w in enumerate(("n02", "n01", "n02"))))
    data = common.open_data("tiny-imagenet", str(tmp_path))
    assert data.classes == ["n01", "n02"] and data.test.labels.tolist() == [1, 0, 1] and len(data.train) == 2


def test_imagenet_and_kaggles_layout(tmp_path):
    for w in ("n01", "n02"):
        save(tmp_path / "plain/imagenet/train" / w / "a.JPEG"), save(tmp_path / "plain/imagenet/val" / w / "b.JPEG")
        save(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC/train" / w / "a.JPEG")
    assert common.open_data("imagenet", str(tmp_path / "plain")).test.labels.tolist() == [0, 1]
    assert len(common.open_data("imagenet", str(tmp_path / "plain/imagenet")).train) == 2
    save(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "kaggle/LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n02 1 2 3 4 n02 5 6 7 8\n")
    data = common.open_data("imagenet", str(tmp_path / "kaggle"))
    assert data.test.labels.tolist() == [1] and data.test.readable(0)
    with pytest.raises(common.UserError, match="--data-root"):
        common.open_data("imagenet", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar(tmp_path, monkeypatch, name, classes):
    import pickle
    from torchvision import datasets
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)     # small files in the real layout
    (tmp_path / kind.base_folder).mkdir()
    for file, _ in kind.train_list + kind.test_list:
        entry = {"data": np.arange(3 * 3072, dtype=np.uint8).reshape(3, 3072), "labels": [0, 1, 9], "fine_labels": [0, 1, 9]}
        (tmp_path / kind.base_folder / file).write_bytes(pickle.dumps(entry))
    meta = {"label_names": list("0123456789"), "fine_label_names": [str(i) for i in range(100)]}
    (tmp_path / kind.base_folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(kind, "_load_meta", lambda self: setattr(self, "classes", list(range(classes))))
    data = common.open_data(name, str(tmp_path))
    assert len(data.classes) == classes and data.test.labels.tolist() == [0, 1, 9]
    assert data.pretrain.read(0).shape == (3, 32, 32) and data.pretrain.read(0)[0, 0, :3].tolist() == [0, 1, 2]


def test_stl10(tmp_path, monkeypatch):
    from torchvision import datasets
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for part, count in (("train", 3), ("test", 2), ("unlabeled", 5)):
        np.zeros((count, 3, 96, 96), np.uint8).tofile(folder / f"{part}_X.bin")
        np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    data = common.open_data("stl10", str(tmp_path))
    assert len(data.pretrain) == 8 and set(data.pretrain.labels) == {-1}         # no -1 among the labelled
    assert data.train.labels.tolist() == [0, 1, 2] and data.test.labels.tolist() == [0, 1] and len(data.classes) == 10


def test_loader_pickles_and_empty_val(tmp_path):
    import pickle
    pictures = common.Pictures(torch.zeros(4, 3, 9, 9, dtype=torch.uint8), np.array([0, 1, 1, 0], np.uint8),
                               transform=common.augment(8, 1.0))
    assert pickle.loads(pickle.dumps(pictures))[0, 1][0].shape == (3, 8, 8)      # for spawned workers
    table, y = common.features(lambda x: x.flatten(1), pictures, 8, "cpu")
    assert common.knn(table + 1, y, table + 1, y, 2, k=4)[1] == 100              # uint8 labels, too
    for i in range(4):
        save(tmp_path / "ab"[i % 2] / f"{i}.jpg")
    assert common.open_data(str(tmp_path), "").test is None


def test_no_network_is_one_line(tmp_path, monkeypatch):
    from torchvision import datasets
    from urllib.error import URLError
    def offline(*_, **__):
        raise URLError("no network")
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(common.UserError, match="cifar10.*no network.*cifar-10-python.tar.gz"):
        common.open_data("cifar10", str(tmp_path))


def test_broken_pictures_are_named_skipped_and_counted(tmp_path, capsys):
    for i in range(6):
        save(tmp_path / "train" / "ab"[i % 2] / f"{i}.jpg", 40 * i), save(tmp_path / "val" / "ab"[i % 2] / f"{i}.jpg")
    whole = (tmp_path / "train/a/2.jpg").read_bytes()
    (tmp_path / "train/a/2.jpg").write_bytes(whole[:len(whole) * 2 // 3])
    (tmp_path / "train/a/4.jpg").write_text("text")
    (tmp_path / "val/b/1.jpg").write_bytes(b"")
    data = common.open_data(str(tmp_path), "")
    for _ in range(2):
        assert data.train[0, 1][2] == 3                  # the next readable one steps in, with its label
    assert data.train[0, 1][1] == 1 and data.train.broken.sum() == 2
    errors = capsys.readouterr().err
    assert errors.count("2.jpg") == 1 and errors.count("4.jpg") == 1
    table, y = common.features(lambda x: x.flatten(1), data.test, 16, "cpu", workers=2)
    assert len(table) == len(y) == 5 and y.tolist() == [0, 0, 0, 1, 1]           # evaluation leaves it out


def test_a_loader_is_silent_when_its_trainer_hangs_up():
    """What test_ctrl_c meets now and then: multiprocessing gives the thread's error to sys.excepthook."""
    raised = "; ".join(f"sys.excepthook({kind}, {kind}('{kind}'), None)" for kind in ("EOFError", "ConnectionResetError", "ValueError"))
    done = subprocess.run([sys.executable, "-c", f"import sys, common; common.leave_ctrl_c_to_the_parent(); {raised}"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == "ValueError: ValueError"


@pytest.mark.parametrize("content", ["nothing", "text", "missing"])
def test_folder_without_a_readable_picture(tmp_path, content):
    if content == "text":
        (tmp_path / "a.jpg").write_text("hello")
    folder = tmp_path / "nowhere" if content == "missing" else tmp_path
    with pytest.raises(common.UserError, match="no folder" if content == "missing" else "no readable picture"):
        common.open_data(str(folder), "")


def test_decode():
    for mode, ending in (("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("L", "TIFF")):
        file = io.BytesIO()
        Image.new(mode, (9, 7)).save(file, ending)
        assert common.decode(file.getvalue()).shape == (3, 7, 9)


def test_shrink(tmp_path):
    save(tmp_path / "in/train/a/big.JPEG", size=(600, 400)), save(tmp_path / "in/train/a/small.png", size=(50, 40))
    (tmp_path / "in/train/a/bad.jpg").write_text("text")
    (tmp_path / "in/list.txt").write_text("kept")
    command = [sys.executable, ROOT / "common.py", "shrink", tmp_path / "in", tmp_path / "out", "--size", "256"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "wrote 3 files" in done.stdout and "bad.jpg" in done.stderr
    assert Image.open(tmp_path / "out/train/a/big.JPEG").size == (384, 256)
    assert Image.open(tmp_path / "out/train/a/small.png.jpg").size == (50, 40)
    assert (tmp_path / "out/list.txt").read_text() == "kept"
    before = (tmp_path / "out/train/a/big.JPEG").stat().st_mtime_ns
    assert "wrote 0 files" in subprocess.run(command, capture_output=True, text=True).stdout
    assert (tmp_path / "out/train/a/big.JPEG").stat().st_mtime_ns == before


# ---------------------------------------------------------------------------------------------- flags
def test_flag_over_preset_over_default():
    parse = lambda *argv: common.parse(mae.Config, mae.PRESETS, argv)
    assert parse() == replace(mae.Config(), preset="shapes")
    assert parse("--data", "cifar10").patch_size == 4 and parse("--data", "cifar10", "--patch-size", "2").patch_size == 2
    assert parse("--data", "/some/folder").preset == "folder" and parse("--data", "/x/y").output == "runs/mae-y"
    assert parse("--data", "/some/folder", "--preset", "cifar10").image_size == 32
    assert parse("--mask_ratio", "0.5", "--no-norm-pix", "--base_lr=1").norm_pix is False
    assert parse("--model", "large").embed_dim == 1024 and parse("--model", "large", "--depth", "3").depth == 3


@pytest.mark.parametrize("argv, match", [
    (["--batchsize", "3"], "--batch-size"), (["--epochs", "x"], "epochs"), (["--model", "giant"], "giant"),
    (["--preset", "none"], "imagenet"), (["--patch-size", "5"], "5 does not divide"), (["extra"], "extra")])
def test_wrong_flags(argv, match):
    with pytest.raises(common.UserError, match=match):
        common.parse(mae.Config, mae.PRESETS, argv)


def test_help_has_a_line_and_a_default_for_every_flag(capsys):
    with pytest.raises(SystemExit):
        common.parse(mae.Config, mae.PRESETS, ["--help"], mae.__doc__)
    text = capsys.readouterr().out
    for name in mae.Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert text.count("(default:") == len(mae.Config.__dataclass_fields__) and "2111.06377" in text


def test_batch_that_does_not_divide(monkeypatch):
    with pytest.raises(common.UserError, match="--batch-size 30.*2 processes x --accumulate 4.*--batch-size 32"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        common.plan(mae.Config(batch_size=30, accumulate=4), 1000)
    with pytest.raises(common.UserError, match="20 pictures"):
        common.plan(mae.Config(), 20)
