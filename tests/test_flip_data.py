"""flip.py's inputs: tokenizers, tables, class folders, the synthetic shapes and tar shards.

Tests that need webdataset or tokenizers are skipped where these packages are not installed."""

import io
import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import flip
from conftest import ROOT
from flip import Config, Shards, Tokenizer
from test_train import checkpoint, close, photos, weights  # noqa: F401, photos is a fixture

TINY = dict(image_size=16, patch_size=4, text_length=12, batch_size=10, epochs=2,
            warmup_epochs=0.5)
TINY_SIZES = (16, 1, 2, 16, 1, 2, 8)
SHARDS = "shards/{000..005}.tar"


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    monkeypatch.setitem(flip.SIZES, "micro", TINY_SIZES)
    monkeypatch.setattr(common, "LOG_EVERY", 1)


def tiny(**changes):
    return Config(**TINY | changes)


def jpeg(i):
    """Image i of the synthetic shapes as the bytes of a file, and its caption."""
    drawn = data.synthetic_shapes("train", np.array([i]))
    file = io.BytesIO()
    Image.fromarray(drawn["image"][0].transpose(1, 2, 0)).save(file, "JPEG")
    return file.getvalue(), str(drawn["caption"][0])


def write_tar(path, members):
    """members: (name, bytes or text)."""
    with tarfile.open(path, "w:gz" if str(path).endswith("gz") else "w") as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


# ------------------------------------------------------------------------------------- tokenizers
def test_bytes():
    tokenizer = Tokenizer("", 8)
    assert tokenizer("a cat").tolist() == [257, 98, 33, 100, 98, 117, 0, 0]
    assert tokenizer("é").tolist()[:4] == [257, 0xC3 + 1, 0xA9 + 1, 0]
    assert tokenizer("a cat is there").tolist() == [257, 98, 33, 100, 98, 117, 33, 106]
    assert tokenizer("").tolist() == [257] + 7 * [0]
    assert tokenizer.vocab_size == 258 and tokenizer.encode_batch(["a", "b"]).shape == (2, 8)


def write_bert(path):
    """A tokenizer like BERT's, made here: word pieces, lower case, [CLS] and [SEP] around them."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'中"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cat", "##s", "red", "ring", *letters]
    pieces += [f"##{letter}" for letter in letters if f"##{letter}" not in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = tokenizers.models.WordPiece(vocab, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path))
    return vocab


def write_byte_pairs(path):
    """A tokenizer like CLIP's, made here: byte pairs, learned from a few captions, start and end
    tokens last, padding by 0, and truncation of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=letters,
                                             end_of_word_suffix="</w>", show_progress=False)
    captions = data.synthetic_shapes("train", np.arange(300))["caption"]
    tokenizer.train_from_iterator([str(caption) for caption in captions], trainer)
    tokenizer.add_special_tokens(["<start>", "<end>"])
    special = [(name, tokenizer.token_to_id(name)) for name in ("<start>", "<end>")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=special)
    tokenizer.enable_padding(length=100, pad_id=7)       # what --text-length and 0 stand in for
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path))
    return dict(special)


def random_texts(count):
    """Strings with emoji, Chinese, combining and control characters."""
    alphabet = ["a", "b", "cats", "Red", " ", " ", "ring", ".", "'s", "é", "e\u0301", "ß",
                "中文", "😀", "👩\u200d🚀", "\t", "\n", "\x00", "\x1b", "\u202e", "\ufffd",
                "½", "\ufeff"]
    chance = random.Random(0)
    return ["".join(chance.choices(alphabet, k=chance.randint(0, 25))) for _ in range(count)]


@pytest.mark.parametrize("write", [write_bert, write_byte_pairs])
def test_ids_are_the_packages_own(in_tmp, write):
    write("tokenizer.json")
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer("tokenizer.json", 16)
    plain = tokenizers.Tokenizer.from_file("tokenizer.json")
    plain.no_padding()
    plain.no_truncation()
    lengths = Counter()
    for text in random_texts(1000):
        ids = plain.encode(text).ids
        if len(ids) > 16:
            ids = ids[:15] + ids[-1:]                    # the end token stays
        lengths[len(ids)] += 1
        assert ours(text).tolist() == ids + (16 - len(ids)) * [0], ascii(text)
    assert lengths[16] > 100 and lengths[2] > 0 and len(lengths) > 10
    assert ours.vocab_size == plain.get_vocab_size() == 1 + max(plain.get_vocab().values())


