"""common.py: flags and their limits, schedule, seeds, files of weights."""

import argparse
import multiprocessing
import os
import pathlib
import time
from dataclasses import dataclass, fields, replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

import common
import mae
from conftest import fill, golden

MISC = golden("misc")


# -------------------------------------------------------------------------- schedule and seeds
def test_learning_rate():
    figures = MISC["cosine_lr"]
    for epoch, lr in figures["at_epoch"].items():
        got = common.learning_rate(float(epoch), figures["warmup_epochs"], figures["epochs"],
                                   figures["lr"], figures["min_lr"])
        assert got == pytest.approx(lr, rel=1e-6)
    points = [common.learning_rate(e, 2, 10, 1.0) for e in (0, 0.5, 1, 2, 6, 10)]
    assert points == pytest.approx([0, 0.25, 0.5, 1, 0.5, 0])
    line = [common.learning_rate(e, 2, 10, 1.0, 0.2, "linear") for e in (0, 1, 2, 4, 10)]
    assert line == pytest.approx([0, 0.5, 1, 0.8, 0.2])


def test_set_lr():
    """The peak is base_lr * batch_size / 256, and a group's scale counts."""
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr_scale": 0.5}])
    cfg = mae.Config(base_lr=0.2, batch_size=128, epochs=10, warmup_epochs=2)
    for step, lr in ((0, 0), (4, 0.04), (10, 0.1), (30, 0.05), (50, 0)):
        assert common.set_lr(optimizer, cfg, step, 5) == pytest.approx(lr)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([lr, lr / 2])
    assert common.set_lr(optimizer, cfg, 50, 5, minimum=0.01) == pytest.approx(0.01)


def test_noise_is_cut_from_one_draw(monkeypatch):
    cfg = mae.Config(batch_size=12)
    whole = common.mask_noise(cfg, 5, 7, "cpu")[0]
    for processes, accumulate in ((2, 1), (3, 2), (1, 4)):
        parts = []
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            part = common.mask_noise(replace(cfg, accumulate=accumulate), 5, 7, "cpu")
            parts.append(part.flatten(0, 1))
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)
    assert not torch.equal(common.mask_noise(cfg, 6, 7, "cpu")[0], whole)
    assert not torch.equal(common.mask_noise(replace(cfg, seed=1), 5, 7, "cpu")[0], whole)


def test_parameter_groups():
    model = mae.build(mae.Config())
    decayed, others = common.parameter_groups(model, 0.3, ("cls_token",))
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0

    def inside(name, group):
        return any(p is model.get_parameter(name) for p in group["params"])

    assert inside("blocks.0.mlp.fc1.weight", decayed) and inside("mask_token", decayed)
    assert inside("blocks.0.mlp.fc1.bias", others) and inside("norm.weight", others)
    assert inside("cls_token", others)
    assert not inside("pos_embed", decayed) and not inside("pos_embed", others)     # frozen


