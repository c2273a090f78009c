"""Whole runs of mae.py: learning, resuming, killing, refusing, two processes, command line."""

import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import mae
from conftest import ROOT

TINY = dict(data="photos", image_size=16, decoder_embed_dim=16, epochs=2, warmup_epochs=0.5,
            batch_size=10)                               # 40 photos: 4 steps an epoch, 8 in all
FLAGS = ["--preset=shapes"] + [f"--{name.replace('_', '-')}={value}"
                               for name, value in TINY.items()]


@pytest.fixture(autouse=True)
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(common, "LOG_EVERY", 1)


@functools.cache
def encoded_photos():
    """50 small PNG files, drawn and packed once."""
    files = []
    for image in data.synthetic_shapes("train", np.arange(50))["image"]:
        file = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)[:20, :24]).save(file, "PNG")
        files.append(file.getvalue())
    return files


@pytest.fixture
def photos(in_tmp):
    """An empty folder to run in, but for photos/: 40 small images to train on and 10 to test on."""
    for i, packed in enumerate(encoded_photos()):
        folder = in_tmp / "photos" / ("train" if i < 40 else "val") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02}.png").write_bytes(packed)
    return in_tmp


@pytest.fixture
def unscored(monkeypatch):
    """Runs end without scores and images, for tests of their weights or files alone."""
    monkeypatch.setattr(data, "score_encoders", lambda *_: {})
    monkeypatch.setattr(mae, "save_visualization", lambda *_: None)


@pytest.fixture
def one_thread():
    """As the processes that are started here have, for results that are equal to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes):
    return mae.Config(**TINY | changes)


def checkpoint(folder, name="checkpoint.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def weights(folder):
    return checkpoint(folder)["model"]


def moments(folder):
    """AdamW's averages of the gradients: it forgives a gradient of the wrong scale, they do not."""
    states = checkpoint(folder)["optimizer"]["state"]
    return {str(i): state["exp_avg"] for i, state in states.items()}


def lines(folder):
    return [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def close(a, b):
    """Equal but for the order of sums. A key's bias has no effect (softmax), so its gradient is
    pure rounding error, which Adam scales up to a full step: that third of qkv.bias is left out."""
    for name, value in a.items():
        other = b[name]
        if name.endswith("qkv.bias"):
            value, other = (v.unflatten(0, (3, -1))[[0, 2]] for v in (value, other))
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5,
                                   msg=lambda text: f"{name}: {text}")


def start(*argv, script=ROOT / "mae.py", **options):
    """A process that runs mae.py as a user would, with the flags of TINY."""
    return subprocess.Popen([sys.executable, str(script), *FLAGS, *argv], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def wait_for_another(path: Path, process):
    """Until the process has written the file, or written it anew."""
    known = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == known):
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()


# ----------------------------------------------------------------------------------------- a run
def test_a_short_run_learns(in_tmp, fewer_shapes):
    """`python mae.py` with fewer images, larger patches and fewer epochs; the figures of the whole
    run in mae.py's docstring are measured by hand. The loss falls, the encoder learns (seeds 0 to
    2: 14 to 17 points above the untrained one), and the files are all there."""
    metrics = mae.main(["--image-size=32", "--patch-size=8", "--epochs=4"])
    log = lines("runs/mae-shapes")
    losses = [line["epoch_loss"] for line in log if "epoch" in line]
    assert log[0]["loss"] > 0.9 and losses[0] < 0.95 and losses[3] < 0.72 and len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    keys = {f"{kind}_{name}" for kind in ("knn", "linear")
            for name in ("trained", "untrained", "pixels")}
    assert metrics["step"] == 500
    assert log[-1].keys() == {"step", "loss", "unreadable"} | keys == metrics.keys()
    assert metrics["linear_trained"] > metrics["linear_untrained"] + 8
    assert metrics["linear_untrained"] > metrics["linear_pixels"] > 12.5
    assert metrics["knn_pixels"] > 20 and metrics["unreadable"] == 0
    about = json.load(open("runs/mae-shapes/config.json"))
    assert about["method"] == "mae" and about["config"]["embed_dim"] == 64
    grid = Image.open("runs/mae-shapes/reconstruction.png")
    assert grid.size[0] > 8 * 96 and np.asarray(grid).std() > 20


