"""Do the tests notice? Run by hand: `python tests/measure/planted.py [FILE.py ...]`.

Each fault is one piece of text, replaced in a copy of the project; the tests beside it are run there and must
fail. Who adds a feature adds its faults. The table at the end says how many were caught; exit status 1 if not all.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
COMMON, DATA, MAE, TRAIN = (f"tests/test_{name}.py" for name in ("common", "data", "mae", "train"))

# file: (what, text, its replacement, tests to run: a file, or a file and words for pytest's -k)
FAULTS = {
    "mae.py": [
        ("the most noise is visible", "order = noise.argsort(dim=1)  ", "order = (-noise).argsort(dim=1)", f"{MAE} golden"),
        ("biased variance in the target", "var = patches.var(dim=-1, keepdim=True)                                    # (B, M, 1)\n    return (patches",
         "var = patches.var(dim=-1, keepdim=True, unbiased=False)\n    return (patches", MAE),
        ("positions of rows and columns swapped", "[np.sin(column_angle), np.cos(column_angle), np.sin(row_angle), np.cos(row_angle)]",
         "[np.sin(row_angle), np.cos(row_angle), np.sin(column_angle), np.cos(column_angle)]", MAE),
        ("channel first within a patch", "x = x.permute(0, 2, 4, 3, 5, 1)  ", "x = x.permute(0, 2, 4, 1, 3, 5)  ", MAE),
        ("mask tokens without their own positions", "position_ids = torch.cat([visible, masked], dim=1) + 1  ",
         "position_ids = torch.cat([visible, visible[:, :1].expand_as(masked)], dim=1) + 1  ", MAE),
        ("no position for visible patches", "x = self.patch_embed(patches) + pos  ", "x = self.patch_embed(patches)  ", MAE),
        ("AdamW's second beta", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)", f"{TRAIN} recipe"),
        ("gradients are not cleared", "        optimizer.zero_grad()\n", "", f"{TRAIN} recipe"),
        ("the loss is not divided", "(loss / cfg.accumulate).backward()", "loss.backward()", f"{TRAIN} accumulation"),
        ("the image of the last weights is not drawn again", "    if common.rank() == 0:                               # --max",
         "    if False:                                            # --max", f"{TRAIN} before_anything"),
    ],
    "common.py": [
        ("masks dealt to the wrong process", "return noise[:, :, rank()]", "return noise[:, :, world_size() - 1 - rank()]", f"{TRAIN} processes"),
        ("masks do not depend on the seed", "seed = derive_seed(cfg.seed, step)", "seed = derive_seed(step)", f"{COMMON} noise"),
        ("warm-up is left out", "    if step < warmup:\n        return peak * step / warmup\n", "    if step < 0:\n        return 0.0\n", f"{COMMON} rate"),
        ("the rate is not scaled with the batch", "peak = cfg.base_lr * cfg.batch_size / 256\n    warmup", "peak = cfg.base_lr\n    warmup", COMMON),
        ("biases are decayed", "parameter.ndim > 1 and name not in undecayed", "name not in undecayed", f"{TRAIN} recipe"),
        ("gradients are summed in the first micro-batch", "i < accumulate - 1", "i > 0", f"{TRAIN} processes"),
        ("checksums are not looked at", "damaged = archive.testzip()", "damaged = None", TRAIN + " changed_byte"),
        ("shapes of the optimizer's state are not looked at", "if found[key].shape != value.shape or found[key].dtype != value.dtype:",
         "if key[0] == 'model' and found[key].shape != value.shape:", f"{TRAIN} damaged"),
        ("a damaged checkpoint pushes out the good one", "if self.damaged:  ", "if False:  ", f"{TRAIN} damaged"),
        ("no lock", "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", f"{COMMON} lock"),
        ("--no-resume destroys", "os.rename(self.folder, free)", "import shutil; shutil.rmtree(self.folder)", f"{TRAIN} no_resume"),
        ("nan passes the limits", "if not least <= value <= most:", "if value < least or value > most:", f"{COMMON} limited"),
        ("NaN weights are loaded", "if value.is_floating_point() and not value.isfinite().all():", "if False:", f"{COMMON} finite"),
        ("half of an optional part may be missing", "        if any(name.startswith(tuple(optional)) for name in other):", "        if False:", f"{COMMON} optional"),
        ("every OSError is one line", "    except UserError as error:\n        # one", "    except (UserError, OSError) as error:\n        # one", f"{COMMON} traceback"),
        ("the bad checkpoint is called good", "if self.first_step and not self.saved:", "if False:", f"{TRAIN} finite"),
    ],
    "data.py": [
        ("crops do not depend on the epoch", "torch.default_generator.manual_seed(common.derive_seed(self.seed, epoch, index))",
         "torch.default_generator.manual_seed(common.derive_seed(self.seed, 0, index))", f"{DATA} crops"),
        ("crops do not depend on the seed", "torch.default_generator.manual_seed(common.derive_seed(self.seed, epoch, index))",
         "torch.default_generator.manual_seed(common.derive_seed(0, epoch, index))", f"{DATA} crops"),
        ("the order is that of the first epoch", "self.sampler.set_epoch(epoch)", "self.sampler.set_epoch(0)", f"{DATA} order"),
        ("a resumed run starts with the first batch", "self.micro_batches = range(first_step * cfg.accumulate,", "self.micro_batches = range(0 * cfg.accumulate,", f"{DATA} order"),
        ("no flip", "steps = [crop, v2.RandomHorizontalFlip()]", "steps = [crop]", f"{DATA} augmentation"),
        ("16 bits are clipped", "gray = torch.from_numpy((values >> 8).astype(np.uint8))", "gray = torch.from_numpy(values.clip(0, 255).astype(np.uint8))", DATA),
        ("stand-ins in a row", "index = int(random.randint(len(self)))", "index = (index + 1) % len(self)", f"{DATA} stand_ins"),
        ("sizes in headers are not looked at", "            check_size(*jpeg_size(data))\n", "", f"{DATA} refused"),
        ("training images are tested on", "test = ImageDataset(files[held_out], labels[held_out], seed)", "test = ImageDataset(files, labels, seed)", f"{DATA} tenth"),
        ("links are listed again and again", "        if real in seen:\n            continue\n", "", f"{DATA} links"),
        ("k-NN without a temperature", "((similarity - 1) / temperature).exp()", "(similarity - 1).exp()", f"{DATA} knn"),
        ("the penalty is chosen on what was fitted", "gram_rest = gram - (x_held.T @ x_held).cpu().double()\n    moment_rest = moment - (x_held.T @ y_held).cpu().double()",
         "gram_rest, moment_rest = gram, moment", f"{DATA} probe"),
        ("the wrong standard deviation", "STD = (0.229, 0.224, 0.225)", "STD = (0.5, 0.5, 0.5)", f"{TRAIN} recipe"),
        ("a loader's end is a traceback", 're.search(r"worker \\(pid|shared memory|No space left", str(error))', "False", f"{DATA} loader"),
    ],
    "amt.py": [
        ('no Gumbel noise', 'scores = -(-noise.log()).log()  ',
         'scores = 0 * noise  ', 'tests/test_amt.py without_replacement'),
        ('no logarithm of the attention', 'attention.clamp(min=1e-6).log()',
         'attention', 'tests/test_amt.py without_replacement'),
        ('as many thrown as should be masked', 'return order[:, :masked], order[:, masked:masked + thrown], order[:, masked + thrown:]',
         'return order[:, thrown:masked + thrown], order[:, :thrown], order[:, masked + thrown:]', 'tests/test_amt.py golden'),
        ('the ratios are rounded to the nearest', 'masked = int(units * mask_ratio + 1e-6)',
         'masked = round(units * mask_ratio)', 'tests/test_amt.py counts'),
        ('heads are averaged before they are stretched', '    attention = attention - attention.amin(dim=2, keepdim=True)  ',
         '    attention = attention.mean(dim=1, keepdim=True)\n    attention = attention - attention.amin(dim=2, keepdim=True)  ', 'tests/test_amt.py map_is'),
        ("attention without the block's norm", 'x = last.norm1(x)',
         'x = x + 0', 'tests/test_amt.py map_is'),
        ('maps do not follow the flip', 'column = torch.where(flipped > 0, 1 - column, column)',
         'column = torch.where(flipped > 2, 1 - column, column)', 'tests/test_amt.py flip'),
        ('rows and columns of a map are swapped', 'places = 2 * torch.stack([x, y], dim=3) - 1',
         'places = 2 * torch.stack([y, x], dim=3) - 1', 'tests/test_amt.py follows_crop'),
        ('maps of crops', 'transform=squeeze, rows=rows)',
         'transform=None, rows=rows)', 'tests/test_amt.py test_refresh'),
        ('unreadable images shift the maps', 'maps[read] = ',
         'maps[:len(read)] = ', 'tests/test_amt.py unreadable'),
        ('maps are not saved', '{"maps": maps})',
         '{})', 'tests/test_amt.py resumed'),
        ('refreshes are counted from epoch 0', 'since = epoch - cfg.attention_from',
         'since = epoch', 'tests/test_amt.py when_maps'),
        ('the masking begins an epoch late', 'if epoch < cfg.attention_from:',
         'if epoch <= cfg.attention_from:', 'tests/test_amt.py phases'),
        ("SimMIM's loss is squared", 'return (prediction.float() - target).abs().mean()',
         'return (prediction.float() - target).square().mean()', 'tests/test_amt.py thrown_patches'),
        ("SimMIM's positions are fixed", '        self.pos_embed.requires_grad_(True)\n',
         '', 'tests/test_amt.py learned'),
        ("SimMIM's positions are decayed", '("pos_embed", "cls_token") if',
         '("cls_token",) if', 'tests/test_amt.py recipe'),
        ("AdamW's second beta of MAE for SimMIM", '(0.9, 0.999) if cfg.base',
         '(0.9, 0.95) if cfg.base', 'tests/test_amt.py recipe'),
        ('the same masks in each micro-batch', 'network(images, attention, noise[i], ratios)',
         'network(images, attention, noise[0], ratios)', 'tests/test_amt.py accumulation'),
        ('the image shows the next epoch', 'last_epoch = (max(run.first_step, run.last_step) - 1) // steps_per_epoch',
         'last_epoch = max(run.first_step, run.last_step) // steps_per_epoch', 'tests/test_amt.py image'),
    ],
    "supmim.py": [
        ('the class token is averaged, too', 'else tokens[:, 1:].mean(dim=1)',
         'else tokens.mean(dim=1)', 'tests/test_supmim.py plain_vit'),
        ('the visible are scored', 'return latent[:, :1 + visible.shape[1]], prediction, masked',
         'return latent[:, :1 + visible.shape[1]], prediction, visible', 'tests/test_supmim.py maes'),
        ('mixed images are masked', 'patchify(images if self.passes == "two" else mixed, self',
         'patchify(mixed, self', 'tests/test_supmim.py mixed'),
        ('labels are not smoothed', 'labels, label_smoothing=self.smoothing)',
         'labels)', 'tests/test_supmim.py recipe'),
        ('no drop path', '        common.add_drop_path(self.blocks, drop_path)\n',
         '', 'tests/test_supmim.py dropped'),
        ('drop path in the decoder, too', 'common.add_drop_path(self.blocks, drop_path)',
         'common.add_drop_path([*self.blocks, *self.decoder_blocks], drop_path)', 'tests/test_supmim.py dropped'),
        ('the same start for each seed', 'generator=torch.Generator().manual_seed(seed))[:codes]',
         'generator=torch.Generator().manual_seed(0))[:codes]', 'tests/test_supmim.py kmeans'),
        ('rounds do not follow the centres', 'near = torch.cat([nearest_code(rows, centres) for',
         'near = torch.cat([nearest_code(rows, x[start]) for', 'tests/test_supmim.py kmeans'),
        ('codes are never normalised', 'pixel_target(patchify(images, cfg.patch_size), cfg.norm_pix)',
         'pixel_target(patchify(images, cfg.patch_size), False)', 'tests/test_supmim.py recipe'),
        ('all labels are used', 'data.subset(splits.train, cfg.shots,',
         'data.subset(splits.train, 0,', 'tests/test_supmim.py recipe'),
        ("MAE's second beta", 'betas=(0.9, 0.999)',
         'betas=(0.9, 0.95)', 'tests/test_supmim.py recipe'),
        ('no RandAugment', ', randaugment=cfg.randaugment)',
         ')', 'tests/test_supmim.py recipe'),
        ('labels are not mixed', 'mixed, labels = mix(images, labels.to(device, non_blocking=True))',
         'mixed, _ = mix(images, labels)', 'tests/test_supmim.py recipe'),
        ('all processes mix alike', 'derive_seed(cfg.seed, step, i, common.rank(), 1)',
         'derive_seed(cfg.seed, step, i, 0, 1)', 'tests/test_supmim.py processes'),
        ('the same masks in each micro-batch', 'labels, noise[i], mixed',
         'labels, noise[0], mixed', 'tests/test_supmim.py accumulation'),
        ('the loss is not divided', '(loss / cfg.accumulate).backward()',
         'loss.backward()', 'tests/test_supmim.py accumulation'),
        ('the logged losses are not cleared', '            losses.zero_()\n',
         '', 'tests/test_supmim.py recipe'),
        ('test images are scored with drop path', '        model.eval()\n        test_logits',
         '        test_logits', 'tests/test_supmim.py dropped'),
        ('k-NN of another token than the one classified', 'return lambda images: model.pooled(model.encode(images))',
         'return lambda images: model.encode(images)[:, 1:].mean(dim=1)', 'tests/test_supmim.py feature'),
        ('the head is left out of the classifier', 'if not name.startswith(("decoder", "mask_token"))}\n        classifier',
         'if not name.startswith(("decoder", "mask_token", "head"))}\n        classifier', 'tests/test_supmim.py export'),
    ],
}


def caught(file: str, old: str, new: str, tests: str) -> bool:
    """Whether the tests fail with the text replaced."""
    words = tests.split(" ", 1)
    with tempfile.TemporaryDirectory() as top:
        copy = Path(top, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "data", ".venv", "__pycache__"))
        text = (copy / file).read_text()
        if text.count(old) < 1:
            raise SystemExit(f"{file} no longer holds {old!r}: mend the fault's text")
        (copy / file).write_text(text.replace(old, new, 1))
        choice = ["-k", words[1]] if len(words) > 1 else []
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", words[0], *choice]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True,
                              env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(FAULTS)}; none: all")
    args = parser.parse_args(argv)
    missed = []
    count = 0
    for file in args.files or FAULTS:
        for what, old, new, tests in FAULTS[file]:
            began = time.time()
            noticed = caught(file, old, new, tests)
            count += 1
            missed += [] if noticed else [what]
            print(f"{file:15} {'caught' if noticed else 'MISSED'}  {time.time() - began:4.0f} s  {what}  ({tests})", flush=True)
    print(f"{count - len(missed)} of {count} were caught")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