def test_bf16_only_where_it_is_native(monkeypatch):
    """T4, V100 and RTX 20 emulate bf16: torch says that they support it unless it is asked."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: asked.append(1) or including_emulation)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: enabled)
    assert common.autocast(torch.device("cuda"), "auto") is False and asked
    assert common.autocast(torch.device("cuda"), "bf16") is True
    assert common.autocast(torch.device("cpu"), "auto") is False
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert common.autocast(torch.device("cpu"), "auto", 192) is True
    assert common.autocast(torch.device("cpu"), "auto", 191) is False
    assert common.autocast(torch.device("cpu"), "fp32", 192) is False
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert common.autocast(torch.device("cpu"), "auto", 192) is False


def test_compiled_by_default_on_gpus_but_for_shapes():
    gpu = torch.device("cuda")
    assert common.wants_compile(mae.Config(data="imagenet"), gpu)
    assert not common.wants_compile(mae.Config(data="imagenet"), torch.device("cpu"))
    assert not common.wants_compile(mae.Config(), gpu)
    assert common.wants_compile(mae.Config(compile=True), gpu)
    assert not common.wants_compile(mae.Config(data="imagenet", compile=False), gpu)


def test_without_a_compiler(capfd):
    class InductorError(RuntimeError):
        pass

    with pytest.raises(SystemExit) as stop, common.command_line():
        raise InductorError("No working C++ compiler found\nin config: None")
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("error: the model cannot be compiled (No working C++ compiler")
    assert "--no-compile" in error


# ---------------------------------------------------------------------------------------- flags
def parse(*argv):
    return common.parse_config(mae.Config, mae.PRESETS, argv)


def test_flag_over_preset_over_default():
    assert parse() == replace(mae.Config(), preset="shapes")
    assert parse("--data", "cifar10").patch_size == 4
    assert parse("--data", "cifar10", "--patch-size", "2").patch_size == 2
    assert parse("--data", "/some/folder").preset == "folder"
    assert parse("--data", "/x/y").output == "runs/mae-y"
    assert parse("--data", "/some/folder", "--preset", "cifar10").image_size == 32
    assert parse("--mask_ratio", "0.5", "--no-norm-pix", "--base_lr=1").norm_pix is False
    assert parse("--model", "large").embed_dim == 1024
    assert parse().compile is None
    assert parse("--compile").compile is True
    assert parse("--no-compile").compile is False


@pytest.mark.parametrize("argv, match", [
    (["--batchsize", "3"], "unrecognized arguments: --batchsize 3"), (["--epochs", "x"], "epochs"),
    (["--model", "giant"], "giant"), (["--preset", "none"], "imagenet"), (["extra"], "extra"),
    (["--patch-size", "5"], "5 does not divide image_size"), (["--data", ""], "--data is empty"),
    (["--decoder-embed-dim", "30", "--decoder-num-heads", "3"], "multiple of 4"),
    (["--decoder-embed-dim", "36", "--decoder-num-heads", "8"], "8 does not divide"),
    (["--image-size", "10000000"], "image_size is 10000000"), (["--image-size", "-32"], "from 1"),
    (["--seed", str(2 ** 64)], "seed"), (["--crop-scale", "0"], "crop_scale"),
    (["--crop-scale", "2"], "crop_scale"), (["--mask-ratio", "nan"], "mask_ratio is nan"),
    (["--warmup-epochs", "6"], "less than epochs, 6"), (["--epochs", "0"], "epochs is 0")])
def test_wrong_flags(argv, match):
    with pytest.raises(common.UserError, match=match):
        parse(*argv)


@pytest.mark.parametrize("name", ["mae", "amt", "supmim", "maskdistill", "dtm", "flip", "evaluate"])
def test_every_number_is_limited_and_finite(name):
    """Each number of each script has limits, and nan, inf and what lies beyond them are refused."""
    script = __import__(name)
    hints = get_type_hints(script.Config)
    numbers = [f.name for f in fields(script.Config)
               if {int, float} & {hints[f.name], *get_args(hints[f.name])}]
    assert set(numbers) - common.LIMITS.keys() == set() and len(numbers) > 10
    cfg = script.Config()
    for number in numbers:
        least, most = common.LIMITS[number]
        kind = float if float in {hints[number], *get_args(hints[number])} else int
        wrong = [kind(least - 1), kind(most + 1)] + [np.nan, np.inf, -np.inf] * (kind is float)
        for value in wrong:
            with pytest.raises(common.UserError, match=f"{number} "):
                replace(cfg, **{number: value})


def test_warmup_that_does_not_fit(capsys):
    """A preset's is shortened to a tenth of the run, which is said; an explicit one is refused."""
    assert parse("--data", "cifar10", "--epochs", "10").warmup_epochs == 1.0
    assert "warmup_epochs 20 does not fit 10 epochs: 1 instead" in capsys.readouterr().out
    assert parse("--data", "cifar10", "--epochs", "21").warmup_epochs == 20
    assert capsys.readouterr().out == ""
    with pytest.raises(common.UserError, match="warmup_epochs is 20"):
        parse("--data", "cifar10", "--epochs", "10", "--warmup-epochs", "20")


def test_help_has_a_line_and_a_default_for_every_flag(capsys):
    with pytest.raises(SystemExit):
        common.parse_config(mae.Config, mae.PRESETS, ["--help"], mae.__doc__)
    text = capsys.readouterr().out
    for name in mae.Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert text.count("(default:") == len(mae.Config.__dataclass_fields__) and "2111.06377" in text