def test_recipe(photos, unscored):
    """Five steps of a loop written out from the paper's appendix A.1 end with the same weights."""
    mae.train(tiny(output="run", max_steps=5, crop_scale=0.5, weight_decay=0.3, base_lr=0.05))
    torch.manual_seed(0)
    model = mae.MAE(16, 4, 64, 4, 2, 16, 1, 2, mask_ratio=0.6)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert not {"pos_embed", "decoder_pos_embed"} & {n for n, _ in trained}
    groups = [{"params": [p for _, p in trained if p.ndim > 1], "weight_decay": 0.3},
              {"params": [p for _, p in trained if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    splits = data.open_data("photos", "")
    dataset = splits.pretrain.with_transform(data.augment(16, 0.5))
    imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    mean, std = imagenet.view(2, 3, 1, 1)
    for step in range(5):
        epoch, position = divmod(step, 4)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).tolist()
        batch = order[10 * position:10 * position + 10]
        images = torch.stack([dataset[epoch, i][0] for i in batch])
        seed = int(np.random.SeedSequence((0, step)).generate_state(1)[0])
        noise = torch.rand(10, 16, generator=torch.Generator().manual_seed(seed))
        peak = 0.05 * 10 / 256
        cosine = np.cos(np.pi * (step - 2) / (8 - 2))
        lr = peak * step / 2 if step < 2 else peak / 2 * (1 + cosine)     # warm-up: half an epoch
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, _, _ = model((images / 255 - mean) / std, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    close(model.state_dict(), weights("run"))


def test_exported_encoder_is_a_vit_in_timms_names(photos, unscored):
    mae.train(tiny(output="run", max_steps=1))
    encoder = torch.load("run/encoder.pt", weights_only=True)
    vit = mae.VisionTransformer(16, 4, 64, 4, 2)
    vit.load_state_dict(encoder, strict=True)
    parts = {name.split(".")[0] for name in encoder}
    assert parts == {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}
    model = mae.build(tiny())
    model.load_state_dict(weights("run"))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(vit.encode(images), model.encode(images))


def test_what_is_written_before_anything_is_scored(photos, monkeypatch):
    """The image of the last weights, also in the middle of an epoch; encoder.pt, which a kill may
    have prevented."""
    monkeypatch.setattr(data, "score_encoders", lambda *_: {})
    mae.train(tiny(output="run", max_steps=1))
    early = Path("run/reconstruction.png").read_bytes()
    mae.train(tiny(output="run"))
    assert Path("run/reconstruction.png").read_bytes() != early
    Path("run/encoder.pt").unlink()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "score_encoders", stop)
    with pytest.raises(KeyboardInterrupt):
        mae.train(tiny(output="run"))
    assert Path("run/encoder.pt").exists()


def test_unlabelled_images_have_no_scores(photos):
    metrics = mae.train(tiny(output="run", max_steps=1, data="photos/train/a"))
    assert metrics.keys() == {"step", "loss", "unreadable"}


def test_unreadable_images_in_a_run(photos, capfd):
    """Loader processes say it once, and the run goes on and counts them."""
    Path("photos/train/a/02.png").write_text("text")
    Path("photos/val/a/40.png").write_text("text")
    metrics = mae.train(tiny(output="run", workers=2))
    assert metrics["unreadable"] == 2 and metrics["step"] == 8
    assert capfd.readouterr().err.count("02.png") == 1


def test_init(photos, unscored):
    mae.train(tiny(output="first", max_steps=1))
    mae.train(tiny(output="second", max_steps=1, init="first/checkpoint.pt", base_lr=0.0))
    assert same(weights("second"), weights("first"))
    mae.train(tiny(output="third", max_steps=1, init="first/encoder.pt", base_lr=0.0))
    first, third = weights("first"), weights("third")
    assert torch.equal(third["norm.weight"], first["norm.weight"])
    with pytest.raises(common.UserError, match="does not fit"):
        mae.train(tiny(output="fourth", init="first/encoder.pt", patch_size=8))


# --------------------------------------------------------------------------------------- resuming
def test_resumed_run_equals_an_undisturbed_one(photos, capsys):
    mae.train(tiny(output="whole"))
    for steps in (3, 6, 0):                              # stops in the middle of both epochs
        mae.train(tiny(output="parts", max_steps=steps))
    assert same(weights("whole"), weights("parts"))

    def logged(run):
        rows = [line for line in lines(run) if "unreadable" not in line]
        return [{k: v for k, v in line.items() if k != "images_per_s"} for line in rows]

    assert logged("whole") == logged("parts")
    assert "these steps are done" not in capsys.readouterr().out
    again = mae.train(tiny(output="parts"))              # a finished run is only measured once more
    assert "these steps are done" in capsys.readouterr().out
    assert again["step"] == 8 and same(weights("whole"), weights("parts"))


def test_no_resume_destroys_nothing(photos, capsys, monkeypatch):
    monkeypatch.setattr(data, "score_encoders", lambda *_: {})
    mae.train(tiny(output="run", max_steps=3))
    first = checkpoint("run")
    for number in (1, 2):
        mae.train(tiny(output="run", max_steps=1, resume=False))
        assert f"the old run is now run.{number}" in capsys.readouterr().out
    assert same(checkpoint("run.1")["model"], first["model"]) and checkpoint("run.1")["step"] == 3
    assert checkpoint("run")["step"] == checkpoint("run.2")["step"] == 1
    assert not Path("run/checkpoint.previous.pt").exists() and len(lines("run")) == 2
    assert Path("run.1/metrics.jsonl").exists() and Path("run.1/reconstruction.png").exists()
    mae.train(tiny(output="new", max_steps=1, resume=False))
    assert not Path("new.1").exists()                    # nothing to set aside


def test_no_resume_under_a_restarting_torchrun(photos, unscored, monkeypatch):
    """The first start sets the older run aside, a restart goes on."""
    mae.train(tiny(output="run", max_steps=1))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    mae.train(tiny(output="run", max_steps=2, resume=False))
    assert checkpoint("run.1")["step"] == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    mae.train(tiny(output="run", max_steps=3, resume=False))
    assert not Path("run.2").exists()
    assert checkpoint("run", "checkpoint.previous.pt")["step"] == 2


def test_accumulation_is_one_large_batch(photos, unscored):
    for accumulate in (1, 5):
        mae.train(tiny(output=f"a{accumulate}", accumulate=accumulate, max_steps=4))
    close(weights("a1"), weights("a5"))
    close(moments("a1"), moments("a5"))


def test_other_configuration_is_refused(photos, unscored):
    mae.train(tiny(output="run", max_steps=1))
    message = ("seed: 0 there, 7 here; .*mask_ratio: 0.6 there, 0.5 here"
               ".*--output NEW_FOLDER.*--no-resume")
    with pytest.raises(common.UserError, match=message):
        mae.train(tiny(output="run", mask_ratio=0.5, seed=7))
    changes_nothing = dict(max_steps=2, accumulate=2, device="cpu", save_every=1)
    mae.train(tiny(output="run", **changes_nothing))


CONFIG = vars(mae.Config(**TINY))
FOREIGN = [                                              # what is in the checkpoint; what is said
    (dict(method="other"), "method: 'other' there, 'mae' here"),
    (dict(steps_per_epoch=3), "steps_per_epoch: 3 there, 4 here"),
    (dict(config=CONFIG | {"log_every": 50}), "log_every: 50 there, 'nothing' here"),  # version 1
    (dict(config=CONFIG | {"embed_dim": 128}), "embed_dim: 128 there, 64 here"),  # an edited row
    (dict(config={k: v for k, v in CONFIG.items() if k != "norm_pix"}),
     "norm_pix: 'nothing' there, True here")]


def test_another_versions_or_methods_checkpoint_is_refused(photos, unscored):
    mae.train(tiny(output="run", max_steps=1))
    good = checkpoint("run")
    for change, message in FOREIGN:
        torch.save(good | change, "run/checkpoint.pt")
        with pytest.raises(common.UserError, match=message) as error:
            mae.train(tiny(output="run"))
        assert "\n" not in str(error.value)


def test_a_lost_log_is_said(photos, unscored, capsys):
    mae.train(tiny(output="run", max_steps=3))
    Path("run/metrics.jsonl").write_text("")
    mae.train(tiny(output="run"))
    assert "metrics.jsonl has lost lines" in capsys.readouterr().out
    assert checkpoint("run")["step"] == 8


# ----------------------------------------------------------------------------- damaged checkpoints
def moments_of(state, parameter):
    return state["optimizer"]["state"][parameter]


DAMAGE = {                                               # what is done to a checkpoint of step 5
    "no step": lambda s: s.pop("step"),
    "no model": lambda s: s.pop("model"),
    "model a list": lambda s: s.update(model=[1]),
    "no config": lambda s: s.pop("config"),
    "config a list": lambda s: s.update(config=[]),
    "no optimizer": lambda s: s.pop("optimizer"),
    "no tensors": lambda s: s.pop("tensors"),
    "no log": lambda s: s.pop("log_bytes"),
    "no losses": lambda s: s.pop("epoch_losses"),
    "a weight of another shape": lambda s: s["model"].update({"norm.bias": torch.zeros(3)}),
    "a weight that is none": lambda s: s["model"].update({"norm.bias": 1.0}),
    "a weight less": lambda s: s["model"].pop("norm.bias"),
    "a weight more": lambda s: s["model"].update({"x": torch.zeros(1)}),
    "no states": lambda s: s["optimizer"].pop("state"),
    "a state more": lambda s: s["optimizer"]["state"].update({99: {"exp_avg": torch.zeros(2)}}),
    "a moment of another shape":                         # the fused kernel crashes on it
        lambda s: moments_of(s, 3).update(exp_avg=torch.zeros(2)),
    "no count of steps": lambda s: moments_of(s, 0).update(step=torch.zeros(2)),
    "states a list": lambda s: s["optimizer"].update(state=[])}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped at step 5 and wrote a checkpoint in each step, and the same run
    undisturbed."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(common, "LOG_EVERY", 1)
        Path("photos").mkdir()
        for i, packed in enumerate(encoded_photos()[:40]):
            Path(f"photos/{i:02}.png").write_bytes(packed)
        mae.train(tiny(output="whole"))
        mae.train(tiny(output="run", save_every=1, max_steps=5))
    return folder


@pytest.fixture
def at_step_5(stopped, monkeypatch, unscored):
    """A copy of that run, to be damaged."""
    monkeypatch.chdir(stopped)
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree("run", "copy")
    return stopped


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_noticed(at_step_5, capsys, damage):
    """The one before it is taken, and the run ends as if nothing had been."""
    state = checkpoint("copy")
    DAMAGE[damage](state)
    torch.save(state, "copy/checkpoint.pt")
    mae.train(tiny(output="copy", max_steps=6))
    message = "checkpoint.pt is damaged or of other code .*going on from step 4 "
    assert re.search(message, capsys.readouterr().out, re.S)
    assert checkpoint("copy", "checkpoint.previous.pt")["step"] == 4             # still whole
    if damage == "no step":
        mae.train(tiny(output="copy"))
        assert same(weights("whole"), weights("copy"))


def test_one_changed_byte_is_noticed(at_step_5, capsys):
    """torch.load does not look at the checksums: 48 of 50 such runs went on and ended elsewhere."""
    path = Path("copy/checkpoint.pt")
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [e for e in archive.infolist() if e.file_size >= 64]
    for entry in entries[::7]:
        name = entry.filename.encode()
        data_start = good.index(name, entry.header_offset) + len(name)
        changed = bytearray(good)
        changed[data_start + 64 + entry.file_size // 2] ^= 16
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="checksum"):
            common.check_archive(path)
    mae.train(tiny(output="copy"))
    assert "checksum" in capsys.readouterr().out and same(weights("whole"), weights("copy"))


def test_when_no_checkpoint_can_be_read(at_step_5):
    path = Path("copy/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:5000])
    Path("copy/checkpoint.previous.pt").write_bytes(b"PK")
    message = "no checkpoint in copy can be read; --output NEW_FOLDER"
    with pytest.raises(common.UserError, match=message):
        mae.train(tiny(output="copy"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(common.UserError, match=message):
        mae.train(tiny(output="copy"))


def test_checkpoint_executes_nothing(photos):
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("trapped",)
    Path("run").mkdir()
    torch.save({"model": Trap()}, "run/checkpoint.pt")
    with pytest.raises(common.UserError):
        mae.train(tiny(output="run"))
    with pytest.raises(common.UserError):
        mae.train(tiny(output="run2", init="run/checkpoint.pt"))
    assert not Path("trapped").exists()


def test_run_that_is_not_finite_stops(photos, unscored, monkeypatch):
    """Whether the loss or, after a finite loss, the weights go first, the last checkpoint is
    good."""
    honest = mae.reconstruction_loss
    seen = []

    def use(factor):
        """From now on the eighth loss is multiplied, or what `factor` does with it."""
        def loss(prediction, target):
            seen.append(1)
            value = honest(prediction, target)
            return factor(value) if len(seen) == 8 else value
        monkeypatch.setattr(mae, "reconstruction_loss", loss)

    inf = r"loss is inf at step 7, learning rate .*last checkpoint stays in run0"
    nan_weight = r"a weight is not finite after step 7"
    factors = (lambda value: value * torch.inf,
               lambda value: value + (value - value.detach()).sqrt())
    for i, (factor, match) in enumerate(zip(factors, (inf, nan_weight))):
        seen.clear()
        use(factor)
        with pytest.raises(common.UserError, match=match):
            mae.train(tiny(output=f"run{i}", epochs=5, save_every=1))
        state = checkpoint(f"run{i}")
        assert state["step"] == 7
        assert all(torch.isfinite(v).all() for v in state["model"].values())


# ------------------------------------------------------------------------------ other processes
def test_kill_at_any_moment(photos, unscored, one_thread):
    """kill -9 again and again while checkpoints are written every step; then run to the end.

    Meanwhile another run is refused in this folder; after a kill, whose loader processes may live
    on, it is not. The script and its two files, copied, are all that it needs."""
    for name in ("mae.py", "common.py", "data.py"):
        shutil.copy(ROOT / name, ".")
    flags = ["--epochs=6", "--save-every=1", "--output=run"]
    path = Path("run/checkpoint.pt")
    with start(*flags, "--workers=1", script="mae.py") as run:
        wait_for_another(path, run)
        run.send_signal(signal.SIGSTOP)                  # it must not end before the other one
        with pytest.raises(common.UserError, match="another run is writing to run; --output"):
            mae.train(tiny(output="run", epochs=6))
        run.kill()
    with start(*flags, script="mae.py") as run:
        wait_for_another(path, run)
        time.sleep(0.61)
        run.kill()
    last = start(*flags, script="mae.py")
    printed, errors = last.communicate(timeout=120)
    assert last.returncode == 0 and "going on from step" in printed, errors
    assert "linear probe, 2 classes, 10 test images: " in printed
    mae.train(tiny(output="whole", epochs=6))
    assert same(weights("whole"), weights("run"))


def test_ctrl_c(photos):
    """A terminal sends it to the loader processes, too."""
    run = start("--epochs=500", "--workers=1", start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # ignored in a
    wait_for_another(Path("runs/mae-photos/checkpoint.pt"), run)                # job begun with &
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130 and "goes on from the last checkpoint" in error
    assert "Traceback" not in error


PROCESSES = {                                            # 3 steps an epoch, into the second one
    "plain": dict(batch_size=12, max_steps=5, crop_scale=0.5),
    "accumulated": dict(batch_size=12, max_steps=5, crop_scale=0.5, accumulate=2)}


def test_two_processes_equal_one(photos):
    """Several images a process and micro-batch, into the second epoch: losses and weights of one.
    One torchrun makes both runs, and then a mistake, which is said once."""
    Path("both.py").write_text(f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
import common, mae
common.LOG_EVERY = 1
for name, changes in {PROCESSES!r}.items():
    mae.train(mae.Config(output=name + "2", **{TINY!r} | changes))
sleep = time.sleep
time.sleep = lambda seconds: sleep(20 * seconds)     # on a busy machine torchrun ends them late
mae.main([*{FLAGS!r}, "--batch-size=7"])
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, "both.py"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    for name, changes in PROCESSES.items():
        assert Path(f"{name}2/encoder.pt").exists(), done.stderr[-3000:]
        mae.train(tiny(output=f"{name}1", **changes))
        close(weights(f"{name}1"), weights(f"{name}2"))
        close(moments(f"{name}1"), moments(f"{name}2"))
        one, two = checkpoint(f"{name}1"), checkpoint(f"{name}2")
        assert one["epoch_losses"] == pytest.approx(two["epoch_losses"], rel=1e-5)
        for key in ("knn_untrained", "linear_pixels"):
            ours, theirs = lines(f"{name}1")[-1][key], lines(f"{name}2")[-1][key]
            assert ours == pytest.approx(theirs, rel=1e-5), key
    assert done.stdout.count("peak learning rate") == 2  # the first process speaks for all
    mistakes = re.findall("^error: .*", done.stderr, re.M)
    assert done.returncode != 0 and len(mistakes) == 1, done.stderr[-3000:]
    assert "--batch-size 7 " in mistakes[0]


# ----------------------------------------------------------------------------------- command line
MISTAKES = [
    (["--batchsize=9"], "unrecognized arguments: --batchsize=9"),
    (["--data=nowhere"], "no folder nowhere"),
    (["--data="], "--data is empty"),
    (["--data=empty"], "no readable image"),
    (["--data=texts"], "no readable image"),
    (["--data=imagenet"], "--data-root"),
    (["--patch-size=5"], "patch_size 5 does not divide image_size 16"),
    (["--decoder-num-heads=0"], "decoder_num_heads is 0"),
    (["--decoder-depth=-2"], "decoder_depth is -2"),
    (["--mask-ratio=0.99"], "nothing to see"),
    (["--base-lr=-1"], "base_lr is -1"),
    (["--base-lr=inf"], "base_lr is inf"),
    (["--weight-decay=-1"], "weight_decay is -1"),
    (["--accumulate=0"], "from 1 to"),
    (["--workers=-1"], "from 0 to"),
    (["--warmup-epochs=-1"], "warmup_epochs is -1"),
    (["--batch-size=33", "--accumulate=2"], "does not divide"),
    (["--batch-size=20000"], "40 images make no batch"),
    (["--init=nothing.pth"], "no file nothing.pth"),
    (["--device=cuda"], "GPU"),
    (["--output=/proc/run"], "cannot write to /proc/run"),
    (["--output=texts/a.jpg/run"], "cannot write to texts/a.jpg/run")]


@pytest.mark.parametrize("argv, words", MISTAKES)
def test_a_users_mistake_is_one_line(photos, capfd, argv, words):
    Path("empty").mkdir()
    Path("texts").mkdir()
    Path("texts/a.jpg").write_text("hello")
    with pytest.raises(SystemExit) as stop:
        mae.main(FLAGS + argv)
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error
    assert error.startswith("error: ") and "\n" not in error
