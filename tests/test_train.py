"""Whole runs of mae.py: learning, resuming, killing, refusing, two processes, and the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import mae
from conftest import ROOT

TINY = dict(data="photos", image_size=16, decoder_embed_dim=16, epochs=2, warmup_epochs=0.5, batch_size=10)
# 40 photos: 4 steps an epoch, 8 in all
FLAGS = ["--preset=shapes"] + [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


@pytest.fixture(autouse=True)
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(common, "LOG_EVERY", 1)


@pytest.fixture
def photos(in_tmp):
    """An empty folder to run in, but for photos/: 40 small images to train on and 10 to test on."""
    images = data.synthetic_shapes("train", np.arange(50))["image"]
    for i in range(50):
        path = in_tmp / "photos" / ("train" if i < 40 else "val") / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].transpose(1, 2, 0)[:20, :24]).save(path)
    return in_tmp


def tiny(**changes):
    return mae.Config(**TINY | changes)


def checkpoint(folder, name="checkpoint.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def weights(folder):
    return checkpoint(folder)["model"]


def moments(folder):
    """AdamW's averages of the gradients: it forgives a gradient of the wrong scale, they do not."""
    return {str(i): state["exp_avg"] for i, state in checkpoint(folder)["optimizer"]["state"].items()}


def lines(folder):
    return [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def close(a, b):
    """Equal but for the order of sums. A key's bias has no effect (softmax), so its gradient is pure
    rounding error, which Adam scales up to a full step: that third of qkv.bias is left out."""
    for name, value in a.items():
        value, other = (v.unflatten(0, (3, -1))[[0, 2]] if name.endswith("qkv.bias") else v for v in (value, b[name]))
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")


def command(*argv, processes=0, **options):
    """Run mae.py as a user would, with the flags of TINY."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.run([sys.executable, *launch, str(ROOT / "mae.py"), *FLAGS, *map(str, argv)],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


# ----------------------------------------------------------------------------------------- a run
def test_default_run_learns(in_tmp):
    """A quarter of `python mae.py`: the loss falls, and the files are all there."""
    metrics = mae.main(["--epochs=2", "--batch-size=32"])
    log = lines("runs/mae-shapes")
    losses = [line["epoch_loss"] for line in log if "epoch" in line]
    assert log[0]["loss"] > 0.9 and losses[0] < 0.8 and losses[1] < 0.56 and len(losses) == 2
    keys = {f"{kind}_{name}" for kind in ("knn", "linear") for name in ("trained", "untrained", "pixels")}
    assert metrics["step"] == 624 and log[-1].keys() == {"step", "loss", "unreadable"} | keys == metrics.keys()
    assert metrics["linear_trained"] > metrics["linear_untrained"] > metrics["linear_pixels"] > 12.5
    assert metrics["knn_pixels"] > 20 and metrics["unreadable"] == 0
    about = json.load(open("runs/mae-shapes/config.json"))
    assert about["method"] == "mae" and about["config"]["embed_dim"] == 64
    grid = Image.open("runs/mae-shapes/reconstruction.png")
    assert grid.size[0] > 8 * 96 and np.asarray(grid).std() > 20


def test_recipe(photos):
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
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    for step in range(5):
        epoch, position = divmod(step, 4)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).tolist()
        images = torch.stack([dataset[epoch, i][0] for i in order[10 * position:10 * position + 10]])
        seed = int(np.random.SeedSequence((0, step)).generate_state(1)[0])
        noise = torch.rand(10, 16, generator=torch.Generator().manual_seed(seed))
        peak = 0.05 * 10 / 256                           # warm-up: half an epoch, two steps
        lr = peak * step / 2 if step < 2 else peak / 2 * (1 + np.cos(np.pi * (step - 2) / (8 - 2)))
        for group in groups:
            group["lr"] = lr
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, _, _ = model((images / 255 - mean) / std, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    close(model.state_dict(), weights("run"))


def test_exported_encoder_is_a_vit_in_timms_names(photos):
    mae.train(tiny(output="run", max_steps=1))
    encoder = torch.load("run/encoder.pt", weights_only=True)
    vit = mae.VisionTransformer(16, 4, 64, 4, 2)
    vit.load_state_dict(encoder, strict=True)
    assert {n.split(".")[0] for n in encoder} == {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}
    model = mae.build(tiny())
    model.load_state_dict(weights("run"))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(vit.encode(images), model.encode(images))


def test_what_is_written_before_anything_is_scored(photos, monkeypatch):
    """encoder.pt and the image of the last weights, which a kill may have left old or cut off."""
    mae.train(tiny(output="run"))
    good = Path("run/reconstruction.png").read_bytes()
    Path("run/reconstruction.png").write_bytes(good[:100]), Path("run/encoder.pt").unlink()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "score_encoders", stop)
    with pytest.raises(KeyboardInterrupt):
        mae.train(tiny(output="run"))
    assert Path("run/reconstruction.png").read_bytes() == good and Path("run/encoder.pt").exists()


def test_unlabelled_images_have_no_scores(photos):
    metrics = mae.train(tiny(output="run", max_steps=1, data="photos/train/a"))
    assert metrics.keys() == {"step", "loss", "unreadable"}


def test_unreadable_images_in_a_run(photos):
    Path("photos/train/a/02.png").write_text("text"), Path("photos/val/a/40.png").write_text("text")
    done = command("--workers=2", cwd=photos)
    assert done.returncode == 0 and done.stderr.count("02.png") == 1, done.stderr
    assert lines("runs/mae-photos")[-1]["unreadable"] == 2


def test_init(photos):
    mae.train(tiny(output="first", max_steps=1))
    mae.train(tiny(output="second", max_steps=1, init="first/checkpoint.pt", base_lr=0.0))
    assert same(weights("second"), weights("first"))
    mae.train(tiny(output="third", max_steps=1, init="first/encoder.pt", base_lr=0.0))
    assert torch.equal(weights("third")["norm.weight"], weights("first")["norm.weight"])
    with pytest.raises(common.UserError, match="does not fit"):
        mae.train(tiny(output="fourth", init="first/encoder.pt", patch_size=8))


# ---------------------------------------------------------------------------------------- resuming
def test_resumed_run_equals_an_undisturbed_one(photos):
    mae.train(tiny(output="whole"))
    for steps in (3, 6, 0):                              # stops in the middle of both epochs
        mae.train(tiny(output="parts", max_steps=steps))
    assert same(weights("whole"), weights("parts"))
    strip = lambda run: [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines(run) if "unreadable" not in line]
    assert strip("whole") == strip("parts")
    again = mae.train(tiny(output="parts"))              # a finished run is only measured once more
    assert again["step"] == 8 and same(weights("whole"), weights("parts"))


def test_no_resume_destroys_nothing(photos, capsys):
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


def test_no_resume_under_a_restarting_torchrun(photos, monkeypatch):
    """A restart goes on from what this launch wrote, and still sets an older run aside."""
    mae.train(tiny(output="run", max_steps=1))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this launch")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    mae.train(tiny(output="run", max_steps=2, resume=False))         # died before it wrote anything
    assert checkpoint("run.1")["step"] == 1
    mae.train(tiny(output="run", max_steps=3, resume=False))         # this launch's
    assert not Path("run.2").exists() and checkpoint("run", "checkpoint.previous.pt")["step"] == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "the next launch")
    mae.train(tiny(output="run", max_steps=1, resume=False))
    assert checkpoint("run.2")["step"] == 3


def test_accumulation_is_one_large_batch(photos):
    for accumulate in (1, 5):
        mae.train(tiny(output=f"a{accumulate}", accumulate=accumulate, max_steps=4))
    close(weights("a1"), weights("a5"))
    close(moments("a1"), moments("a5"))


def test_other_configuration_is_refused(photos):
    mae.train(tiny(output="run", max_steps=1))
    with pytest.raises(common.UserError, match="seed: 0 there, 7 here; .*mask_ratio: 0.6 there, 0.5 here.*--output NEW_FOLDER.*--no-resume"):
        mae.train(tiny(output="run", mask_ratio=0.5, seed=7))
    mae.train(tiny(output="run", max_steps=2, accumulate=2, device="cpu", save_every=1))         # these change nothing


@pytest.mark.parametrize("change, match", [
    (dict(method="other"), "method: 'other' there, 'mae' here"), (dict(steps_per_epoch=3), "steps_per_epoch: 3 there, 4 here"),
    (dict(config=dict(vars(mae.Config(**TINY)), log_every=50)), "log_every: 50 there, 'nothing' here"),         # version 1
    (dict(config=dict(vars(mae.Config(**TINY)), embed_dim=128)), "embed_dim: 128 there, 64 here"),              # an edited row
    (dict(config={k: v for k, v in vars(mae.Config(**TINY)).items() if k != "norm_pix"}), "norm_pix: 'nothing' there, True here")])
def test_another_versions_or_methods_checkpoint_is_refused(photos, change, match):
    mae.train(tiny(output="run", max_steps=1))
    torch.save(checkpoint("run") | change, "run/checkpoint.pt")
    with pytest.raises(common.UserError, match=match) as error:
        mae.train(tiny(output="run"))
    assert "\n" not in str(error.value)


def test_a_lost_log_is_said(photos, capsys):
    mae.train(tiny(output="run", max_steps=3))
    Path("run/metrics.jsonl").write_text("")
    mae.train(tiny(output="run"))
    assert "metrics.jsonl has lost lines" in capsys.readouterr().out and checkpoint("run")["step"] == 8


# ------------------------------------------------------------------------------ damaged checkpoints
def state_tensors(state):
    return state["optimizer"]["state"]


DAMAGE = {                                               # what is done to a checkpoint of step 5
    "no step": lambda s: s.pop("step"), "step -1": lambda s: s.update(step=-1), "step 1.5": lambda s: s.update(step=1.5),
    "step 10**9": lambda s: s.update(step=10 ** 9), "step as text": lambda s: s.update(step="5"), "step True": lambda s: s.update(step=True),
    "no model": lambda s: s.pop("model"), "model a list": lambda s: s.update(model=[1]), "no config": lambda s: s.pop("config"),
    "config a list": lambda s: s.update(config=[]), "no optimizer": lambda s: s.pop("optimizer"), "no tensors": lambda s: s.pop("tensors"),
    "log -1": lambda s: s.update(log_bytes=-1), "no log": lambda s: s.pop("log_bytes"),
    "too many losses": lambda s: s.update(epoch_losses=[0.5] * 3), "too few losses": lambda s: s.update(epoch_losses=[]),
    "losses as text": lambda s: s.update(epoch_losses=["x"]), "no losses": lambda s: s.pop("epoch_losses"),
    "a weight of another shape": lambda s: s["model"].update({"norm.bias": torch.zeros(3)}),
    "a weight of another type": lambda s: s["model"].update({"norm.bias": torch.zeros(64, dtype=torch.float64)}),
    "a weight that is none": lambda s: s["model"].update({"norm.bias": 1.0}), "a weight less": lambda s: s["model"].pop("norm.bias"),
    "a weight more": lambda s: s["model"].update({"x": torch.zeros(1)}), "no states": lambda s: s["optimizer"].pop("state"),
    "a state less": lambda s: state_tensors(s).pop(3), "a state more": lambda s: state_tensors(s).update({99: {"exp_avg": torch.zeros(2)}}),
    "a moment less": lambda s: state_tensors(s)[3].pop("exp_avg"), "all moments less": lambda s: [v.pop("exp_avg") for v in state_tensors(s).values()],
    "a moment of another shape": lambda s: state_tensors(s)[3].update(exp_avg=torch.zeros(2)),      # the fused kernel crashes on it
    "a moment of another type": lambda s: state_tensors(s)[3].update(exp_avg_sq=state_tensors(s)[3]["exp_avg_sq"].double()),
    "no count of steps": lambda s: state_tensors(s)[0].update(step=torch.zeros(2)), "states a list": lambda s: s["optimizer"].update(state=[])}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped at step 5 and wrote a checkpoint in each step, and the same run undisturbed."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder), patch.setattr(common, "LOG_EVERY", 1)
        images = data.synthetic_shapes("train", np.arange(40))["image"]
        Path("photos").mkdir()
        for i in range(40):
            Image.fromarray(images[i].transpose(1, 2, 0)).save(f"photos/{i:02}.png")
        mae.train(tiny(output="whole"))
        mae.train(tiny(output="run", save_every=1, max_steps=5))
    return folder


@pytest.fixture
def at_step_5(stopped, monkeypatch):
    """A copy of that run, to be damaged."""
    monkeypatch.chdir(stopped)
    subprocess.run(["rm", "-rf", "copy"]), subprocess.run(["cp", "-r", "run", "copy"])
    return stopped


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_noticed(at_step_5, capsys, damage):
    """The one before it is taken, and the run ends as if nothing had been."""
    state = checkpoint("copy")
    DAMAGE[damage](state)
    torch.save(state, "copy/checkpoint.pt")
    mae.train(tiny(output="copy", max_steps=6))
    assert re.search("checkpoint.pt is damaged or of other code .*going on from step 4 ", capsys.readouterr().out, re.S)
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
        data_start = good.index(entry.filename.encode(), entry.header_offset) + len(entry.filename)
        changed = bytearray(good)
        changed[data_start + 64 + entry.file_size // 2] ^= 16
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="checksum"):
            common.check_archive(path)
    mae.train(tiny(output="copy"))
    assert "checksum" in capsys.readouterr().out and same(weights("whole"), weights("copy"))


def test_when_no_checkpoint_can_be_read(at_step_5, capsys):
    Path("copy/checkpoint.pt").write_bytes(Path("copy/checkpoint.pt").read_bytes()[:5000])
    Path("copy/checkpoint.previous.pt").write_bytes(b"PK")
    with pytest.raises(common.UserError, match="no checkpoint in copy can be read; --output NEW_FOLDER"):
        mae.train(tiny(output="copy"))
    Path("copy/checkpoint.pt").unlink(), os.mkfifo("copy/checkpoint.pt")
    with pytest.raises(common.UserError, match="no checkpoint in copy can be read"):
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


def test_kill_at_any_moment(photos):
    """kill -9 again and again while checkpoints are written every step; then run to the end."""
    assert command("--epochs=6", "--output=whole", cwd=photos).returncode == 0
    flags = [*FLAGS, "--epochs=6", "--save-every=1", "--output=run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    path = Path("run/checkpoint.pt")
    for wait in (0.0, 0.61):
        run = subprocess.Popen([sys.executable, str(ROOT / "mae.py"), *flags],
                               env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        known = path.stat().st_mtime_ns if path.exists() else 0
        while run.poll() is None and (not path.exists() or path.stat().st_mtime_ns == known):
            time.sleep(0.005)
        time.sleep(wait)
        run.send_signal(signal.SIGKILL), run.wait()
    done = command("--epochs=6", "--save-every=1", "--output=run", cwd=photos)
    assert done.returncode == 0 and "going on from step" in done.stdout, done.stderr
    assert same(weights("whole"), weights("run"))


def test_run_that_is_not_finite_stops(photos, monkeypatch):
    """Whether the loss or, after a finite loss, the weights go first, the last checkpoint is good."""
    honest, seen = mae.reconstruction_loss, []

    def loss(prediction, target, factor):
        seen.append(1)
        value = honest(prediction, target)
        return value if len(seen) != 8 else factor(value)

    monkeypatch.setattr(mae, "save_visualization", lambda *_: None)
    for i, (factor, match) in enumerate((
            (lambda v: v * torch.inf, r"loss is inf at step 7, learning rate .*last good checkpoint stays in run0"),
            (lambda v: v + (v - v.detach()).sqrt(), r"a weight is not finite after step 7"))):
        seen.clear()
        monkeypatch.setattr(mae, "reconstruction_loss", lambda p, t: loss(p, t, factor))
        with pytest.raises(common.UserError, match=match):
            mae.train(tiny(output=f"run{i}", epochs=5, save_every=1))
        state = checkpoint(f"run{i}")
        assert state["step"] == 7 and all(torch.isfinite(v).all() for v in state["model"].values())
    seen.clear()
    seen += [1] * 7                                      # at once, right after resuming: whose fault it is, is open
    monkeypatch.setattr(mae, "reconstruction_loss", lambda p, t: loss(p, t, lambda v: v * torch.nan))
    with pytest.raises(common.UserError, match="loss is nan at step 7.*checkpoint of step 7, with which it began, may be bad") as error:
        mae.train(tiny(output="run0", epochs=5, save_every=1))
    assert "last good" not in str(error.value)


# -------------------------------------------------------------------------------- several processes
def test_two_processes_equal_one(photos):
    """Several images a process and micro-batch, into the second epoch: losses and weights of one."""
    for name, flags in (("plain", {}), ("accumulated", dict(accumulate=2))):
        one = dict(batch_size=12, max_steps=5, crop_scale=0.5, **flags)         # 3 steps an epoch
        mae.train(tiny(output=f"{name}1", **one))
        done = command(f"--output={name}2", *(f"--{k.replace('_', '-')}={v}" for k, v in one.items()),
                       processes=2, cwd=photos, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        close(weights(f"{name}1"), weights(f"{name}2"))
        close(moments(f"{name}1"), moments(f"{name}2"))
        assert done.stdout.count("peak learning rate") == 1      # the first process speaks for all
        first, second = checkpoint(f"{name}1"), checkpoint(f"{name}2")
        assert first["epoch_losses"] == pytest.approx(second["epoch_losses"], rel=1e-5)
        for key in ("knn_untrained", "linear_pixels"):
            assert lines(f"{name}1")[-1][key] == pytest.approx(lines(f"{name}2")[-1][key], rel=1e-5), key


def test_two_runs_in_one_folder(photos):
    """The second is refused; after a kill of the first, whose loader processes may live on, it is not."""
    flags = [*FLAGS, "--epochs=5000", "--warmup-epochs=1", "--output=run", "--workers=1"]
    run = subprocess.Popen([sys.executable, str(ROOT / "mae.py"), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and not Path("run/checkpoint.pt").exists():
        time.sleep(0.05)
    second = command("--epochs=5000", "--warmup-epochs=1", "--output=run", cwd=photos)
    assert second.returncode == 2 and second.stderr.strip() == "error: another run is writing to run; --output says where else"
    run.kill(), run.wait()
    third = command("--epochs=5000", "--warmup-epochs=1", "--output=run", f"--max-steps={checkpoint('run')['step'] + 1}", cwd=photos)
    assert third.returncode == 0 and "going on from step" in third.stdout, third.stderr


# --------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("argv, words", [
    (["--batchsize=9"], "did you mean --batch-size?"),
    (["--data=nowhere"], "no folder nowhere"),
    (["--data="], "--data is empty"),
    (["--data=empty"], "no readable image"),
    (["--data=texts"], "no readable image"),
    (["--data=imagenet"], "--data-root"),
    (["--patch-size=5"], "patch_size 5 does not divide image_size 32"),
    (["--decoder-num-heads=0"], "decoder_num_heads is 0"), (["--decoder-depth=-2"], "decoder_depth is -2"),
    (["--mask-ratio=0.99"], "nothing to see"),
    (["--base-lr=-1"], "base_lr is -1"), (["--base-lr=inf"], "base_lr is inf"), (["--weight-decay=-1"], "weight_decay is -1"),
    (["--accumulate=0"], "from 1 to"), (["--workers=-1"], "from 0 to"), (["--warmup-epochs=-1"], "warmup_epochs is -1"),
    (["--batch-size=33", "--accumulate=2"], "does not divide"),
    (["--batch-size=20000"], "10000 images make no batch"),
    (["--init=nothing.pth"], "no file nothing.pth"), (["--device=cuda"], "GPU"),
    (["--output=/proc/run"], "cannot write to /proc/run"), (["--output=texts/a.jpg/run"], "cannot write to texts/a.jpg/run")])
def test_a_users_mistake_is_one_line(in_tmp, capfd, argv, words):
    Path("empty").mkdir(), Path("texts").mkdir()
    Path("texts/a.jpg").write_text("hello")
    with pytest.raises(SystemExit) as stop:
        mae.main(argv)
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and error.startswith("error: ") and "\n" not in error


def test_mistake_under_torchrun_is_said_once(photos):
    done = command("--batch-size=7", processes=2, cwd=photos, timeout=120)
    assert done.returncode != 0 and len(re.findall("^error: ", done.stderr, re.M)) == 1


def test_ctrl_c(photos):
    run = subprocess.Popen([sys.executable, str(ROOT / "mae.py"), *FLAGS, "--epochs=500", "--workers=1"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # ignored in a job begun with &
    while run.poll() is None and not Path("runs/mae-photos/checkpoint.pt").exists():
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)                    # a terminal sends it to the loaders, too
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130 and "goes on from the last checkpoint" in error and "Traceback" not in error


def test_a_script_and_its_two_files_are_all_one_needs(photos):
    for name in ("mae.py", "common.py", "data.py"):
        (photos / name).write_text((ROOT / name).read_text())
    code = "import mae; print(mae.train(mae.Config(data='photos', batch_size=10, max_steps=1))['step'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=photos)
    assert done.stdout.splitlines()[-1] == "1", done.stderr