def test_start_and_end_are_the_tokenizers(in_tmp):
    vocab = write_bert("bert.json")
    special = write_byte_pairs("pairs.json")
    ids = Tokenizer("bert.json", 8)("Red cats")
    assert ids.tolist() == [2, vocab["red"], vocab["cat"], vocab["##s"], 3, 0, 0, 0]
    ids = Tokenizer("pairs.json", 8)("a red ring is red, a red ring is red, a red ring").tolist()
    assert ids[0] == special["<start>"] and ids[7] == special["<end>"]


def test_text_length_and_vocabulary(photos):
    assert tiny().vocab_size == 258
    vocab = write_bert("bert.json")
    cfg = tiny(tokenizer="bert.json", data="photos", max_steps=1)
    metrics = flip.train(cfg)
    state = checkpoint("runs/flip-photos")
    assert state["config"]["vocab_size"] == len(vocab)
    assert state["model"]["text.token_embedding.weight"].shape == (len(vocab), 16)
    again = flip.main(["--zero-shot=runs/flip-photos/checkpoint.pt", "--data=photos"])
    assert again["zero_shot"] == metrics["zero_shot"]    # with its own tokenizer and sizes
    write_byte_pairs("other.json")
    with pytest.raises(common.UserError, match="trained with .* ids, and --tokenizer other.json"):
        flip.train(tiny(zero_shot="runs/flip-photos/checkpoint.pt", tokenizer="other.json"))


# ----------------------------------------------------------------------------------------- tables
@pytest.fixture
def images(in_tmp):
    """images/0.jpg to 29.jpg; their captions."""
    Path("images").mkdir()
    captions = []
    for i in range(30):
        content, caption = jpeg(i)
        Path(f"images/{i}.jpg").write_bytes(content)
        captions.append(caption)
    return captions


def last_line(capfd):
    return capfd.readouterr().out.splitlines()[-1]


def test_csv(images, capfd):
    rows = [f'{i},images/{i}.jpg,"{caption}, it is"' for i, caption in enumerate(images)]
    Path("a.csv").write_text("\n".join(["\ufeffid,Image,Caption", *rows, ""]), encoding="utf-8")
    pairs = flip.read_pairs("a.csv", "")
    assert pairs[3] == ("images/3.jpg", [images[3] + ", it is"]) and len(pairs) == 30
    assert last_line(capfd) == "a.csv: 30 rows gave 30 pairs of 30 images"
    source = flip.open_source(tiny(data="a.csv"), Tokenizer("", 12))
    training = source.splits.pretrain
    assert len(training) == 27 and len(source.retrieval) == 3            # every tenth is kept
    paths = {os.fsdecode(path) for path in source.retrieval.source}
    assert paths == {f"images/{i}.jpg" for i in (9, 19, 29)}
    assert not paths & {os.fsdecode(path) for path in training.source}
    image, ids, index = training[0, 5]
    assert image.shape == (3, 32, 32) and index == 5
    assert ids.tolist() == Tokenizer("", 12)(images[5]).tolist()
    whole = flip.open_source(tiny(data="a.csv", zero_shot="x"), Tokenizer("", 12))
    assert len(whole.retrieval) == 30


def test_captions_of_an_image_take_turns(images):
    Path("a.csv").write_text("image,caption\nimages/0.jpg,one\nimages/1.jpg,x\nimages/0.jpg,two\n")
    training = flip.open_source(tiny(data="a.csv"), Tokenizer("", 12)).splits.pretrain
    assert training.texts(0) == ["one", "two"] and len(training) == 2
    seen = Counter(tuple(training[epoch, 0][1].tolist()) for epoch in range(200))
    assert len(seen) == 2 and min(seen.values()) > 70
    assert torch.equal(training[3, 0][1], training[3, 0][1])


