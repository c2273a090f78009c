"""Whole runs of mae.py: learning, resuming, killing, refusing, two processes, and the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import mae
from conftest import ROOT

TINY = dict(data="photos", image_size=16, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16,
            epochs=2, batch_size=10, log_every=1)        # 40 photos: 4 steps an epoch, 8 in all

FLAGS = ["--preset=shapes"] + [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


@pytest.fixture
def photos(in_tmp):
    """An empty folder to run in, but for photos/: 40 small pictures to train on and 10 to test on."""
    drawn = common.shapes("train", np.arange(50))
    for i in range(50):
        path = in_tmp / "photos" / ("train" if i < 40 else "val") / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn["picture"][i].transpose(1, 2, 0)[:20, :24]).save(path)
    return in_tmp


def tiny(**changes):
    return mae.Config(**TINY | changes)


def weights(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["model"]


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


def test_default_run_learns(in_tmp):
    """A quarter of `python mae.py`: the loss falls, and the files are all there."""
    metrics = mae.main(["--epochs=2", "--batch-size=32"])
    lines = [json.loads(line) for line in open("runs/mae-shapes/metrics.jsonl")]
    losses = [line["epoch_loss"] for line in lines if "epoch" in line]
    assert lines[0]["loss"] > 0.9 and losses[0] < 0.8 and losses[1] < 0.56 and len(losses) == 2
    assert metrics["step"] == 624 and lines[-1]["knn_trained"] == pytest.approx(metrics["knn_trained"], abs=1e-3)
    assert metrics["knn_pixels"] > 25 and metrics["unreadable"] == 0
    config = json.load(open("runs/mae-shapes/config.json"))
    assert config["method"] == "mae" and config["config"]["embed_dim"] == 64
    picture = Image.open("runs/mae-shapes/reconstruction.png")
    assert picture.size[0] > 8 * 96 and np.asarray(picture).std() > 20


def test_exported_encoder_is_a_vit_in_timms_names(photos):
    mae.train(tiny(output="run", max_steps=1))
    encoder, whole = torch.load("run/encoder.pt", weights_only=True), weights("run")
    vit = mae.VisionTransformer(16, 4, 16, 1, 2)
    vit.load_state_dict(encoder, strict=True)
    assert {n.split(".")[0] for n in encoder} == {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}
    model = mae.build(tiny())
    model.load_state_dict(whole)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(vit.encode(images), model.encode(images))


def test_resumed_run_equals_an_undisturbed_one(photos):
    mae.train(tiny(output="whole"))
    for steps in (3, 6, 0):                              # stops in the middle of both epochs
        mae.train(tiny(output="parts", max_steps=steps))
    assert same(weights("whole"), weights("parts"))
    read = lambda run: [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    strip = lambda lines: [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines if "unreadable" not in line]
    assert strip(read("whole")) == strip(read("parts"))
    again = mae.train(tiny(output="parts"))              # a finished run is only measured once more
    assert again["step"] == 8 and same(weights("whole"), weights("parts"))
    mae.train(tiny(output="parts", max_steps=1, resume=False))
    assert torch.load("parts/checkpoint.pt", weights_only=True)["step"] == 1
    assert not Path("parts/checkpoint.previous.pt").exists() and len(read("parts")) == 2


def test_accumulation_is_one_large_batch(photos):
    for accumulate in (1, 5):
        mae.train(tiny(output=f"a{accumulate}", accumulate=accumulate, max_steps=4))
    close(weights("a1"), weights("a5"))


def test_other_configuration_is_refused(photos):
    mae.train(tiny(output="run", max_steps=1))
    with pytest.raises(common.UserError, match="mask_ratio: 0.6 there, 0.5 here; seed: 0 there, 7 here"):
        mae.train(tiny(output="run", mask_ratio=0.5, seed=7))
    mae.train(tiny(output="run", max_steps=2, log_every=9, accumulate=2))        # these change nothing


def test_damaged_checkpoint(photos, capsys):
    mae.train(tiny(output="whole"))
    mae.train(tiny(output="run", save_every=1, max_steps=5))
    path = Path("run/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:5000])
    mae.train(tiny(output="run", save_every=1, max_steps=5))
    assert re.search("checkpoint.pt is damaged.*going on from step 4 ", capsys.readouterr().out, re.S)
    assert torch.load("run/checkpoint.previous.pt", weights_only=True)["step"] == 4      # still whole
    mae.train(tiny(output="run"))
    assert same(weights("whole"), weights("run"))
    for name, content in (("checkpoint.pt", b""), ("checkpoint.previous.pt", b"PK")):
        Path("run", name).write_bytes(content)
    with pytest.raises(common.UserError, match="no checkpoint in run can be read"):
        mae.train(tiny(output="run"))


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
    for wait in (0.0, 0.61):
        run = subprocess.Popen([sys.executable, str(ROOT / "mae.py"), *flags],
                               env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        known = Path("run/checkpoint.pt").stat().st_mtime_ns if Path("run/checkpoint.pt").exists() else 0
        while run.poll() is None and (not Path("run/checkpoint.pt").exists() or Path("run/checkpoint.pt").stat().st_mtime_ns == known):
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

    for factor, match in ((lambda v: v * torch.inf, r"loss is inf at step 7, learning rate .*checkpoint stays"),
                          (lambda v: v + (v - v.detach()).sqrt(), r"a weight is not finite after step 7")):
        seen.clear()
        monkeypatch.setattr(mae, "reconstruction_loss", lambda p, t: loss(p, t, factor))
        monkeypatch.setattr(mae, "picture", lambda *_: None)
        with pytest.raises(common.UserError, match=match):
            mae.train(tiny(output="run", epochs=5, save_every=1, resume=False))
        state = torch.load("run/checkpoint.pt", weights_only=True)
        assert state["step"] == 7 and all(torch.isfinite(v).all() for v in state["model"].values())


def test_another_methods_checkpoint_or_other_data_is_refused(photos):
    mae.train(tiny(output="run", max_steps=1))
    state = torch.load("run/checkpoint.pt", weights_only=True)
    torch.save(state | {"method": "other"}, "run/checkpoint.pt")
    with pytest.raises(common.UserError, match="method: 'other' there, 'mae' here"):
        mae.train(tiny(output="run"))
    torch.save(state | {"steps_per_epoch": 3}, "run/checkpoint.pt")
    with pytest.raises(common.UserError, match="steps_per_epoch: 3 there, 4 here"):
        mae.train(tiny(output="run"))


def test_two_processes_equal_one(photos):
    """Same losses and weights as one process at the same global batch, accumulation included."""
    mae.train(tiny(output="one", max_steps=5))
    done = command("--output=two", "--max-steps=5", "--accumulate=5", processes=2, cwd=photos, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    close(weights("one"), weights("two"))
    read = lambda run: [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    for one, two in zip(read("one"), read("two"), strict=True):
        assert one["step"] == two["step"]
        for key in {"loss", "lr", "knn_untrained", "knn_pixels"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-5), key
    assert done.stdout.count("peak learning rate") == 1  # the first process speaks for all


def test_unreadable_pictures_in_a_run(photos):
    Path("photos/train/a/02.png").write_text("text")
    done = command("--workers=2", cwd=photos)
    assert done.returncode == 0 and done.stderr.count("02.png") == 1 and "1 unreadable" in done.stdout, done.stderr
    assert json.loads(open("runs/mae-photos/metrics.jsonl").readlines()[-1])["unreadable"] == 1


@pytest.mark.parametrize("argv, words", [
    (["--batchsize=9"], "did you mean --batch-size?"),
    (["--data=nowhere"], "no folder nowhere"),
    (["--data=empty"], "no readable picture"),
    (["--data=texts"], "no readable picture"),
    (["--data=imagenet"], "--data-root"),
    (["--patch-size=5"], "patch_size 5 does not divide image_size 32"),
    (["--decoder-num-heads=0"], "decoder_num_heads is 0"), (["--num-heads=-2"], "num_heads is -2"),
    (["--mask-ratio=0.99"], "nothing to see"),
    (["--embed-dim=36", "--num-heads=8"], "num_heads 8 does not divide"),
    (["--embed-dim=66", "--num-heads=2"], "multiples of 4"), (["--accumulate=0"], "at least 1"), (["--workers=-1"], "at least 0"),
    (["--batch-size=33", "--accumulate=2"], "does not divide"),
    (["--batch-size=20000"], "10000 pictures make no batch"),
    (["--init=nothing.pth"], "no file nothing.pth"),
    (["--output=/proc/run"], "cannot write to /proc/run")])
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
    os.killpg(run.pid, signal.SIGINT)                    # a terminal sends it to the workers, too
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130 and "goes on from the last checkpoint" in error and "Traceback" not in error


def test_a_script_and_common_are_all_one_needs(photos):
    for name in ("mae.py", "common.py"):
        (photos / name).write_text((ROOT / name).read_text())
    code = "import mae; print(mae.train(mae.Config(max_steps=1, knn_pictures=50))['step'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=photos)
    assert done.stdout.splitlines()[-1] == "1", done.stderr