def test_batch_that_does_not_divide(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = "--batch-size 30.*2 processes x --accumulate 4.*--batch-size 32"
    with pytest.raises(common.UserError, match=words):
        common.plan_steps(mae.Config(batch_size=30, accumulate=4), 1000)
    with pytest.raises(common.UserError, match="20 images"):
        common.plan_steps(mae.Config(), 20)


def test_device(monkeypatch):
    assert common.init_distributed(mae.Config()).type == "cpu"
    for kind in ("cuda", "mps"):                         # neither is here
        with pytest.raises(common.UserError, match="--device"):
            common.init_distributed(mae.Config(device=kind))


# -------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("error, status, line", [
    (common.UserError("Traceback of a loader process\n  File x\ncommon.UserError: what it said"),
     2, "error: what it said"),
    (MemoryError("9 GiB"), 2, "error: out of memory (9 GiB); a smaller --batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory.\nMore"),
     2, "error: out of memory (CUDA out of memory.); a smaller"),
    (KeyboardInterrupt(), 130, "stopped; the same command")])
def test_what_the_user_can_mend_is_one_line(capfd, error, status, line):
    with pytest.raises(SystemExit) as stop:
        with common.command_line():
            raise error
    printed = capfd.readouterr().err.strip()
    assert stop.value.code == status and printed.startswith(line) and "\n" not in printed


def test_a_cpu_without_memory_is_one_line(capfd):
    with pytest.raises(SystemExit):
        with common.command_line():
            torch.empty(2 ** 60)
    assert capfd.readouterr().err.startswith("error: out of memory (")


def test_the_first_process_speaks_first(monkeypatch, capfd):
    """The others wait: torchrun ends them if the first process has failed; if it has not, they say
    it."""
    slept = []
    monkeypatch.setattr(common.time, "sleep", slept.append)
    for local_rank in ("0", "3"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit):
            with common.command_line():
                raise common.UserError("out of GPUs")
        assert capfd.readouterr().err == "error: out of GPUs\n"
    assert slept == [5]


def test_a_number_or_a_help_that_is_new():
    """Who adds a setting need not know LIMITS; what is not finite is refused all the same."""
    @dataclass
    class Config(common.RunConfig):
        temperature: float = 1.0

        def __post_init__(self):
            common.check(self)

    def parse(*argv):
        return common.parse_config(Config, {"shapes": {}}, argv)

    assert parse("--temperature", "-3").temperature == -3
    with pytest.raises(common.UserError, match="temperature is nan"):
        parse("--temperature", "nan")


@pytest.mark.parametrize("error", [OSError("no such file"), RuntimeError("shapes"), ValueError()])
def test_a_fault_of_the_code_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        with common.command_line():
            raise error


def test_writing_to(tmp_path):
    with pytest.raises(common.UserError, match="cannot write to .*No space left.*--output"):
        with common.writing_to(tmp_path):
            raise OSError(28, "No space left on device")
    with pytest.raises(common.UserError, match="cannot write to /proc/x"):
        common.save_atomic({}, pathlib.Path("/proc/x"))


# ----------------------------------------------------------------------------- files of weights
SMALL = dict(image_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=4,
             decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4)
DECODER = mae.MAE.pretrain_only


@pytest.fixture(scope="module")
def source():
    return fill(mae.MAE(**SMALL))


def encoder_of(model):
    return {n: v for n, v in model.state_dict().items() if not n.startswith(DECODER)}


@pytest.mark.parametrize("prefix, key", [
    ("", ""), ("module.", "model"), ("_orig_mod.", "state_dict"), ("model.", ""),
    ("backbone.", "teacher"), ("encoder.", "model"), ("_orig_mod.module.encoder.", "state_dict")])
def test_prefixes_and_keys(tmp_path, source, prefix, key):
    state = {prefix + name: value for name, value in source.state_dict().items()}
    saved = {key: state, "student": {"x": torch.zeros(1)}} if key else state
    torch.save(saved, tmp_path / "file.pth")
    model = mae.MAE(**SMALL)
    assert common.load_weights(model, tmp_path / "file.pth") == {}
    assert all(torch.equal(v, source.state_dict()[n]) for n, v in model.state_dict().items())