def test_quotes_in_a_tsv_are_plain_characters(in_tmp):
    Path("0.jpg").write_bytes(jpeg(0)[0])
    rows = '0.jpg\t"a 5" screen\n1.jpg\t"so\n2.jpg\tsays "hi"\n'
    Path("a.tsv").write_text("filepath\ttitle\n" + rows)
    assert flip.read_pairs("a.tsv", "") == [
        ("0.jpg", ['"a 5" screen']), ("1.jpg", ['"so']), ("2.jpg", ['says "hi"'])]


def test_incomplete_rows_are_left_out(in_tmp, capfd):
    """And images whose paths cannot be are unreadable ones."""
    Path("0.jpg").write_bytes(jpeg(0)[0])
    rows = [f" {'x' * 5000},long", "0.jpg, one ", "0.jpg,", "1.jpg,", "2.jpg", ",lost",
            "away.jpg,two"]
    Path("a.csv").write_text("\n".join([" image, caption", *rows]))
    assert flip.read_pairs("a.csv", "") == [("x" * 5000, ["long"]), ("0.jpg", ["one"]),
                                            ("away.jpg", ["two"])]
    assert last_line(capfd) == "a.csv: 7 rows gave 3 pairs of 3 images"
    changes = dict(data="a.csv", batch_size=2, max_steps=1, output="run", test_data="a.csv")
    assert flip.train(tiny(**changes))["unreadable"] == 2


def test_columns_beside_may_be_long(in_tmp):
    Path("0.jpg").write_bytes(jpeg(0)[0])
    Path("a.csv").write_text(f"image,exif,caption\n0.jpg,{'x' * 200_000},one\n")
    assert flip.read_pairs("a.csv", "") == [("0.jpg", ["one"])]


def test_an_unreadable_image_that_is_scored(images):
    """It is counted, and the one shown in its place has its own caption."""
    Path("images/9.jpg").unlink()
    rows = [f"images/{i}.jpg,{i}" for i in range(30)]
    Path("a.csv").write_text("\n".join(["image,caption", *rows]))
    cfg = tiny(data="a.csv", max_steps=1, output="run")
    assert flip.train(cfg)["unreadable"] == 1
    source = flip.open_source(cfg, Tokenizer("", 12))
    shown, texts, _ = flip.sample_pairs(source, cfg, Tokenizer("", 12), "cpu")
    for image, text in zip(shown, texts):
        packed = data.decode(Path(f"images/{text}.jpg").read_bytes())
        expected = data.to_device(data.CenterCrop(16)(packed).unsqueeze(0), "cpu")[0]
        assert torch.equal(image, expected)
    assert len(texts) == 3 and "9" not in texts


def test_coco(images):
    Path("elsewhere").mkdir()
    Path("images/2.jpg").rename("elsewhere/2.jpg")
    names = {7: "0.jpg", 8: "1.jpg", 9: "2.jpg", 10: "half \ud800.jpg"}
    files = [{"id": i, "file_name": name} for i, name in names.items()]
    captions = [(7, "a"), (8, "b"), (7, "c"), (1, "d"), (10, "e \ud83d")]
    annotations = [{"image_id": i, "caption": text} for i, text in captions]
    Path("coco.json").write_text(json.dumps({"images": files, "annotations": annotations}))
    expected = [("images/0.jpg", ["a", "c"]), ("images/1.jpg", ["b"]),
                ("images/half ?.jpg", ["e ?"])]          # unreadable
    assert flip.read_pairs("coco.json", "images") == expected
    annotations = [{"image_id": 9, "caption": "e"}]
    Path("val.json").write_text(json.dumps({"images": files, "annotations": annotations}))
    cfg = tiny(data="coco.json", image_root="images", test_data="val.json", test_root="elsewhere")
    source = flip.open_source(cfg, Tokenizer("", 12))
    assert len(source.splits.pretrain) == 3 and source.retrieval.texts(0) == ["e"]
    metrics = flip.train(replace(cfg, batch_size=3, max_steps=1, output="run"))
    assert metrics["image_to_text_1"] == 100 and metrics["unreadable"] == 1


