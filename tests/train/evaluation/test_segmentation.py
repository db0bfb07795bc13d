"""Attention and principal components of patches, their overlap with masks, and the command on a run."""

import functools
import json
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from shapes import write_shapes
from timm.models.nest import Nest
from timm.models.volo import VOLO

from lejepa_fast.data.sources.folder import FileSource
from lejepa_fast.errors import UsageError
from lejepa_fast.train import segment as command
from lejepa_fast.train.evaluation import embeddings, segmentation
from lejepa_fast.train.evaluation.segmentation import best_overlap, patch_maps, set_maps
from lejepa_fast.train.report.overlays import map_pictures


def own_attention(model, attn, images):
    """The matrix of an attention layer (B, heads, N, N), as timm computes it where it does not fuse."""
    seen = []
    attn.fused_attn = False
    handle = attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model.forward_features(images)
    handle.remove()
    return seen[0]


NO_CLS = {"class_token": False, "global_pool": "avg"}
SMALL = {"depth": 1, "img_size": 64}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {}),
        ("test_vit", {"qk_norm": True, "reg_tokens": 3}),
        ("test_vit", NO_CLS),
        ("test_vit", {**NO_CLS, "reg_tokens": 2}),
        ("eva02_tiny_patch14_224", {"depth": 1, "img_size": 56}),  # rotary positions
        ("vit_small_patch16_dinov3", SMALL),  # ... and registers
        ("beit_base_patch16_224", {**SMALL, "embed_dim": 48, "num_heads": 3}),  # relative
    ],
)
def test_attention_equals_the_matrix_of_the_last_block(name, options):
    """Whether it was fused or not."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).eval()
    fused = model.blocks[-1].attn.fused_attn = bool(options)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    maps = patch_maps(model, images)
    assert model.blocks[-1].attn.fused_attn == fused  # as it was
    matrix, prefix = own_attention(model, model.blocks[-1].attn, images), model.num_prefix_tokens
    query = matrix[:, :, 0] if model.cls_token is not None else matrix[:, :, prefix:].mean(2)
    expected = query[..., prefix:] / query[..., prefix:].sum(-1, keepdim=True)
    torch.testing.assert_close(maps.attention.flatten(2), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        tokens = model.forward_features(images)[:, prefix:]
    torch.testing.assert_close(maps.features.flatten(2).mT, tokens)


def small_volo(**_):
    part = {"embed_dims": (24, 48, 48, 48), "num_heads": (2, 2, 2, 2)}
    return VOLO([1] * 4, 64, outlook_attention=(True, False, False, False), **part)


def small_nest(**_):
    return Nest(64, embed_dims=(16, 16, 16), num_heads=(2, 2, 2), depths=(1, 1, 1))


@pytest.mark.parametrize(
    ("make", "last", "row"),
    [
        # Class attention: the row of its only query.
        ("cait_xxs24_224", lambda model: model.blocks_token_only[-1], lambda matrix: matrix[:, :, 0, 1:]),
        ("xcit_nano_12_p16_224", lambda model: model.cls_attn_blocks[-1], lambda matrix: matrix[:, :, 0, 1:]),
        # VOLO brings CLS in after the blocks of patches, so it is no query here.
        (small_volo, lambda model: model.network[-1][-1], lambda matrix: matrix.mean(2)),
    ],
)
def test_attention_of_models_with_cls_outside_of_the_blocks(make, last, row):
    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "num_heads": 4} if make == "cait_xxs24_224" else {}
    create = make if callable(make) else functools.partial(timm.create_model, make, num_classes=0)
    model = create(depth=2, img_size=64, **sizes).eval()
    images = torch.randn(2, 3, 64, 64)
    found, expected = patch_maps(model, images).attention, row(own_attention(model, last(model).attn, images))
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(found.flatten(2), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "side"),
    [
        (small_nest, 4),  # attends within blocks of the image, even where there is one block
        (functools.partial(timm.create_model, "test_resnet", num_classes=0), 2),
    ],
)
def test_other_encoders_have_features_without_attention(make, side):
    maps = patch_maps(make().eval(), torch.randn(2, 3, 64, 64))
    assert maps.attention is None
    assert maps.features.shape[2:] == (side, side)


class Planted(torch.nn.Module):
    """Features that are the channels of the image, doubled per 8 x 8 patch."""

    def forward_intermediates(self, images, **options):
        return images, [2 * torch.nn.functional.avg_pool2d(images, 8)]


def planted_images(count=6, size=64):
    """A red square on blue, noise in the third channel; masks."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(count, 3, size, size)
    images[:, 2] = 1
    images += 0.05 * torch.randn(images.shape, generator=generator)
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    for i in range(count):
        masks[i, 8 : 32 + 8 * (i % 2), 16:48] = True
        images[i, :, masks[i]] += torch.tensor([2.0, 0.5, -1.0])[:, None]
    return images, masks


