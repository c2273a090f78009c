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
    ],
    "common.py": [
        ("masks dealt to the wrong process", "return noise[:, :, rank()]", "return noise[:, :, world_size() - 1 - rank()]", f"{TRAIN} processes"),
        ("masks do not depend on the seed", "seed = derive_seed(cfg.seed, step)", "seed = derive_seed(step)", f"{COMMON} noise"),
        ("warm-up is left out", "    if step < warmup:\n        return peak * step / warmup\n", "    if step < 0:\n        return 0.0\n", f"{COMMON} rate"),
        ("the rate is not scaled with the batch", "peak = cfg.base_lr * cfg.batch_size / 256\n    warmup", "peak = cfg.base_lr\n    warmup", COMMON),
        ("biases are decayed", "parameter.ndim > 1 and name not in undecayed", "name not in undecayed", f"{TRAIN} recipe"),
        ("gradients are summed in the first micro-batch", "i < accumulate - 1", "i > 0", f"{TRAIN} processes"),
        ("checksums are not looked at", "damaged = archive.testzip()", "damaged = None", TRAIN + " changed_byte"),
        ("shapes of the optimizer's state are not looked at", "if value.ndim and value.shape != parameter.shape:",
         "if False:", f"{TRAIN} damaged"),
        ("a damaged checkpoint pushes out the good one", "if self.damaged:  ", "if False:  ", f"{TRAIN} damaged"),
        ("no lock", "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", f"{COMMON} lock"),
        ("--no-resume destroys", "os.rename(self.folder, free)", "import shutil; shutil.rmtree(self.folder)", f"{TRAIN} no_resume"),
        ("nan passes the limits", "if not least <= value <= most:", "if value < least or value > most:", f"{COMMON} limited"),
        ("NaN weights are loaded", "if value.is_floating_point() and not value.isfinite().all():", "if False:", f"{COMMON} finite"),
        ("half of an optional part may be missing", "    if not any(is_optional(name) for name in weights):", "    if True:", f"{COMMON} optional"),
        ("every OSError is one line", "    except UserError as error:\n        # one", "    except (UserError, OSError) as error:\n        # one", f"{COMMON} traceback"),
        ("no image at the end within an epoch", "end = end_of_epoch or done == self.last_step",
         "end = end_of_epoch", "tests/test_amt.py image"),
    ],
    "data.py": [
        ("the quick probe takes 20,000 images of few classes", "limit = min(20_000, 500 * classes)", "limit = 20_000",
         f"{DATA} so_many"),
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
        ("links are followed where they are met", "                    pending.append(entry.path)\n", "                    pending.appendleft(entry.path)\n", f"{DATA} links"),
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
        ('maps of crops', 'transform=squeeze)',
         'transform=None)', 'tests/test_amt.py test_refresh'),
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
    ],
    "supmim.py": [
        ('the class token is averaged, too', 'return self.head(tokens[:, 1:].mean(dim=1))',
         'return self.head(tokens.mean(dim=1))', 'tests/test_supmim.py plain_vit'),
        ('the visible are scored', '        return prediction, masked\n',
         '        return prediction, visible\n', 'tests/test_supmim.py masked_loss_is'),
        ('mixed images are masked', 'masked_loss = self.masked_loss(images, noise, target_codes)',
         'masked_loss = self.masked_loss(mixed, noise, target_codes)', 'tests/test_supmim.py mixed_images'),
        ('the weight on the other loss', 'loss = class_loss + self.mim_weight * masked_loss',
         'loss = self.mim_weight * class_loss + masked_loss', 'tests/test_supmim.py loss_is_the_sum'),
        ('codes of the first patches, not of the masked', 'target = target_codes.gather(1, masked) ',
         'target = target_codes[:, :masked.shape[1]] ', 'tests/test_supmim.py of_the_masked'),
        ('with a weight of 0 the decoder decays', '                    parameter.requires_grad_(False)\n',
         '                    parameter.requires_grad_(True)\n', 'tests/test_supmim.py nothing_is_masked'),
        ('no drop path', '        common.add_drop_path(self.blocks, drop_path)\n',
         '', 'tests/test_supmim.py drop_path_is'),
        ('centers of large norm win', 'return (x @ centers.T - centers.square().sum(dim=1) / 2)',
         'return (x @ centers.T)', 'tests/test_supmim.py nearest_center'),
        ('an empty center goes to 0', 'centers = torch.where(count > 0, mean, centers)',
         'centers = mean', 'tests/test_supmim.py drawn_by_the_seed'),
        ('centers are fitted to raw pixels', 'patches = pixel_target(patchify(images, cfg.patch_size), cfg.norm_pix)',
         'patches = pixel_target(patchify(images, cfg.patch_size), False)', 'tests/test_supmim.py recipe'),
        ('centers are not saved', '{"losses": losses, "centers": centers})',
         '{"losses": losses})', 'tests/test_supmim.py resumed'),
        ('codes of the mixed images', 'codes = tokenize(images, centers,',
         'codes = tokenize(mixed, centers,', 'tests/test_supmim.py of_your_own'),
        ('all labels are used', 'data.subset(splits.train, cfg.shots,',
         'data.subset(splits.train, 0,', 'tests/test_supmim.py recipe'),
        ("MAE's second beta", 'betas=(0.9, 0.999)',
         'betas=(0.9, 0.95)', 'tests/test_supmim.py recipe'),
        ('labels are not mixed', 'mixed, labels = mix(images, labels.to(device, non_blocking=True))',
         'mixed, _ = mix(images, labels)', 'tests/test_supmim.py recipe'),
        ('all processes mix alike', 'derive_seed(cfg.seed, step, i, common.rank(), 1)',
         'derive_seed(cfg.seed, step, i, 0, 1)', 'tests/test_supmim.py processes'),
        ("the masks' seed", 'derive_seed(cfg.seed, step, i, common.rank(), 1)',
         'derive_seed(cfg.seed, step, i, common.rank())', 'tests/test_supmim.py recipe'),
        ('the loss is not divided', '(loss / cfg.accumulate).backward()',
         'loss.backward()', 'tests/test_supmim.py accumulation'),
        ('after an epoch nothing is dropped', '        model.train()                                    # scoring',
         '                                                         # scoring', 'tests/test_supmim.py nothing_is_dropped'),
        ('the head is left out of the classifier', 'if not name.startswith(model.masked_pass_only)}',
         'if not name.startswith(model.pretrain_only)}', 'tests/test_supmim.py export'),
    ],
    "flip.py": [
        ('masked patches are the visible ones', 'return order[:, :K], order[:, K:]',
         'return order[:, -K:], order[:, :-K]', 'tests/test_flip.py visible_patches'),
        ('loss in one direction', 'return (image_loss + text_loss) / 2',
         'return image_loss', 'tests/test_flip.py golden'),
        ('pairs of the wrong process', 'first = common.rank() * len(image)  ',
         'first = 0  ', 'tests/test_flip.py test_processes'),
        ('gradients of gathered features are not summed', '        dist.all_reduce(gradient)\n',
         '', 'tests/test_flip.py test_processes'),
        ("the scale's gradient counts in each micro-batch", 'scale_gradient = scale.grad / len(parts)',
         'scale_gradient = scale.grad', 'tests/test_flip.py parts_equal'),
        ('gradients of another micro-batch', 'gradients = (image_gradients[i], text_gradients[i], scale_gradient)',
         'gradients = (image_gradients[i], text_gradients[0], scale_gradient)', 'tests/test_flip.py parts_equal'),
        ('the second pass has other masks', 'outputs = network(data.to_device(images, device), ids, noise, features_only=True)',
         'outputs = network(data.to_device(images, device), ids, 1 - noise, features_only=True)', 'tests/test_flip.py parts_equal'),
        ('no positions of the text', 'x = self.token_embedding(ids) + self.pos_embed  ',
         'x = self.token_embedding(ids)  ', 'tests/test_flip.py by_hand'),
        ("CLIP's second beta", 'betas=(0.9, 0.95)',
         'betas=(0.9, 0.98)', 'tests/test_flip.py recipe'),
        ("the text's positions are decayed", '("text.pos_embed",)',
         '()', 'tests/test_flip.py recipe'),
        ('the scale is not clamped', '            model.logit_scale.clamp_(0, math.log(100))\n',
         '            pass\n', 'tests/test_flip.py scale'),
        ("an image's own number is not its caption's owner", 'torch.arange(len(images), device=device).unsqueeze(1)',
         'torch.arange(len(images), device=device).flip(0).unsqueeze(1)', 'tests/test_flip.py score_by_hand'),
        ('held-out pairs are trained on', 'trained = ~held_out[train_classes]',
         'trained = held_out[train_classes] >= 0', 'tests/test_flip_data.py keep_pairs_out'),
        ('test images of a table are trained on', 'if i % every < every - 1]',
         'if i % every < every]', 'tests/test_flip_data.py test_csv'),
        ('an open quote is no error', '"strict": True}',
         '"strict": False}', 'tests/test_flip_data.py mistake'),
    ],
    "evaluate.py": [
        ('the width does not reach autocast', 'width=encoder.cls_token.shape[-1])',
         'width=0)', 'tests/test_evaluate.py bf16_by_default'),
        ("AdamW's second beta is not the preset's", 'optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), fused=True)\n    steps_per_epoch = common.plan_steps(cfg, len(splits.train))',
         'optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)\n    steps_per_epoch = common.plan_steps(cfg, len(splits.train))', 'tests/test_evaluate.py recipe_of_fine'),
        ('layer decay off by one', '"lr_scale": decay ** (depth + 1 - layer)',
         '"lr_scale": decay ** (depth - layer)', 'tests/test_evaluate.py layer_decay'),
        ('the class token is decayed', 'part not in ("cls_token", "pos_embed")\n',
         'part not in ("pos_embed",)\n', 'tests/test_evaluate.py layer_decay'),
        ('positions stay fixed in fine-tuning', 'encoder.pos_embed.requires_grad_(True)',
         'pass', 'tests/test_evaluate.py recipe_of_fine'),
        ('labels are not mixed', 'images, labels = mix(images, labels.to(device, non_blocking=True))',
         'images, _ = mix(images, labels.to(device, non_blocking=True))', 'tests/test_evaluate.py recipe_of_fine'),
        ("the average's decay the other way round", 'list(model.parameters()), 1 - decay)',
         'list(model.parameters()), decay)', 'tests/test_evaluate.py average or recipe_of_fine'),
        ('the least rate is left out', 'cfg.min_lr)\n        step_loss = 0.0\n        for i, (images, labels, _) in enumerate(micro_batches):\n            x =',
         '0.0)\n        step_loss = 0.0\n        for i, (images, labels, _) in enumerate(micro_batches):\n            x =', 'tests/test_evaluate.py recipe_of_maes'),
        ('the loss is not divided', 'loss = F.cross_entropy(logits.float(), labels, label_smoothing=cfg.smoothing)\n                (loss / cfg.accumulate).backward()',
         'loss = F.cross_entropy(logits.float(), labels, label_smoothing=cfg.smoothing)\n                loss.backward()', 'tests/test_evaluate.py accumulation'),
        ('LARS scales biases, too', '                if p.ndim > 1:\n',
         '                if True:\n', 'tests/test_evaluate.py lars'),
        ("the sweep's rate is chosen by layers that saw the images", 'prediction = heads(rows)[:, 0].argmax',
         'prediction = heads(rows)[:, 1].argmax', 'tests/test_evaluate.py recipe_of_the_sweep'),
        ("supmim.py's classifier pools the class token", 'or method == "supmim"',
         '', 'tests/test_evaluate.py supmim'),
        ('the pooling of a fine-tuned file is not read', 'if saved.get("pooling") in ("cls", "mean"):',
         'if False:', 'tests/test_evaluate.py supmim'),
        ('all blocks share a table', 'block.rel_pos_bias = copy.deepcopy(encoder.rel_pos_bias)',
         'block.rel_pos_bias = encoder.rel_pos_bias', 'tests/test_evaluate.py relative_positions'),
        ('features of unreadable images shift the names', 'labels.append(dataset.labels[rows])',
         'labels.append(dataset.labels[:len(rows)])', 'tests/test_evaluate.py features_of_class'),
        ('images are scored with drop path', '    model.eval()\n    if common.world_size() > 1:\n',
         '    if common.world_size() > 1:\n', 'tests/test_evaluate.py scored_again or recipe'),
    ],
    "maskdistill.py": [
        ('the most noise is visible', 'return order[:, :num_visible], order[:, num_visible:]',
         'return order[:, -num_visible:], order[:, :-num_visible]', 'tests/test_maskdistill.py test_masks'),
        ('visible patches are predicted', 'predicted = masked if self.num_masked else visible',
         'predicted = visible', 'tests/test_maskdistill.py by_hand and forward'),
        ('tokens one off, for the class token', 'self.forward_features(x)[:, 1:]  ',
         'self.forward_features(x)[:, :-1]  ', 'tests/test_maskdistill.py forward_by_hand'),
        ('features of other patches', 'features = gather_tokens(features, predicted).float()',
         'features = features[:, :predicted.shape[1]].float()', 'tests/test_maskdistill.py forward_by_hand'),
        ('targets normalised over the image', 'F.layer_norm(features, (E,), eps=1e-6)',
         'F.layer_norm(features, features.shape[1:], eps=1e-6)', 'tests/test_maskdistill.py test_targets'),
        ('beta is left out', 'F.smooth_l1_loss(prediction, target, beta=beta)',
         'F.smooth_l1_loss(prediction, target)', 'tests/test_maskdistill.py losses_by_hand'),
        ('the average moves the wrong share', 'average.lerp_(parameters[name], 1 - decay)',
         'average.lerp_(parameters[name], decay)', 'tests/test_maskdistill.py is_the_average'),
        ('the average does not follow', 'model.momentum.update(model, cfg.momentum)',
         'pass', 'tests/test_maskdistill.py recipe and momentum'),
        ('CLIP with GELU', 'activation = quick_gelu if clip else F.gelu',
         'activation = F.gelu', 'tests/test_maskdistill.py clip_figures'),
        ("CLIP's pixels normalised as ImageNet's", 'return Teacher(vit, CLIP_MEAN, CLIP_STD, proj if projected else None)',
         'return Teacher(vit, proj=proj if projected else None)', 'tests/test_maskdistill.py recipe and clip'),
        ('std of narrow encoders', 'max(1.0, 768 / self',
         'max(0.0, 768 / self', 'tests/test_maskdistill.py initial_weights'),
        ('branches are not made smaller with depth', 'block.mlp.fc2.weight.data.div_((2 * layer) ** 0.5)',
         'block.mlp.fc2.weight.data.div_(2 ** 0.5)', 'tests/test_maskdistill.py initial_weights'),
        ("AdamW's second beta", 'betas=(0.9, 0.98)',
         'betas=(0.9, 0.999)', 'tests/test_maskdistill.py recipe and pixels'),
        ('the class token is decayed', 'undecayed=("cls_token",)',
         'undecayed=()', 'tests/test_maskdistill.py recipe and pixels'),
        ('gradients are not cut', '        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)\n',
         '', 'tests/test_maskdistill.py recipe and pixels'),
        ('the loss is not divided', '(loss / cfg.accumulate).backward()',
         'loss.backward()', 'tests/test_maskdistill.py accumulation'),
        ('each process has masks of its own', 'noise = common.mask_noise(cfg, step, model.noise_width, device)',
         'noise = common.mask_noise(cfg, step + common.rank(), model.noise_width, device)', 'tests/test_maskdistill.py processes'),
        ('the other processes keep an untrained teacher', '    if common.world_size() > 1:\n        for',
         '    if False:\n        for', 'tests/test_maskdistill.py processes'),
        ('a resumed run learns from a new teacher', 'and run.first_step > 0 and path.is_file()',
         'and False', 'tests/test_maskdistill.py resumed and self'),
        ('the own teacher learns without warm-up', 'pct_start=0.1',
         'pct_start=0.001', 'tests/test_maskdistill.py training_on_labels'),
    ],
    "dtm.py": [
        ('the least similar merge', 'best.topk(r).indices',
         'best.topk(r, largest=False).indices', 'tests/test_dtm.py golden'),
        ('halves by place, not by turns', 'even = unit[:, ::2]  ',
         'even = unit[:, :(n + 1) // 2]  ', 'tests/test_dtm.py golden'),
        ('means of means', 'sums = sum_groups(sums, number, n)',
         'sums = F.normalize(sum_groups(sums, number, n), dim=-1)', 'tests/test_dtm.py naive'),
        ('labels are those of the last round', 'labels = number.gather(1, labels)',
         'labels = number', 'tests/test_dtm.py golden'),
        ('similarities in bf16', 'with torch.autocast(sums.device.type, enabled=False):',
         'with torch.no_grad():', 'tests/test_dtm.py fp32'),
        ('sums of groups for their means', 'means = sum_groups(x, labels, n) / size',
         'means = sum_groups(x, labels, n)', 'tests/test_dtm.py golden'),
        ('the prediction is not morphed', '    prediction = group_means(prediction, labels, n)  ',
         '    pass  ', 'tests/test_dtm.py dense'),
        ('rounds that cannot reach the number', 'rounds.append(max(equal_share, least))',
         'rounds.append(equal_share)', 'tests/test_dtm.py exact_schedule'),
        ('all morphings of a step are one', 'common.derive_seed(cfg.seed, step, i, 1)',
         'common.derive_seed(cfg.seed, step, 0, 1)', 'tests/test_dtm.py schedules_of_a_step'),
        ('CLIP without its projection', 'projected=True)',
         'projected=False)', 'tests/test_dtm.py recipe and clip'),
        ('beta of 1', 'BETA = 2.0',
         'BETA = 1.0', 'tests/test_dtm.py recipe and vit'),
        ('the class token is decayed', 'undecayed=("cls_token",)',
         'undecayed=()', 'tests/test_dtm.py recipe and vit'),
        ('the loss is not divided', '(loss / cfg.accumulate).backward()',
         'loss.backward()', 'tests/test_dtm.py accumulation'),
        ('each process has morphings of its own', 'schedules = draw_schedules(cfg, patches, step)',
         'schedules = draw_schedules(cfg, patches, step + common.rank())', 'tests/test_dtm.py processes'),
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