# ------------------------------------------------------------------------------ classes and shapes
def test_captions_of_classes(photos):
    Path("names.txt").write_text("small thing\nbig thing\n")
    Path("prompts.txt").write_text("one {}\nsome {}\n")
    cfg = tiny(data="photos", classnames="names.txt", templates="prompts.txt")
    source = flip.open_source(cfg, Tokenizer("", 12))
    assert source.prompts == [["one small thing", "some small thing"],
                              ["one big thing", "some big thing"]]
    training = source.splits.pretrain
    for i in (0, 39):
        assert training.texts(i) == source.prompts[training.labels[i]]
    assert len(training) == 40 and len(source.labelled) == 10
    plain = flip.open_source(tiny(data="photos"), Tokenizer("", 12))
    assert plain.prompts[1] == [template.format("b") for template in flip.TEMPLATES]
    assert len(flip.TEMPLATES) == 7


def test_class_names(in_tmp):
    imagenet = ["n01440764", *(f"n{i:08}" for i in range(2_000_000, 2_000_999))]
    names = flip.class_names(tiny(), imagenet)
    assert len(names) == 1000 and names[0] == "tench"
    assert flip.class_names(tiny(), ["red_ring", "bar"]) == ["red ring", "bar"]
    Path("words.txt").write_text("n00000001\tdog, hound\nn00000002\tcat\nn00000003\tcow\n")
    folders = ["n00000002", "n00000001"]
    assert flip.class_names(tiny(classnames="words.txt"), folders) == ["cat", "dog"]
    with pytest.raises(common.UserError, match=r"no name for \['x'\]"):
        flip.class_names(tiny(classnames="words.txt"), ["n00000001", "x"])


def test_hidden_files_are_no_samples(photos):
    Path("photos/train/a/._00.png").write_bytes(b"a resource fork")
    Path("photos/train/.cache").mkdir()
    Path("photos/train/.cache/x.png").write_bytes(Path("photos/train/a/00.png").read_bytes())
    source = flip.open_source(tiny(data="photos"), Tokenizer("", 12))
    assert len(source.splits.pretrain) == 40 and len(source.prompts) == 2


def test_shapes_keep_pairs_out():
    source = flip.open_source(tiny(data="shapes"), Tokenizer("", 40))
    assert source.held_out.sum() == 12
    assert len(source.prompts) == len({tuple(prompts) for prompts in source.prompts}) == 64
    training = source.splits.pretrain
    shown = set()
    for i in range(len(training)):
        for caption in training.texts(i):
            words = frozenset(caption.split()) & {*data.COLORS, *data.SHAPES}
            shown.add(words)
    colors = list(data.COLORS)
    shapes = list(data.SHAPES)
    held_out = {frozenset((colors[color], shapes[shape])) for color, shape in data.HELD_OUT}
    assert len(shown) == 52 and not shown & held_out
    assert len(source.retrieval) == 64
    label = 8 * colors.index("blue") + shapes.index("ring")
    assert "blue" in source.prompts[label][0] and "ring" in source.prompts[label][0]
    i = int(np.argmax(source.labelled.labels == label))
    drawn = data.synthetic_shapes("test", np.array([i]))
    assert "blue" in drawn["caption"][0] and "ring" in drawn["caption"][0]


# ----------------------------------------------------------------------------------------- shards
@pytest.fixture
def shards(in_tmp):
    """shards/000.tar to 005.tar of ten pairs each, by webdataset's own writer; caption: the pair's
    number."""
    webdataset = pytest.importorskip("webdataset")
    Path("shards").mkdir()
    content, _ = jpeg(0)
    for s in range(6):
        with webdataset.TarWriter(f"shards/{s:03}.tar") as writer:
            for i in range(10 * s, 10 * s + 10):
                writer.write({"__key__": f"{i:04}", "jpg": content, "txt": str(i)})
    return in_tmp


def open_shards(where, seed=0, rank=0, world=1, worker=0, first_step=0, **changes):
    """Shards whose stream is that of one loader process of one training process."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    cfg = tiny(data=where, epoch_pairs=60, seed=seed, workers=worker + 1, **changes)
    dataset = Shards(cfg, Tokenizer("", 12))
    dataset.transform = data.augment(16, 0.5)
    dataset.worker = worker
    dataset.first_step = first_step
    return dataset


@pytest.fixture
def alone(monkeypatch):
    """What open_shards changes is put back."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, os.environ.get(name, value))
    monkeypatch.setattr(flip, "SHUFFLE", dict(bufsize=20, initial=10))