@pytest.mark.parametrize("per_image", [False, True])
def test_components_equal_an_independent_svd_and_the_border_is_negative(per_image):
    images, masks = planted_images()
    loader = [(images[:4], None), (images[4:], None)]
    maps = set_maps(Planted(), loader, "cpu", per_image=per_image)
    assert maps.attention is None
    features = 2 * torch.nn.functional.avg_pool2d(images, 8)
    groups = features.split(1) if per_image else [features]
    expected = []
    for group in groups:
        rows = group.double().permute(0, 2, 3, 1).reshape(-1, 3).numpy()
        _, _, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        expected.append(((rows - rows.mean(0)) @ vectors.T).reshape(len(group), 8, 8, 3))
    expected = np.concatenate(expected).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(np.abs(maps.components.numpy()), np.abs(expected), atol=1e-4)
    assert (maps.components[:, 0][masks[:, 4::8, 4::8]] > 0).all()
    found = segmentation.score_maps(maps, masks)
    assert found["pca"].iou > 85


def test_overlap_equals_a_loop_and_names_its_baselines():
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(5, 12, 12, generator=generator) > 0.7
    scores = masks + torch.rand(masks.shape, generator=generator)
    thresholds = torch.linspace(0.05, 1.95, 20)
    found = best_overlap(scores, masks, thresholds)
    ious = np.array(
        [
            [((s >= t) & m).sum() / ((s >= t) | m).sum() for s, m in zip(scores, masks, strict=True)]
            for t in thresholds
        ]
    )
    best = ious.mean(1).argmax()
    assert found.iou == pytest.approx(100 * ious.mean(1).max())
    assert found.threshold == pytest.approx(float(thresholds[best]))
    assert found.oracle == pytest.approx(100 * ious.max(0).mean())
    # The expectation of random pixels of the same number, against draws.
    taken = (scores >= thresholds[best]).flatten(1)
    draws = []
    for _ in range(200):
        drawn = torch.stack([row[torch.randperm(row.numel(), generator=generator)] for row in taken])
        flat = masks.flatten(1)
        draws.append(((drawn & flat).sum(1) / (drawn | flat).sum(1)).mean().item())
    assert found.random == pytest.approx(100 * np.mean(draws), abs=1.5)
    constant = segmentation.constant_overlap(masks)
    assert constant["all_foreground"].iou == pytest.approx(100 * masks.float().mean().item(), abs=1e-4)
    with pytest.raises(ValueError, match=r"masks: expected some foreground in each, got one without"):
        best_overlap(scores, masks & (torch.arange(5) > 0)[:, None, None], thresholds)


def test_scores_of_all_images_are_never_held_at_once(monkeypatch):
    """Alive at a time: a few enlarged maps, however many images and heads there are."""
    count, size, alive, most = 40, 32, weakref.WeakSet(), []
    plain = segmentation.enlarge

    def counted(maps, size):
        result = plain(maps, size)
        storage = result.untyped_storage()
        alive.add(storage)
        most.append(sum(each.nbytes() for each in alive))
        return result

    monkeypatch.setattr(segmentation, "enlarge", counted)
    generator = torch.Generator().manual_seed(0)
    components = torch.randn(count, 3, 4, 4, generator=generator)
    attention = torch.rand(count, 3, 4, 4, generator=generator)
    masks = torch.rand(count, size, size, generator=generator) > 0.5
    segmentation.score_maps(segmentation.SetMaps(components, attention), masks)
    assert max(most) <= 4 * size**2 * 4


@pytest.mark.parametrize("mode", ["L", "LA", "PA", "P", "RGB", "RGBA"])
def test_alpha_is_no_foreground(tmp_path, mode):
    values = np.zeros((6, 8), np.uint8)
    values[2:4, 1:5] = 1
    if mode in ("P", "PA"):
        mask = Image.fromarray(values).convert("P")
        mask.putpalette([0, 0, 0, 255, 255, 255])
        mask = mask.convert("PA") if mode == "PA" else mask
    else:
        mask = Image.fromarray(255 * values).convert(mode)
    file = tmp_path / ("mask.tif" if mode == "PA" else "mask.png")
    mask.save(file)
    Image.new("RGB", (8, 6)).save(tmp_path / "image.png")
    images = FileSource(tmp_path, ["image.png"], name="images", classes=None, targets=None)
    seen = np.asarray(segmentation.MaskSource([file], images).open_image(0))
    np.testing.assert_array_equal(seen, 255 * values)


