"""Masked prediction: the step is the one on paper, packed or padded, for any plain vision transformer."""

import pytest
import torch
from plain_ijepa import plain_loss
from torch.nn.functional import mse_loss, scaled_dot_product_attention, smooth_l1_loss

from lejepa_fast import SIGReg
from lejepa_fast.errors import UsageError
from lejepa_fast.train.evaluation.embeddings import embed_source
from lejepa_fast.train.model import packing
from lejepa_fast.train.model.masked import MaskedModel, masked_batch
from lejepa_fast.train.model.model import build_model, evaluated
from lejepa_fast.train.model.objective import MaskedLoss

CPU = torch.device("cpu")
ONE_VIEW = {"global_crops": 1, "local_crops": 0, "global_size": 96}  # 6 x 6 patches
SMALL = {"predictor_width": 32, "predictor_depth": 2, "predictor_heads": 4}


def model_of(tiny, objective="ijepa", **model) -> MaskedModel:
    """In float64, with weights, biases and scales of every layer away from their starting values."""
    options = {"name": "test_vit", "kwargs": '{"depth": 2}', **model}
    model = build_model(tiny(objective=objective, crops=ONE_VIEW, masked=SMALL, model=options)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return model


def masks_of(images, grid=6, blocks=4, seed=0):
    """Contexts of 1 to many patches, without those of any target; targets of many sizes, which overlap."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(images, blocks, grid, grid, generator=generator) < 0.2
    targets[:, :, 0, 0] = False
    targets[:, :, -1, -1] |= ~targets.flatten(2).any(2)  # none is empty
    contexts = ~targets.any(1) & (torch.rand(images, grid, grid, generator=generator) < 0.9)
    contexts[0] = False
    contexts[:, 0, 0] = True
    return contexts, targets


def step(model, images, masks, loss_fn):
    model.zero_grad()
    batch = masked_batch(*masks, model.encoder.num_prefix_tokens, CPU)
    loss = loss_fn(*model([images], batch)).total
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def check_gradients(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


VITS = {
    "no class token": {},
    "class and registers": {"kwargs": '{"depth": 2, "class_token": true}', "register_tokens": 2},
    "class without position, norm before": {
        "kwargs": '{"depth": 2, "class_token": true, "no_embed_class": true, "pre_norm": true}'
    },
    "positions of another size": {"img_size": 64},
    "norm after pooling": {"kwargs": '{"depth": 2, "fc_norm": true}'},
    "scaled layers, RMS norm": {"name": "test_vit4", "kwargs": '{"depth": 2}'},
}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("vit", VITS)
def test_a_step_of_ijepa_is_the_one_on_paper(vit, packed, tiny):
    model = model_of(tiny, **VITS[vit])
    model.packed = packed
    images, masks = torch.randn(5, 3, 96, 96, dtype=torch.float64), masks_of(5)
    for name, distance in (("smooth_l1", smooth_l1_loss), ("l2", mse_loss)):
        found = step(model, images, masks, MaskedLoss(name))
        model.zero_grad()
        expected = plain_loss(model, images, *masks, distance)
        expected.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        torch.testing.assert_close(found[0], expected.detach(), rtol=1e-9, atol=1e-9)
        check_gradients(found[1], grads)
        assert all(p.grad is None for p in model.target.parameters())


@pytest.mark.parametrize("over", ["image", "position", "token"])
def test_a_step_of_masked_lejepa_is_the_one_on_paper(over, tiny):
    """Gradients flow through both encoders; the samples of SIGReg are what the option says."""
    model = model_of(tiny, "masked-lejepa")
    assert model.target is None
    images, masks = torch.randn(4, 3, 96, 96, dtype=torch.float64), masks_of(4)
    regularizers = [SIGReg(num_slices=16, seed=3) for _ in range(2)]

    def samples(tokens):  # a statistic of each sample, averaged
        if over == "image":
            return [torch.stack([image.mean(0) for image in tokens])]
        if over == "position":
            return [torch.stack([image[place] for image in tokens]) for place in range(36)]
        return [torch.cat(list(tokens))]

    def sigreg(tokens):
        return torch.stack([regularizers[1](z, step=0) for z in samples(tokens)]).double().mean()

    found = step(model, images, masks, MaskedLoss("smooth_l1", regularizers[0], over, 0.5))
    model.zero_grad()
    expected = plain_loss(model, images, *masks, smooth_l1_loss, sigreg)
    expected.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    # SIGReg's value is float32, and so is the mean over positions.
    torch.testing.assert_close(found[0].double(), expected.detach(), rtol=1e-6, atol=0)
    check_gradients(found[1], grads, 1e-6 if over == "position" else 1e-9)


def test_what_is_evaluated_is_the_target_encoder(tiny):
    model = model_of(tiny)
    assert evaluated(model).encoder is model.target
    assert evaluated(model, "context").encoder is model.encoder
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    features, z = evaluated(model).eval().embed(images)
    assert torch.equal(features, z)
    pooled = model.target.forward_features(images).mean(1)
    torch.testing.assert_close(features, pooled)
    alone = model_of(tiny, "masked-lejepa").eval()
    assert evaluated(alone).encoder is alone.encoder
    # Of masked LeJEPA the embedding of an image is the mean of what the loss sees: embeddings of patches.
    features, z = evaluated(alone).embed(images)
    torch.testing.assert_close(features, alone.encoder(images))
    torch.testing.assert_close(z, alone.targets(images).mean(1))
    loader = [(images, torch.zeros(2))]
    torch.testing.assert_close(embed_source(evaluated(alone), loader, device="cpu").z, z.float())


def test_the_target_encoder_follows_and_starts_equal(tiny):
    """g = m g + (1 - m) f, bit for bit as torch.lerp; a skipped step and momentum 1 change nothing."""
    model = build_model(tiny(objective="ijepa", crops=ONE_VIEW, masked=SMALL)).train()
    assert not model.target.training
    pairs = list(zip(model.target.parameters(), model.encoder.parameters(), strict=True))
    assert all(torch.equal(mine, its) for mine, its in pairs)
    with torch.no_grad():
        for _, its in pairs:
            its.add_(torch.randn_like(its))
    before = [mine.clone() for mine, _ in pairs]
    model.follow(0.75, torch.ones(()))
    model.follow(1.0, torch.zeros(()))
    assert all(torch.equal(mine, old) for (mine, _), old in zip(pairs, before, strict=True))
    model.follow(0.75, torch.zeros(()))
    for (mine, its), old in zip(pairs, before, strict=True):
        assert torch.equal(mine, torch.lerp(old, its.detach(), 0.25))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "test_resnet"}}, "no plain vision transformer"),
        ({"model": {"name": "vit_tiny_r_s16_p8_224", "kwargs": '{"depth": 1}'}}, "sees beyond a patch"),
        (
            {"model": {"name": "test_vit3", "img_size": 96, "kwargs": '{"global_pool": "map"}'}},
            "by attention",
        ),
        ({"model": {"kwargs": '{"patch_drop_rate": 0.5}'}}, "drops patches"),
        (
            {"masked": {"target_area": (0.3, 0.2)}},
            r"masked\.target_area: expected \(lowest, highest\).*\(0.3, 0.2\)",
        ),
        ({"masked": SMALL | {"predictor_width": 30}}, r"masked\.predictor_width: expected a multiple of 4"),
    ],
)
def test_what_masked_prediction_cannot_train_is_refused(changes, message, tiny):
    options = {"objective": "ijepa", "crops": ONE_VIEW, "masked": SMALL} | changes
    with pytest.raises(UsageError, match=message):
        build_model(tiny(**options))


def test_attention_ends_where_a_sequence_ends_with_and_without_padding(monkeypatch):
    """Runs of equal lengths, alone and repeated; padded as in compiled blocks and on a GPU in float32."""
    lengths = [1, 3, 3, 3, 5, 2, 2]
    ragged = packing.Packing(torch.tensor(lengths), CPU)
    assert ragged.runs == [(1, 1), (3, 3), (1, 5), (2, 2)]
    qkv = torch.randn(1, 19, 3, 2, 8, dtype=torch.float64, requires_grad=True)

    def of(attend):
        out = attend(*qkv.permute(2, 0, 3, 1, 4))
        return out, *torch.autograd.grad((out * torch.arange(8)).square().sum(), qkv)

    def alone(*qkv):
        pieces = zip(*(x.split(lengths, dim=2) for x in qkv), strict=True)
        return torch.cat([scaled_dot_product_attention(*each) for each in pieces], dim=2)

    def packed(*qkv):
        return scaled_dot_product_attention(*qkv, attn_mask=ragged)

    expected = of(alone)
    torch.testing.assert_close(of(packed), expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(of(packed), expected, rtol=1e-12, atol=1e-12)


def test_sequences_of_a_batch_are_sorted_by_length():
    """Few calls of attention on a CPU: one for each length."""
    batch = masked_batch(*masks_of(8), 0, CPU)
    for ragged in (batch.context, batch.blocks):
        lengths = [length for _, length in ragged.runs]
        assert lengths == sorted(set(lengths))
        assert ragged.size[0] > len(lengths)


def test_the_kernel_of_gpus_gets_the_rows_and_where_sequences_begin(monkeypatch):
    """A loop in place of FlashAttention's kernel, with its arguments."""

    def loop(query, key, value, first_q, first_k, longest_q, longest_k):
        assert query.shape == (10, 2, 8)  # (rows, heads, width)
        assert first_q.dtype == first_k.dtype == torch.int32
        assert (first_q.tolist(), longest_q, longest_k) == ([0, 3, 8, 10], 5, 5)
        pieces = zip(*(x.transpose(0, 1).split([3, 5, 2], 1) for x in (query, key, value)), strict=True)
        return torch.cat([scaled_dot_product_attention(*each) for each in pieces], 1).transpose(0, 1)

    monkeypatch.setattr(packing, "varlen_attn", loop)
    flash, padded = (packing.Packing(torch.tensor([3, 5, 2]), CPU) for _ in range(2))
    flash._flash = True
    q, k, v = torch.randn(3, 1, 2, 10, 8)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=padded)
    found = scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), attn_mask=flash)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    for first, last in ((0, 3), (3, 8), (8, 10)):
        alone = scaled_dot_product_attention(*(x[:, :, first:last] for x in (q, k, v)))
        torch.testing.assert_close(expected[:, :, first:last], alone)
    long = torch.randn(1, 2, 10, 8)  # float32 goes without the kernel
    assert torch.equal(
        scaled_dot_product_attention(long, k, v, attn_mask=flash),
        scaled_dot_product_attention(long, k, v, attn_mask=padded),
    )
