"""mae.py against the published implementation, hand-made references and its own invariants."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import mae
from conftest import draw, fill, golden

FIGURES = golden("mae")
SMALL = dict(image_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=4,
             decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4)


def golden_mae(norm_pix):
    model = fill(mae.MAE(**SMALL, norm_pix=norm_pix), skip=("pos_embed", "decoder_pos_embed"))
    return model, draw("mae/images", 5, 3, 32, 32), draw("mae/noise", 5, 64, uniform=True)


@pytest.mark.parametrize("target", ["pixel", "norm_pix"])
def test_golden_figures(target):
    want = FIGURES[target]
    model, images, noise = golden_mae(target == "norm_pix")
    loss, prediction, masked = model(images, noise)
    loss.backward()

    def close(got, figure):
        np.testing.assert_allclose(got, figure, rtol=1e-4, atol=1e-6)

    close(loss.item(), want["loss"])
    mask = torch.zeros(5, 64, dtype=torch.bool).scatter(1, masked, True)
    assert mask.sum() == want["mask_sum"]
    assert "".join("01"[int(m)] for m in mask[0]) == want["mask_row0"]
    for name, norm in want["grad_norm"].items():
        close(model.get_parameter(name).grad.norm().item(), norm)
    first = masked[0].argmin()                           # the reference lists them in raster order
    close(prediction[0, first, :8].detach(), want["pred_first_masked_patch_head"])
    visible, masked = mae.random_masking(noise, 0.75)    # the reference predicts visible ones, too
    latent = model.forward_features(mae.patchify(images, 4), visible)
    decoded = model.decode(latent, visible, masked)[:, 1:]
    everywhere = model.decoder_pred(model.decoder_norm(decoded)).detach()
    close(everywhere.mean(), want["pred_mean"])
    close(everywhere.abs().mean(), want["pred_abs_mean"])


def test_state_dict_names_and_shapes():
    state = mae.MAE(**SMALL).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == FIGURES["state_dict"]


def test_position_table():
    row = mae.MAE(**SMALL).pos_embed[0, 2]
    np.testing.assert_allclose(row[:6], FIGURES["pos_embed_row_2_head"], rtol=1e-6)
    total = mae.MAE(**SMALL).pos_embed.abs().sum().item()
    np.testing.assert_allclose(total, FIGURES["pos_embed_abs_sum"], rtol=1e-4)
    table = mae.sincos_positions(768, (14, 14))[0]
    token = table[1 + 2 * 14 + 5]                        # row 2, column 5: the column comes first
    want = [math.sin(5), math.cos(5), math.sin(2), math.cos(2)]
    np.testing.assert_allclose(token[[0, 192, 384, 576]], want, atol=1e-6)
    np.testing.assert_allclose(table[1:].norm(dim=1), math.sqrt(384), rtol=1e-6)
    assert (table[0] == 0).all()
    oblong = mae.sincos_positions(8, (2, 3))[0, 1:].view(2, 3, 8)
    assert (oblong[0, :, :4] == oblong[1, :, :4]).all()
    assert (oblong[:, 0, 4:] == oblong[:, 2, 4:]).all()


@pytest.mark.parametrize("size, patch, state, encoder, trainable, decayed", [
    ("base", 16, 111_907_840, 85_798_656, 111_655_680, (85, 167)),
    ("large", 16, 329_541_888, 303_301_632, 329_239_296, (133, 263)),
    ("huge", 14, 657_074_508, 630_764_800, 656_613_964, (165, 327))])
def test_parameter_counts_of_the_paper(size, patch, state, encoder, trainable, decayed):
    with torch.device("meta"):
        model = mae.MAE(224, patch, *mae.SIZES[size], 512, 8, 16)
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == state
    decoder = [n for n in parameters if n.startswith("decoder") or n == "mask_token"]
    assert sum(p.numel() for n, p in parameters.items() if n not in decoder) == encoder
    assert len(decoder) == 104 and len(parameters) == {"base": 254, "large": 398, "huge": 494}[size]
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == trainable
    groups = common.parameter_groups(model, 0.05)
    assert tuple(len(g["params"]) for g in groups) == decayed
    assert any(p is model.mask_token for p in groups[0]["params"])             # tokens are decayed


def test_presets_are_the_papers():
    cfg = common.parse_config(mae.Config, mae.PRESETS, ["--data", "imagenet"])
    assert (cfg.embed_dim, cfg.depth, cfg.num_heads) == (768, 12, 12)
    assert (cfg.epochs, cfg.batch_size, cfg.warmup_epochs) == (800, 4096, 40)
    assert (cfg.base_lr, cfg.weight_decay, cfg.crop_scale) == (1.5e-4, 0.05, 0.2)
    flags = ["--data", "imagenet", "--model", "huge", "--patch-size", "14"]
    assert common.parse_config(mae.Config, mae.PRESETS, flags).depth == 32


def test_patchify():
    images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12).float()
    patches = mae.patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    patch = images[1, :, 4:8, 4:8].permute(1, 2, 0).flatten()      # row, column, channel
    assert (patches[1, 4] == patch).all()
    assert (mae.unpatchify(patches, 4, (2, 3)) == images).all()


def test_patch_embedding_is_the_convolution():
    embed = mae.PatchEmbed(4, 48)
    images = torch.randn(2, 3, 16, 8)
    convolved = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(mae.patchify(images, 4)), convolved)


def test_random_masking():
    noise = torch.rand(4000, 64, generator=torch.Generator().manual_seed(0))
    visible, masked = mae.random_masking(noise, 0.75)
    assert visible.shape == (4000, 16) and masked.shape == (4000, 48)
    assert (torch.cat([visible, masked], 1).sort().values == torch.arange(64)).all()
    assert (noise.gather(1, visible).amax(1) < noise.gather(1, masked).amin(1)).all()
    share = torch.zeros(4000, 64).scatter(1, masked, 1).mean(0)
    assert (share - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)
    counts = [(196, 0.75, 49), (196, 0.9, 19), (256, 0.75, 64),
              (100, 0.9, 9)]                             # as released
    assert all(mae.random_masking(torch.rand(1, n), r)[0].shape[1] == k for n, r, k in counts)


def test_loss_of_special_predictions():
    patches = torch.randn(2, 5, 768)
    target = mae.pixel_target(patches, True)
    loss = mae.reconstruction_loss(torch.zeros_like(target), target).item()
    assert loss == pytest.approx(767 / 768, rel=1e-5)    # the variance is the unbiased one
    assert mae.reconstruction_loss(target, target) == 0
    brighter = mae.pixel_target(3 * patches + 1, True)
    torch.testing.assert_close(brighter, target, atol=1e-4, rtol=1e-4)
    assert mae.pixel_target(patches, False) is patches


def test_masked_pixels_do_not_reach_the_prediction():
    model, images, noise = golden_mae(True)
    loss, prediction, masked = model(images, noise)
    patches = mae.patchify(images, 4)
    where = masked.unsqueeze(-1).expand(-1, -1, 48)
    other = mae.unpatchify(patches.scatter(1, where, torch.randn(5, 48, 48)), 4, (8, 8))
    loss_of_other, prediction_of_other, _ = model(other, noise)
    assert torch.equal(prediction, prediction_of_other) and loss != loss_of_other


def test_initial_loss():
    torch.manual_seed(0)
    loss, _, _ = mae.MAE(224, 16, *mae.SIZES["base"], 512, 8, 16)(torch.randn(2, 3, 224, 224))
    assert 1.6 < loss < 2.0


def test_encoder_without_masks_is_the_masked_path_with_all_visible():
    model, images, noise = golden_mae(True)
    order, none = mae.random_masking(noise, 0.0)
    shuffled = model.forward_features(mae.patchify(images, 4), order)
    assert none.shape[1] == 0
    encoded = mae.gather_tokens(model.encode(images)[:, 1:], order)
    torch.testing.assert_close(encoded, shuffled[:, 1:], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.pos_embed.zero_()                          # without positions the order is lost on it
    again = model.forward_features(mae.patchify(images, 4), order)
    torch.testing.assert_close(model.encode(images)[:, 0], again[:, 0], atol=1e-5, rtol=1e-5)


def test_block_is_the_formula():
    block, x = mae.Block(48, 4), torch.randn(2, 7, 48)
    y = F.layer_norm(x, (48,), eps=1e-6)
    q, k, v = (t.view(2, 7, 4, 12).transpose(1, 2) for t in block.attn.qkv(y).split(48, dim=-1))
    weights = (q @ k.transpose(-2, -1) / 12 ** 0.5).softmax(dim=-1)
    z = x + block.attn.proj((weights @ v).transpose(1, 2).reshape(2, 7, 48))
    h = block.mlp.fc1(F.layer_norm(z, (48,), eps=1e-6))
    want = z + block.mlp.fc2(h * 0.5 * (1 + torch.erf(h / 2 ** 0.5)))
    torch.testing.assert_close(block(x), want, atol=1e-5, rtol=1e-5)


def test_agrees_with_torchvisions_vit():
    from torchvision.models import VisionTransformer
    theirs = VisionTransformer(32, 8, 2, 4, 48, 192, num_classes=1)
    ours = mae.VisionTransformer(32, 8, 48, 2, 4)
    state = {"cls_token": theirs.class_token, "pos_embed": theirs.encoder.pos_embedding,
             "patch_embed.proj.weight": theirs.conv_proj.weight,
             "patch_embed.proj.bias": theirs.conv_proj.bias,
             "norm.weight": theirs.encoder.ln.weight, "norm.bias": theirs.encoder.ln.bias}
    names = {"ln_1": "norm1", "ln_2": "norm2", "self_attention.in_proj_": "attn.qkv.",
             "mlp.0": "mlp.fc1", "self_attention.out_proj": "attn.proj", "mlp.3": "mlp.fc2"}
    for name, value in theirs.encoder.layers.named_parameters():
        name = name.replace("encoder_layer_", "blocks.")
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    tokens = torch.cat([theirs.class_token.expand(2, -1, -1), theirs._process_input(images)], 1)
    want = theirs.encoder(tokens)
    torch.testing.assert_close(ours.encode(images), want, atol=1e-5, rtol=1e-5)


def test_oblong_images():
    model = mae.MAE(**SMALL | dict(image_size=(16, 40)))
    images = torch.randn(2, 3, 16, 40)
    assert model.encode(images).shape == (2, 1 + 4 * 10, 48)
    loss, prediction, _ = model(images)
    assert prediction.shape == (2, 30, 48) and loss.isfinite()


def test_overfits_eight_images():
    """The published shape of the curve: a plateau near 0.98, then down; fixed masks."""
    torch.manual_seed(0)
    model = mae.MAE(16, 4, 64, 4, 4, 64, 2, 4)
    images = F.interpolate(torch.randn(8, 3, 5, 5), size=16, mode="bicubic")
    noise = torch.rand(8, 16)
    losses = []
    groups = common.parameter_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    table = model.pos_embed.clone()
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, step / 20)
        loss, _, _ = model(images, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 1.5 and 0.9 < losses[20] < 1.1 and losses[-1] < 0.2
    assert torch.equal(model.pos_embed, table)


def test_compiled_model_keeps_names_and_values():
    model = mae.MAE(16, 4, 16, 1, 2, 16, 1, 2)
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    want, names = model(images, noise)[0], list(model.state_dict())
    model.compile(backend="aot_eager")                   # the default needs a C++ compiler
    torch.testing.assert_close(model(images, noise)[0], want, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names


def test_encoder_exports_with_a_dynamic_batch():
    """No size of the example is baked in: another batch runs through the exported program."""
    model = fill(mae.VisionTransformer(16, 4, 16, 2, 2), skip=("pos_embed",)).eval()

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model.encode(images)

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Encoder(), (torch.randn(4, 3, 16, 16),),
                                  dynamic_shapes=({0: batch},))
    images = torch.randn(7, 3, 16, 16)
    torch.testing.assert_close(program.module()(images), model.encode(images), atol=1e-5, rtol=1e-5)