def test_the_threshold_keeps_the_fewest_pixels_that_hold_the_share():
    attention = torch.tensor([[[4.0, 1.0], [3.0, 2.0]]])
    rank = segmentation.attention_rank(attention)
    torch.testing.assert_close(rank, torch.tensor([[[1.0, 0.1], [0.6, 0.3]]]))
    maps = segmentation.SetMaps(torch.zeros(1, 3, 2, 2), (attention / 10)[None])
    shown = map_pictures(torch.zeros(1, 3, 2, 2), maps, threshold=0.5)["50% of it"][0]
    warm = shown[0] > shown[2]
    assert warm.tolist() == [[True, False], [True, False]]  # 4 of 10 is too little, 7 of 10 enough


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(configure, save_run, tmp_path_factory):
    """A run that the tests only read."""
    return save_run(configure(), tmp_path_factory.mktemp("segmentation") / "run")


def test_command_draws_pages_and_measures_against_masks(run, tmp_path, capsys):
    write_shapes(tmp_path / "set", 10, size=40)
    (tmp_path / "set" / "images" / "00003.png").rename(tmp_path / "set" / "images" / "00003.PNG")
    images, masks = tmp_path / "set" / "images", tmp_path / "set" / "masks"
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(run), "--images", str(images)]
    assert command.main([*arguments, "--masks", str(masks), "--out", str(out), "--draw", "9"]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["page-001.png", "page-002.png", "summary.json"]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["images"], summary["image_size"]) == (10, 32)
    figures = summary["iou"]
    assert figures.keys() == {"trained", "untrained", "constant"}
    for name in ("trained", "untrained"):
        assert figures[name].keys() == {"pca", "attention", "best_head", "low_attention"}
        for found in figures[name].values():
            assert 0 < found["iou"] <= found["oracle"] <= 100
    assert figures["trained"] != figures["untrained"]
    assert "centered disc" in capsys.readouterr().out
    # As the encoder sees the mask: resized and cut as its image.
    assert figures["constant"]["all_foreground"]["iou"] == pytest.approx(
        100 * np.mean([np.asarray(Image.open(file)) > 0 for file in masks.iterdir()]), abs=1
    )
    (masks / "00003.png").unlink()
    assert command.main([*arguments, "--masks", str(masks)]) == 2
    assert f"in {masks}, got none for 1 of 10 images, such as 00003" in capsys.readouterr().err
    Image.new("L", (40, 30)).save(masks / "00003.png")
    assert command.main([*arguments, "--masks", str(masks)]) == 2
    assert "of 40 x 30 px for 40 x 40 px" in capsys.readouterr().err
    Image.new("L", (40, 40), 255).save(masks / "00003.png")
    for argument, folder, twin in (("masks", masks, "00003.bmp"), ("images", images, "00003.bmp")):
        Image.new("RGB", (40, 40)).save(folder / twin)
        assert command.main([*arguments, "--masks", str(masks)]) == 2
        error = capsys.readouterr().err
        assert f"{argument}: expected names that differ before the suffix, got 00003" in error
        assert twin in error
        (folder / twin).unlink()
    for file in masks.iterdir():
        Image.new("L", (40, 40), 7).save(file)
    assert command.main([*arguments, "--masks", str(masks), "--draw", "0", "--out", str(out)]) == 0
    assert "warning: 10 of 10 masks are foreground nearly everywhere" in capsys.readouterr().out
    # Bad masks are found before anything is drawn, and pictures of an earlier call go before new ones come.
    (out / "page-009.png").touch()
    (out / "page-of-mine.png").touch()
    (masks / "00009.png").write_bytes(b"no picture")
    assert command.main([*arguments, "--masks", str(masks), "--out", str(out)]) == 1
    assert sorted(file.name for file in out.glob("*.png")) == ["page-009.png", "page-of-mine.png"]
    assert command.main([*arguments, "--out", str(out)]) == 0
    names = [file.name for file in out.glob("*.png")]
    assert sorted(names) == ["page-001.png", "page-002.png", "page-of-mine.png"]
    capsys.readouterr()
    arguments[-1] = str(out)
    assert command.main([*arguments, "--out", str(out)]) == 2
    assert f"images: expected files outside {out}, got " in capsys.readouterr().err