def test_optional_parts(tmp_path, source, capsys):
    """They are all there, or wholly missing, or wholly left out; anything else is refused."""
    path = tmp_path / "file.pth"
    full = source.state_dict()
    encoder = encoder_of(source)
    torch.save(encoder, path)
    model = mae.MAE(**SMALL)
    fresh = model.mask_token.clone()
    common.load_weights(model, path, optional=DECODER)
    assert torch.equal(model.mask_token, fresh) and torch.equal(model.cls_token, source.cls_token)
    assert "missing from it 32 [decoder_blocks.*.attn.proj.bias" in capsys.readouterr().out
    torch.save(full, path)
    vit = mae.VisionTransformer(32, 4, 48, 3, 4)
    left_out = common.load_weights(vit, path, optional=DECODER)
    assert left_out.keys() == full.keys() - encoder.keys()
    assert torch.equal(vit.cls_token, source.cls_token)
    one_less = {n: v for n, v in full.items() if n != "mask_token"}
    one_more = full | {"decoder_blocks.2.attn.proj.bias": torch.zeros(32)}
    without_first = dict(list(encoder.items())[1:])
    other_size = full | {"cls_token": torch.zeros(1, 1, 4)}
    for wrong, name in ((one_less, "mask_token"), (one_more, "decoder_blocks"),
                        (without_first, "cls_token"),
                        (full | {"head.weight": torch.zeros(1)}, "head.weight"),
                        (other_size, "of another size 1 .cls_token")):
        torch.save(wrong, path)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(common.UserError, match=f"does not fit: .*{name}"):
            common.load_weights(model, path, optional=DECODER)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))        # untouched
    torch.save(encoder, path)
    with pytest.raises(common.UserError, match="missing 32"):                # without `optional`
        common.load_weights(model, path)


def test_a_parameter_without_dimensions(tmp_path):
    """As CLIP's logit_scale."""
    module = torch.nn.ParameterDict({"logit_scale": torch.tensor(2.0)})
    torch.save({"logit_scale": torch.tensor(3.0)}, tmp_path / "file.pth")
    common.load_weights(module, tmp_path / "file.pth")
    assert module["logit_scale"] == 3


def test_two_models_in_one_file(tmp_path, source):
    state = source.state_dict()
    torch.save(state | {f"module.{n}": v for n, v in state.items()}, tmp_path / "file.pth")
    with pytest.raises(common.UserError, match="twice"):
        common.load_weights(mae.MAE(**SMALL), tmp_path / "file.pth")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(tmp_path, source, value):
    state = {n: v.clone() for n, v in source.state_dict().items()}
    state["norm.bias"][3] = value
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(common.UserError, match="not all of norm.bias is finite"):
        common.load_weights(mae.MAE(**SMALL), tmp_path / "file.pth")


def test_position_tables_are_resized(tmp_path, source, capsys):
    torch.save(source.state_dict(), tmp_path / "file.pth")
    larger = mae.MAE(**SMALL | dict(image_size=48))
    common.load_weights(larger, tmp_path / "file.pth")
    assert torch.equal(larger.pos_embed[:, 0], source.pos_embed[:, 0])
    assert larger.pos_embed.shape[1] == 145
    assert capsys.readouterr().out.count("resized to [1, 145, ") == 2
    table = torch.randn(1, 1 + 14 * 14, 8)
    assert common.resize_positions(table, (14, 14)) is table
    wide = common.resize_positions(table, (10, 20))
    assert wide.shape == (1, 201, 8) and (wide[:, 0] == table[:, 0]).all()
    assert common.resize_positions(wide, (10, 20)) is wide
    own = torch.randn(1, 1 + 2 * 8, 8)                   # of a grid of 2 x 8, no 4 x 4
    assert common.resize_positions(own, (2, 8)) is own
    relative = torch.randn(27 * 27 + 3, 2)
    assert common.resize_relative_positions(relative, (14, 14)) is relative
    assert common.resize_relative_positions(relative, (4, 6)).shape == (7 * 11 + 3, 2)
    assert torch.equal(common.resize_relative_positions(relative, (4, 6))[-3:], relative[-3:])