def numbers(dataset, count):
    """The captions, which are numbers, of the first pairs of a stream."""
    stream = dataset.stream()
    captions = []
    for _, ids in itertools.islice(stream, count):
        captions.append(bytes(number - 1 for number in ids.tolist()[1:] if number).decode())
    return captions


def test_all_pairs_come_equally_often(shards, alone):
    """Shards of 10, 10, 10, 10, 10 and 2 pairs, in a long stream."""
    write_tar("shards/005.tar", [(f"{i}.{ending}", content) for i in (50, 51)
                                 for ending, content in (("jpg", jpeg(0)[0]), ("txt", str(i)))])
    seen = Counter(numbers(open_shards(SHARDS), 3000))
    assert seen.keys() == {str(i) for i in range(52)}
    expected = 3000 / 52                                 # of each shard's draws: binomial
    spread = (expected * 5 / 6) ** 0.5
    worst = max(abs(count - expected) for count in seen.values())
    assert worst < 4.5 * spread, worst / spread


def test_streams_differ(shards, alone):
    """By seed, step, process and loader process; the same ones give the same stream."""
    first = numbers(open_shards(SHARDS), 60)
    assert first == numbers(open_shards(SHARDS), 60)
    others = [dict(seed=1), dict(rank=1, world=2), dict(worker=1), dict(first_step=6)]
    streams = [numbers(open_shards(SHARDS, **each), 60) for each in others]
    assert len({tuple(stream) for stream in [first, *streams]}) == 5
    assert first[:20] != sorted(first[:20])              # shuffled
    later = numbers(open_shards(SHARDS), 120)[60:]     # the next epoch
    assert later != first


def test_crops_and_captions_change(in_tmp, alone):
    pytest.importorskip("webdataset")
    write_tar("one.tar", [("0.jpg", jpeg(0)[0]), ("0.txt", "one\n\n two\r\n")])
    dataset = open_shards("one.tar")
    pairs = list(itertools.islice(dataset.stream(), 100))
    assert len({image.numpy().tobytes() for image, _ in pairs}) > 90
    texts = Counter(tuple(ids.tolist()) for _, ids in pairs)
    assert len(texts) == 2 and min(texts.values()) > 25


