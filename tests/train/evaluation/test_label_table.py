"""Labels from a CSV file, and evaluation on other images than those of the training."""

import json

import numpy as np
import pytest
from PIL import Image
from training import CPU, rows_of

from lejepa_fast.data import open_source
from lejepa_fast.errors import UsageError
from lejepa_fast.train import evaluate as command
from lejepa_fast.train.evaluation import protocol
from lejepa_fast.train.evaluation.label_table import labeled, read_labels
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.pretrain import pretrain


@pytest.fixture
def flat(tmp_path):
    """30 images without classes whose brightness is 8 times their number."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(30):
        Image.new("RGB", (40, 40), (8 * i, 8 * i, 100)).save(folder / f"{i}.png")
    return folder


def table(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_and_classes_are_read_and_joined(tmp_path, flat, caplog):
    caplog.set_level("INFO")
    source = open_source(str(flat), "train", val_fraction=0)
    text = "\ufeffWhen, Value ,File\nnow,1.5,./3.png\n\nnow,-2e1, flat/10.png\nnow,7,gone.png\n"
    [part] = labeled(read_labels(table(tmp_path / "a.csv", text)), source)
    assert [part.describe(i).rsplit("/")[-1] for i in range(2)] == ["10.png", "3.png"]
    assert part.values is not None
    assert part.values.tolist() == [-20.0, 1.5]
    assert part.subset([1]).values == np.array([1.5])
    assert "2 images of folder" in caplog.text
    assert caplog.text.count("are numbers and are predicted as such") == 1
    assert "28 have none and are left out" in caplog.text
    assert "1 rows of" in caplog.text
    assert "name no image, such as gone.png, line 5" in caplog.text
    assert part.summary().startswith("2 images, numbers to predict from")
    [classes] = labeled(read_labels(tmp_path / "a.csv", "classes"), source)
    assert (classes.classes, classes.targets, classes.values) == (["-2e1", "1.5", "7"], [0, 1], None)
    for names in (["bat", "owl"], ["1_1", "2_1"]):  # not 11 and 21
        text = f"image,class\n1.png,{names[1]}\n2.png,{names[0]}\n"
        assert read_labels(table(tmp_path / "b.csv", text)).classes == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: expected one column called file or .*, got none in: an empty line"),
        ("file,size\na,1", r"line 1: expected one column called label or .*, got none in: file, size"),
        ("file,label,class\na,1,2", r"label or value or class or target, got several in"),
        ("file,label\na", r"line 2: expected 2 columns, got 1"),
        ("file,label\na,", r"line 2, column label: expected a value, got none"),
        ("file,label\na,1\n,2", r"line 3, column file: expected a value"),
        ("file,label\na,1\na,2", r"line 3: a has a label already, in line 2"),
        ("file,label\na,1\nb,2\nc,n/a", r"line 4, column label: expected a number, as 67% are; .* got 'n/a'"),
        ("file,label\na,nan\nb,2\nc,3", r"line 2, column label: expected a number"),
        ("file,label\n", r"has no rows"),
        ('file,label\n"a,1', r"cannot read .* as a CSV file"),
        ("file,label\na,owl\nb,owl", r"labels.csv: expected two classes or more, got 'owl' alone"),
    ],
)
def test_errors_name_file_line_and_column(tmp_path, text, message):
    path = table(tmp_path / "labels.csv", text)
    with pytest.raises(UsageError, match=message) as error:
        read_labels(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.png,1", r"line 2: 0.png fits both .*blue/0.png and .*red/0.png; give more of the path"),
        ("blue/0.png,1\ntrain/blue/0.png,2", r"line 3: .* has a label already, in line 2"),
        ("green/0.png,1", r"no row of .* names an image of folder .*; compare 'green/0.png' and"),
        ("train/red/0.png,1", r"names an image of folder .*val; label some of these, too$"),
        ("blue/0.png,1", r"line 2: blue/0.png fits both .*train/blue/0.png and .*val/blue/0.png; give more"),
    ],
)
def test_rows_that_fit_no_image_or_several_are_refused(image_folder, tmp_path, text, message):
    path = table(tmp_path / "labels.csv", f"file,label\n{text}\n")
    splits = [open_source(str(image_folder), "train"), open_source(str(image_folder), "val")]
    with pytest.raises(UsageError, match=message):
        labeled(read_labels(path), *splits)
    both = read_labels(table(path, "file,label\ntrain/blue/1.png,1\nval/red/2.png,2"))
    assert [len(part) for part in labeled(both, *splits)] == [1, 1]


def test_numbers_are_predicted_by_the_command(tiny, save_run, flat, tmp_path, capsys):
    """Brightness is in the random features already. 24 of the 30 images have a number, half are held out."""
    run = save_run(tiny(model={"name": "test_resnet"}), tmp_path / "run")
    labels = table(tmp_path / "n.csv", "file,value\n" + "".join(f"{i}.png,{8 * i}\n" for i in range(24)))
    arguments = ["--checkpoint", str(run), "--data", str(flat), "--labels", str(labels)]
    assert command.main([*arguments, "--few-shot", "8", "--draws", "2", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "linear probe (R2)" in printed
    assert "8 labels: kernel ridge" in printed
    summary = json.loads((tmp_path / "out" / "report" / "summary.json").read_text())
    assert (summary["probe_images"], summary["val_images"]) == (12, 12)
    how = {"data": str(flat), "labels": str(labels), "few_shot": "8", "draws": 2, "val_fraction": None}
    assert summary["evaluation"].items() >= how.items()
    assert summary["config"]["eval"]["labels"] is None
    assert set(summary["regression"]) == {"linear", "knn", "kernel", "mean"}
    assert summary["regression"]["linear"]["mae"] < summary["regression"]["mean"]["mae"]
    assert len(summary["few_shot_untrained"]["8"]["knn"]) == 2
    assert (summary["knn_trained"], summary["num_classes"]) == (None, None)
    assert "numbers to predict" in (tmp_path / "out" / "report" / "report.html").read_text()
    for option, value, message in (
        (
            "--val-fraction",
            "0.05",
            "has 1; raise --val-fraction, give more images, or evaluate on others with --data",
        ),
        ("--val-fraction", "1.0", "error: val_fraction: expected a number between 0 and 1, got 1.0"),
        ("--few-shot", "x", "error: few_shot: expected numbers from 1"),
        ("--labels", str(tmp_path / "none.csv"), "error: labels: cannot read"),
    ):
        assert command.main([*arguments, option, value]) == 2
        assert message in capsys.readouterr().err


def test_a_run_on_unlabeled_images_is_evaluated_on_others(tiny, image_folder, flat, capsys):
    """Nothing is held out of the unlabeled images; the labeled ones have splits of their own."""
    cfg = tiny(
        data={"path": str(flat), "val_fraction": 0.0},
        eval={"data": str(image_folder), "every": 1, "linear_steps": 2, "few_shot": "2,all", "draws": 2},
        epochs=2,
    )
    page = pretrain(cfg, CPU)
    assert "to score" not in capsys.readouterr().out
    rows = rows_of(cfg, "eval")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["knn"] is not None for row in rows)
    summary = json.loads((page.parent / "summary.json").read_text())
    expected = {"pretraining_data": str(flat), "pretraining_images": 30, "pretraining_held_out": 0}
    expected |= {"evaluation_data": str(image_folder), "probe_images": 32, "val_images": 12}
    assert {key: summary[key] for key in expected} == expected
    assert summary["few_shot"]["all"]["knn"] == [summary["knn_trained"], 0.0]
    assert summary["few_shot_untrained"]["all"]["linear"] == [summary["linear_untrained"], 0.0]
    assert f"Evaluated on {image_folder}" in page.read_text()


def test_a_run_without_labels_says_how_to_score_it_later(tiny, flat, capsys):
    cfg = tiny(data={"path": str(flat)}, max_steps=1, eval={"few_shot": "1"})
    pretrain(cfg, CPU)
    printed = capsys.readouterr().out
    assert f"train/evaluate.py --checkpoint {cfg.out} --data FOLDER [--labels FILE.csv]" in printed
    assert "Few labels and fine-tuning, which were asked for, are skipped as well." in printed
    with pytest.raises(UsageError, match=r"has 0; .* evaluate on others with --eval.data"):
        pretrain(tiny(data={"path": str(flat), "val_fraction": 0.0}), CPU)


def test_labels_stay_with_their_images_where_one_cannot_be_read(tiny, tmp_path):
    """Every second image is red. One of the first is broken; a shift by one would turn all answers around."""
    for split, count in (("train", 16), ("val", 8)):
        (tmp_path / split).mkdir()
        for i in range(count):
            color = (200, 40, 40) if i % 2 else (40, 40, 200)
            Image.new("RGB", (40, 40), color).save(tmp_path / split / f"{i:02}.png")
    (tmp_path / "train" / "01.png").write_bytes(b"broken")
    text = "".join(
        f"{s}/{i:02}.png,{'red' if i % 2 else 'blue'}\n" for s in ("train", "val") for i in range(16)
    )
    labels = table(tmp_path / "labels.csv", "file,class\n" + text)
    cfg = tiny(data={"path": str(tmp_path), "max_bad_fraction": 0.2}, eval={"labels": labels})
    splits = protocol.open_evaluation(cfg)
    result = protocol.evaluate_model(build_model(cfg), *splits, cfg, device="cpu", linear_steps=0)
    assert (result.n_train, result.n_val, result.knn) == (15, 8, 100.0)


def test_labeled_images_in_one_folder_are_split_by_class(tiny, flat, image_folder):
    labels = "file,label\n" + "".join(f"{i}.png,{'odd' if i % 2 else 'even'}\n" for i in range(20))
    path = table(flat.parent / "labels.csv", labels)
    options = {"data": str(flat), "labels": path, "labels_are": "classes"}
    for given, fraction, held_out in ((0.1, None, 10), (0.1, 0.3, 6)):
        cfg = tiny(data={"val_fraction": given}, eval={**options, "val_fraction": fraction})
        train, val = protocol.open_evaluation(cfg)
        assert (len(train), len(val)) == (20 - held_out, held_out)
        assert np.bincount(val.targets or []).tolist() == [held_out // 2] * 2
    # Of the data of the training those that were held out there, where some were.
    both = {"data": {"path": str(flat), "val_fraction": 0.1}, "eval": {**options, "labels": None}}
    assert len(protocol.open_evaluation(tiny(**both))[1]) == 3
    with pytest.raises(UsageError, match=r"eval.val_fraction: .* is the data of the training"):
        protocol.open_evaluation(tiny(**both | {"eval": {"val_fraction": 0.5}}))
    both["data"]["val_fraction"] = 0.0
    assert len(protocol.open_evaluation(tiny(**both))[1]) == 15
    # The few labeled ones among all images of the training, which holds out none.
    among = tiny(data=both["data"], eval={**options, "data": None})
    train, val = protocol.open_evaluation(among, protocol.open_splits(among.data))
    assert (len(train), len(val)) == (10, 10)
    with pytest.raises(UsageError, match=r"eval.val_fraction: expected a number between 0 and 1, got 1"):
        protocol.open_evaluation(tiny(eval={**options, "val_fraction": 1.0}))