def test_one_image_and_frames_of_an_animated_picture_are_measured_against_masks(run, tmp_path):
    frames = [Image.new("RGB", (40, 40), (90 * i, 0, 0)) for i in range(3)]
    mask = Image.new("L", (40, 40))
    mask.paste(255, (10, 10, 30, 30))
    (tmp_path / "masks").mkdir()
    frames[0].save(tmp_path / "a.png")
    frames[0].save(tmp_path / "v1.5.gif", save_all=True, append_images=frames[1:])
    for name in ("a", "v1.5 1", "v1.5 2", "v1.5 3"):
        mask.save(tmp_path / "masks" / f"{name}.png")
    for name, count in (("a.png", 1), ("v1.5.gif", 3)):
        out = tmp_path / name.replace(".", "-")
        arguments = ["--images", str(tmp_path / name), "--masks", str(tmp_path / "masks"), "--out", str(out)]
        assert command.main(["--checkpoint", str(run), *arguments]) == 0
        assert json.loads((out / "summary.json").read_text())["measured"] == count


def test_command_animates_a_folder_of_frames_in_order_and_an_animated_picture(run, tmp_path):
    frames = [Image.new("RGB", (40, 40), (20 * i, 0, 255 - 20 * i)) for i in range(12)]
    for i, frame in enumerate(frames):
        frame.putpixel((i, i), (255, 255, 255))
        (tmp_path / "frames").mkdir(exist_ok=True)
        name = f"f{i}.png" if i < 11 else "f²11.png"  # "²" is a digit, but no number
        frame.save(tmp_path / "frames" / name)
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for images, more in (("frames", ["--sequence"]), ("moving.gif", [])):
        out = tmp_path / f"out-{images}"
        arguments = ["--checkpoint", str(run), "--images", str(tmp_path / images), "--out", str(out), *more]
        assert command.main(arguments) == 0
        with Image.open(out / "sequence.webp") as moving:
            assert (moving.n_frames, moving.size) == (12, (4 * 32, 32))
            reds = []
            for i in range(12):
                moving.seek(i)
                reds.append(np.asarray(moving.convert("RGB"))[8:24, 8:24, 0].mean())
        assert reds == sorted(reds), images  # frame 2 before frame 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "gone"], "images: expected a folder or a picture, got gone, which does not exist"),
        (["--images", "empty"], "images: expected images, got empty, which holds none"),
        (["--images", ".", "--threshold", "1.5"], "threshold: expected at most 0.99, got 1.5"),
        (["--images", ".", "--masks", "gone"], "masks: expected a folder, got gone"),
        (["--images", ".", "--image-size", "0"], "image_size: expected at least 1, got 0"),
        (["--images", ".", "--image-size", "50"], "no map of features for 50 px"),
    ],
)
def test_command_refuses_in_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "here").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "here" / "a.png")
    monkeypatch.chdir(tmp_path)
    arguments = ["here" if each == "." else each for each in arguments]
    assert command.main(["--checkpoint", str(run), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error


def test_an_unusable_out_shows_before_the_work(run, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(segmentation, "set_maps", lambda *args, **options: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    arguments = ["--checkpoint", str(run), "--images", str(image_folder / "val")]
    assert command.main([*arguments, "--out", str(tmp_path / "file")]) == 1
    assert f"cannot write {tmp_path / 'file'}" in capsys.readouterr().err


def test_command_shows_components_alone_where_there_is_no_attention(
    tiny, save_run, image_folder, tmp_path, capsys
):
    run = save_run(tiny(model={"name": "test_resnet"}), tmp_path / "run")
    arguments = ["--checkpoint", str(run), "--images", str(image_folder / "val"), "--pca", "per-image"]
    assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "its attention cannot be read here" in capsys.readouterr().out
    assert (tmp_path / "out" / "page-001.png").is_file()


def test_one_image_calibrates_the_untrained_encoder_before_anything_is_removed(
    tiny, save_run, tmp_path, monkeypatch, capsys
):
    run = save_run(tiny(model={"name": "test_resnet"}), tmp_path / "run")
    write_shapes(tmp_path / "set", 1, size=40)
    arguments = ["--checkpoint", str(run), "--images", str(tmp_path / "set" / "images")]
    arguments += ["--masks", str(tmp_path / "set" / "masks"), "--out", str(tmp_path)]
    (tmp_path / "summary.json").write_text("of an earlier call")
    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "calibrate_batchnorm", Mock(side_effect=UsageError("no statistics")))
        assert command.main(arguments) == 2
    assert "no statistics" in capsys.readouterr().err
    assert (tmp_path / "summary.json").read_text() == "of an earlier call"
    assert not list(tmp_path.glob("page-*.png"))
    assert command.main(arguments) == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["measured"] == 1
    assert found["iou"]["untrained"].keys() == {"pca"}