@pytest.mark.parametrize("rows, match", [
    (64, "63 rows besides the class token's, which are no square grid"), (60, "no square grid"),
    (1, "no square grid")])
def test_positions_of_no_grid(tmp_path, source, rows, match):
    state = source.state_dict() | {"pos_embed": torch.zeros(1, rows, 48)}
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(common.UserError, match=match):
        common.load_weights(mae.MAE(**SMALL), tmp_path / "file.pth")


def test_what_official_files_hold_besides(tmp_path, source):
    """The flags of the run, which torch.load alone refuses."""
    extras = {"args": argparse.Namespace(lr=1, name="x"), "epoch": 7}
    torch.save({"model": source.state_dict()} | extras, tmp_path / "file.pth")
    with pytest.raises(Exception):
        torch.load(tmp_path / "file.pth", weights_only=True)
    saved, _ = common.read_weights(tmp_path / "file.pth")
    assert saved["args"].lr == 1 and saved["epoch"] == 7


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")         # CLIP is published as such
@pytest.mark.parametrize("old_format", [False, True])
def test_a_file_executes_nothing(in_tmp, old_format):
    torch.save({"model": Trap()}, "file.pth", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(common.UserError, match="holds a posix.mkdir; only tensors"):
        common.read_file("file.pth")
    torch.save({"model": {"x": torch.zeros(2)}, "callback": argparse.ArgumentParser}, "file.pth")
    with pytest.raises(common.UserError, match="holds a argparse.ArgumentParser"):
        common.read_file("file.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), "script.pt")
    with pytest.raises(common.UserError, match="TorchScript, a program"):
        common.read_file("script.pt")
    import hashlib
    digest = hashlib.sha256(pathlib.Path("script.pt").read_bytes()).hexdigest()
    assert common.read_file("script.pt", (digest,)).keys() == {"weight", "bias"}
    assert not pathlib.Path("trapped").exists()


@pytest.mark.parametrize("content, match", [
    (b"version https://git-lfs.github.com/spec/v1", "it begins with b'version https://git"),
    (b"<!DOCTYPE html><html>", "no file of weights: it begins with b'<!DOCTYPE html>"),
    (b"", "no file of weights"), (b"not a checkpoint", "it begins with b'not a checkpoint'$"),
    (b"PK\3\4 cut off", "no file of weights")])
def test_files_that_are_something_else(tmp_path, content, match):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(common.UserError, match=match) as error:
        common.read_file(tmp_path / "file.pth")
    assert "\n" not in str(error.value)


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(common.UserError, match="no file"):
            common.read_file(path)


def test_one_changed_byte_is_noticed(tmp_path, source):
    """torch.load does not look at the checksums; older files have none and are read as before."""
    path = tmp_path / "file.pth"
    torch.save(source.state_dict(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(common.UserError, match="checksum of .* is wrong"):
        common.read_file(path)
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
    assert common.read_file(path).keys() == source.state_dict().keys()


def test_safetensors(tmp_path, source):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"\0" * 100)
    try:
        from safetensors.torch import save_file
    except ImportError:
        with pytest.raises(common.UserError, match="pip install safetensors"):
            common.read_file(path)
        return
    with pytest.raises(common.UserError, match="no file of weights"):
        common.read_file(path)
    save_file(source.state_dict(), path)
    model = mae.MAE(**SMALL)
    common.load_weights(model, path)
    assert torch.equal(model.cls_token, source.cls_token)


def hold_lock(folder, locked):
    lock = common.lock_folder(folder)
    locked.set()
    time.sleep(60)
    lock.close()


def test_lock(tmp_path):
    """A second process is refused while the first one lives, however that ends."""
    fork = multiprocessing.get_context("fork")
    locked = fork.Event()
    holder = fork.Process(target=hold_lock, args=(tmp_path, locked))
    holder.start()
    assert locked.wait(timeout=60)
    with pytest.raises(common.UserError, match="another run is writing to"):
        common.lock_folder(tmp_path)
    holder.kill()
    holder.join()
    common.lock_folder(tmp_path).close()