def test_loader_processes_take_turns(shards, alone):
    cfg = tiny(data=SHARDS, epoch_pairs=60, workers=2)
    dataset = open_shards(SHARDS, worker=1)
    loaded = dataset.batches(replace(cfg, accumulate=5, workers=0), 3, 6)
    state = torch.random.get_rng_state()
    batches = list(loaded)
    assert torch.equal(state, torch.random.get_rng_state())      # crops leave the trainer's alone
    assert len(batches) == 15 and batches[0][0].shape == (2, 3, 16, 16)
    assert batches[0][0].dtype == torch.uint8 and batches[0][1].shape == (2, 12)
    batches = list(dataset.batches(cfg, 0, 5))
    assert len(batches) == 5
    for i, (_, ids) in enumerate(batches[:4]):
        alone = open_shards(SHARDS, worker=i % 2)
        stream = alone.stream()
        expected = torch.stack([ids for _, ids in itertools.islice(stream, 20)])
        assert torch.equal(ids, expected[i // 2 * 10:i // 2 * 10 + 10])


def img2dataset(numbers):
    """Members in img2dataset's layout: .jpg, .txt and .json side by side."""
    for i in numbers:
        content, caption = jpeg(i)
        about = {"caption": caption, "key": f"{i:09}", "status": "success", "url": "http://x"}
        yield f"{i:09}.jpg", content
        yield f"{i:09}.json", json.dumps(about)
        yield f"{i:09}.txt", caption


def test_layout_of_img2dataset_and_pipes(in_tmp, alone):
    """Also shards with dots and folders in their names, packed, and through a command, as S3 is
    read."""
    pytest.importorskip("webdataset")
    write_tar("00000.tar", img2dataset(range(10)))
    write_tar("00001.tar.gz", [(f"./a.b/{name}", x) for name, x in img2dataset(range(10, 20))])
    write_tar("2 3.tar", [(f"{i}.json", json.dumps({"caption": str(i)})) if j else
                          (f"{i}.PNG", png()) for i in range(20, 30) for j in (0, 1)])
    where = "00000.tar::00001.tar.gz::pipe:cat '2 3.tar'"
    dataset = open_shards(where, text_length=50)
    dataset.tokenizer = Tokenizer("", 50)
    seen = set(numbers(dataset, 600))
    assert seen == {jpeg(i)[1] for i in range(20)} | {str(i) for i in range(20, 30)}
    assert not dataset.skipped.any()
    assert flip.shard_names("0000{0..0}.tar") == ["00000.tar"]
    assert flip.is_shards("pipe:aws s3 cp s3://x/{00..10}.tar -") and flip.is_shards("a.tgz")
    assert not flip.is_shards("my.targets/a.csv")


def png():
    file = io.BytesIO()
    Image.new("RGB", (20, 24), "red").save(file, "PNG")
    return file.getvalue()


def test_what_is_skipped(in_tmp, alone, capfd):
    pytest.importorskip("webdataset")
    good, _ = jpeg(0)
    members = [("x/1.jpg", good), ("x/1.txt", "one\ntwo\n"), ("2.jpg", good), ("3.txt", "no image"),
               ("4.jpg", b"no image"), ("4.txt", "four"), ("5.jpg", good), ("5.txt", b"\xff\xfe"),
               ("6.png", good), ("6.json", '{"caption": "six", "url": 1}'), ("7.jpg", good),
               ("7.txt", "  "), ("8.jpg", good), ("8.json", "no json"), ("9.jpg", good),
               ("9.json", '{"caption": NaN}'), ("a.webp", good), ("a.json", '["a list"]'),
               ("b.jpg", good), ("b.json", '{"caption": "half \\ud83d"}'),
               ("._d.jpg", good), ("._d.txt", "a resource fork"),
               ("f.jpg", good), ("f.jpg", good), ("f.txt", "twice"), ("g.cls", "3")]
    write_tar("a.tar", members)
    dataset = open_shards("a.tar")
    webdataset = flip.import_webdataset()
    samples = webdataset.tariterators.tarfile_samples([{"url": "a.tar"}], handler=dataset.skip)
    pairs = {name: texts for name, _, texts in dataset.read_captions(samples)}
    assert pairs == {"a.tar: x/1": ["one", "two"], "a.tar: 4": ["four"], "a.tar: 6": ["six"],
                     "a.tar: b": ["half ?"], "a.tar: f": ["twice"]}
    assert dataset.skipped.tolist() == [9]               # 2, 3, 5, 7, 8, 9, a, g; one of f's files
    assert "its first ten): 'a.tar: 5: 'utf-8' codec" in capfd.readouterr().err.replace('"', "'")
    dataset = open_shards("a.tar")
    assert set(numbers(dataset, 200)) == {"one", "two", "six", "half ?", "twice"}
    assert dataset.skipped[0] > 200                      # 4 is met again and again, too


def test_damaged_shards(in_tmp, alone):
    """Cut off, no tar at all, and no such command: counted, and the pairs before the damage are
    used. A last image does not get the caption of another shard."""
    pytest.importorskip("webdataset")
    pairs = [(f"{i}.{e}", c) for i in range(40) for e, c in (("jpg", jpeg(i)[0]), ("txt", "ok"))]
    write_tar("cut.tar", pairs)
    with tarfile.open("cut.tar") as tar:
        somewhere = tar.getmember("20.jpg").offset_data + 100
    Path("cut.tar").write_bytes(Path("cut.tar").read_bytes()[:somewhere])
    Path("none.tar").write_bytes(b"no tar" * 200)
    names = ["cut.tar", "none.tar", "pipe:no-such-command"]
    dataset = open_shards("::".join(names))
    assert set(numbers(dataset, 100)) == {"ok"}
    webdataset = flip.import_webdataset()
    for name in names:
        before = dataset.skipped[0].item()
        list(webdataset.tariterators.tarfile_samples([{"url": name}], handler=dataset.skip))
        assert dataset.skipped[0] > before, name
    write_tar("image.tar", [("0.jpg", jpeg(0)[0]), ("1.jpg", bytes(3000))])
    with tarfile.open("image.tar") as tar:
        somewhere = tar.getmember("1.jpg").offset_data + 1000
    Path("image.tar").write_bytes(Path("image.tar").read_bytes()[:somewhere])
    write_tar("caption.tar", [("0.txt", "of another image")])
    with pytest.raises(common.UserError, match="100 shards in a row hold no image with a caption"):
        next(open_shards("image.tar::caption.tar").stream())


@pytest.mark.parametrize("members, words", [
    ([], "100 shards in a row hold no image with a caption"),
    ([("1.cls", "3")], "100 shards in a row hold no image with a caption"),
    ([("1.jpg", b"x"), ("2.txt", "a")], "100 shards in a row hold no image with a caption"),
    ([("1.jpg", b"x"), ("1.txt", "a")], "1000 images in a row cannot be read, the last is a.tar")])
def test_shards_without_any_pair_end_the_run(in_tmp, alone, members, words):
    pytest.importorskip("webdataset")
    write_tar("a.tar", members)
    with pytest.raises(common.UserError, match=words):
        next(open_shards("a.tar").stream())


def test_a_run_with_broken_members(in_tmp, alone, capfd):
    """A tenth of the images is broken: a run with loader processes ends well and counts them."""
    pytest.importorskip("webdataset")
    members = []
    for i in range(30):
        members += [(f"{i}.jpg", b"broken" if i % 10 == 3 else jpeg(i)[0]), (f"{i}.txt", str(i))]
    write_tar("a.tar", members)
    Path("test.csv").write_text("image,caption\n0.jpg,zero\n")
    Path("0.jpg").write_bytes(jpeg(0)[0])
    cfg = tiny(data="a.tar", epoch_pairs=60, workers=2, test_data="test.csv", output="run")
    metrics = flip.train(cfg)
    assert metrics["step"] == 12 and metrics["image_to_text_1"] == 100
    assert metrics["unreadable"] >= 10                   # of some 140 pairs that were read
    line = f"skipped in this run, shards and what is in them: {metrics['unreadable']}\n"
    assert line in capfd.readouterr().out
    assert Path("run/encoder.pt").exists() and Path("run/similarity.png").exists()


# ------------------------------------------------------------------------- several processes, kill
RUNS = """
import os, signal, sys
sys.path.insert(0, {root!r})
import common, flip
common.LOG_EVERY = 1
flip.SIZES["micro"] = {sizes!r}
first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
end_step = common.Run.end_step

def dying_end_step(run, step, *args):
    ended = end_step(run, step, *args)
    if first_time and run.cfg.output == "shards-run" and step == 7 and common.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return ended

common.Run.end_step = dying_end_step
with common.command_line():
    for settings in {runs!r}:
        flip.train(flip.Config(**settings))
"""


def test_kill_and_restart_of_two_processes(images, shards):
    """A table, then shards, where one process is killed at step 7: torchrun starts both anew, and
    they go on from the checkpoint of step 6, an epoch's end."""
    rows = [f"images/{i}.jpg,{caption}\n" for i, caption in enumerate(images)]
    Path("a.csv").write_text("image,caption\n" + "".join(rows))
    table = TINY | dict(data="a.csv", batch_size=4, output="table-run")        # 6 steps an epoch
    tars = TINY | dict(data=SHARDS, epoch_pairs=60, workers=2, output="shards-run",
                       test_data="a.csv")
    script = RUNS.format(root=str(ROOT), sizes=TINY_SIZES, runs=[table, tars])
    Path("runs.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
              "--max-restarts=1"]
    done = subprocess.run([*launch, "runs.py"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("going on from step 6 of 12 ") == 1, done.stdout[-3000:]
    assert "shards: other pairs from step 6 on" in done.stdout
    for run in ("table-run", "shards-run"):
        assert checkpoint(run)["step"] == 12
        last = json.loads(open(f"{run}/metrics.jsonl").readlines()[-1])
        assert last["step"] == 12 and "text_to_image_10" in last
    flip.train(Config(**table | dict(output="one-process")))
    close(weights("one-process"), weights("table-run"))


# ---------------------------------------------------------------------------------- users' mistakes
def test_packages_that_are_not_installed(in_tmp, monkeypatch):
    for name in ("webdataset", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)     # as if it were not
    write_tar("a.tar", [])
    Path("tokenizer.json").write_text("{}")
    with pytest.raises(common.UserError, match="^tar shards need a .*: pip install webdataset$"):
        flip.train(tiny(data="a.tar", epoch_pairs=60))
    with pytest.raises(common.UserError, match="^--tokenizer needs a .*: pip install tokenizers$"):
        flip.train(tiny(tokenizer="tokenizer.json"))


@pytest.mark.parametrize("argv, words, package", [
    (["--data=a.tar"], "--epoch-pairs", ""),
    (["--data=none.tar", "--epoch-pairs=60"], "1 of 1 shards are not there: no", "webdataset"),
    (["--data=a{.tar", "--epoch-pairs=60"], "a{.tar", "webdataset"),
    (["--data=empty.tar", "--epoch-pairs=64", "--workers=1"], "100 shards in a row", "webdataset"),
    (["--tokenizer=none.json"], "none.json is no tokenizer.json", "tokenizers"),
    (["--tokenizer=bad.json"], "bad.json is no tokenizer.json", "tokenizers"),
    (["--data=photos", "--preset=laion"], "--preset laion needs --tokenizer tokenizer.json", ""),
    (["--data=nowhere.csv"], "nowhere.csv cannot be read", ""),
    (["--data=columns.csv"], "has the columns ['a', 'b']", ""),
    (["--data=empty.csv"], "no pair", ""),
    (["--data=open.csv"], "open.csv: the row that begins in line 3: unexpected end", ""),
    (["--data=latin.csv"], "latin.csv cannot be read: 'utf-8' codec", ""),
    (["--data=bad.json"], "bad.json does not hold COCO's captions", ""),
    (["--data=number.json"], "number.json does not hold COCO's captions", ""),
    (["--data=lost.csv"], "none of the first 2 images of lost.csv is there", ""),
    (["--data=wordnet"], "--classnames", ""),
    (["--data=flat"], "neither captions nor class folders", ""),
    (["--data=photos", "--templates=lost.csv"], "--templates lost.csv: one prompt a line", ""),
    (["--data=photos", "--classnames=empty.csv"], "--classnames empty.csv has no name", ""),
    (["--mask-ratio=1"], "leaves nothing to see", ""),
    (["--mask-ratio=-0.001"], "it must be from 0 to 1", ""),
    (["--text-length=2"], "text_length is 2", ""),
    (["--zero-shot=none.pt"], "no file none.pt", ""),
    (["--zero-shot=other.pt"], "other.pt is no checkpoint of this flip.py", ""),
    (["--init=lost.csv"], "lost.csv is no file of weights", "")])
def test_a_users_mistake_is_one_line(photos, capfd, argv, words, package):
    if package:
        pytest.importorskip(package)
    write_tar("empty.tar", [])
    write_tar("a.tar", [])
    Path("columns.csv").write_text("a,b\n1,2\n")
    Path("empty.csv").write_text("image,caption\n")
    Path("open.csv").write_text('image,caption\na.jpg,"a"\nb.jpg,"b\nc.jpg,c\n')
    Path("latin.csv").write_bytes("image,caption\na.jpg,é\n".encode("latin-1"))
    Path("bad.json").write_text("{")
    Path("number.json").write_text("3")
    Path("lost.csv").write_text("image,caption\na.jpg,a\nb.jpg,b\n")
    torch.save({"method": "flip", "config": {}, "model": {"a": torch.zeros(1)}}, "other.pt")
    for number in (1, 2):
        Path(f"wordnet/n0000000{number}").mkdir(parents=True)
        for i in range(10):
            Path(f"wordnet/n0000000{number}/{i}.jpg").write_bytes(png())
    Path("flat").mkdir()
    Path("flat/a.jpg").write_bytes(png())
    preset = [] if any(flag.startswith("--preset") for flag in argv) else ["--preset=shapes"]
    with pytest.raises(SystemExit) as stop:
        flip.main([*argv, *preset])
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error
    assert error.startswith("error: ") and "\n" not in error
