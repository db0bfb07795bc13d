"""Labels of images from a CSV file: classes, or numbers such as counts and distances.

The first line names the columns: `file` (or `path`, `image`, `filename`) and `label` (or `value`, `class`,
`target`); others are ignored. A file is named by its path from the root of the data, or by as much of the end
of that path as tells it from the others: `photos/7.jpg`, `7.jpg`.
"""

import csv
import logging
import math
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lejepa_fast.data import ImageSource
from lejepa_fast.errors import UsageError
from lejepa_fast.regular_files import open_regular

log = logging.getLogger("lejepa_fast.train")

FILE_COLUMNS = ("file", "path", "image", "filename")
LABEL_COLUMNS = ("label", "value", "class", "target")
Kind = Literal["auto", "classes", "numbers"]


class LabelTable(NamedTuple):
    """The labels of a CSV file."""

    path: Path
    rows: dict[str, tuple[int, str]]
    """Line and label by the name of the image file, with / between folders."""
    classes: list[str] | None
    """Names of the classes in sorted order; None: the labels are numbers."""


def read_labels(path: Path, kind: Kind = "auto") -> LabelTable:
    """Read a CSV file of labels.

    Args:
        path: a file in UTF-8 with commas between columns; the module says which columns.
        kind: "auto": numbers if all labels can be read as such, else classes.

    Raises:
        UsageError: the file cannot be read; a column is missing; a row is too short, names a file again, or
            has no label, or no number where numbers are expected; all classes are the same. It names file,
            line and column.
    """
    rows: dict[str, tuple[int, str]] = {}
    try:
        with open_regular(path, "r", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            file_at, label_at = (_column(path, header, names) for names in (FILE_COLUMNS, LABEL_COLUMNS))
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                where = f"labels: {path}, line {reader.line_num}"
                if len(cells) <= max(file_at, label_at):
                    raise UsageError(f"{where}: expected {len(header)} columns, got {len(cells)}")
                name, label = cells[file_at].strip().replace("\\", "/"), cells[label_at].strip()
                for column, cell in ((file_at, name), (label_at, label)):
                    if not cell:
                        raise UsageError(f"{where}, column {header[column]}: expected a value, got none")
                name = name.removeprefix("./")
                if name in rows:
                    raise UsageError(f"{where}: {name} has a label already, in line {rows[name][0]}")
                rows[name] = reader.line_num, label
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"labels: cannot read {path} as a CSV file in UTF-8: {error}") from error
    if not rows:
        raise UsageError(f"labels: {path} has no rows; expected one for each labeled image")
    others = [(line, label) for line, label in rows.values() if not _is_number(label)]
    share = 1 - len(others) / len(rows)
    if kind == "numbers" or (kind == "auto" and share > 0.5):
        if others:
            way_out = "" if kind == "numbers" else f", as {share:.0%} are; or say --eval.labels-are classes"
            line, label = others[0]
            place = f"{path}, line {line}, column {header[label_at]}"
            raise UsageError(f"labels: {place}: expected a number{way_out}, got {label!r}")
        if kind == "auto":
            log.info(
                f"labels: those of {path} are numbers and are predicted as such; for classes say "
                "--labels-are classes (in a training --eval.labels-are)"
            )
        return LabelTable(path, rows, None)
    classes = sorted({label for _, label in rows.values()})
    if len(classes) < 2:  # any classifier would be right about every image
        raise UsageError(f"labels: {path}: expected two classes or more, got {classes[0]!r} alone")
    return LabelTable(path, rows, classes)


def labeled(table: LabelTable, *sources: ImageSource) -> list[ImageSource]:
    """The images of each source that have a row, with their labels in place of those that they had.

    Classes are those of the whole table; numbers are the source's `values`. An empty source stays as it is.
    Logs how many images and rows are left out.

    Raises:
        UsageError: a row fits several images of all sources, several rows fit one, or no row fits any image
            of a source.
    """
    used: dict[str, str] = {}
    parts = [_labeled(table, source, used) if len(source) else source for source in sources]
    if unused := [name for name in table.rows if name not in used]:
        line = table.rows[unused[0]][0]
        log.info(
            f"labels: {len(unused):,} rows of {table.path} name no image, such as {unused[0]}, line {line}"
        )
    return parts


def _labeled(table: LabelTable, source: ImageSource, used: dict[str, str]) -> ImageSource:
    """One source. `used`: images by the names in the table that fit them, of all sources so far."""
    by_image: dict[int, str] = {}
    for index in range(len(source)):
        parts = re.split("/|: ", source.describe(index))  # in shards: "shard.tar: name"
        for count in range(1, len(parts) + 1):
            name = "/".join(parts[-count:])
            if name not in table.rows:
                continue
            place = f"labels: {table.path}, line {table.rows[name][0]}"
            if name in used:
                images = f"{used[name]} and {source.describe(index)}"
                raise UsageError(f"{place}: {name} fits both {images}; give more of the path")
            if index in by_image:
                other = table.rows[by_image[index]][0]
                raise UsageError(f"{place}: {source.describe(index)} has a label already, in line {other}")
            used[name], by_image[index] = source.describe(index), name
    if not by_image:
        hint = f"compare {next(iter(table.rows))!r} and {source.describe(0)!r}"
        if used:  # rows name images of the training split
            hint = "label some of these, too"
            if source.origin.endswith(", held out"):
                hint += ", or train with --data.val-fraction 0: then a part of the labeled images is held out"
        raise UsageError(f"labels: no row of {table.path} names an image of {source.origin}; {hint}")
    texts = [table.rows[name][1] for name in by_image.values()]
    part = source.subset(list(by_image))
    part.classes, part._targets, part.values = table.classes, None, None
    if table.classes is None:
        part.values = np.array([float(text) for text in texts])
    else:
        numbers = {name: number for number, name in enumerate(table.classes)}
        part._targets = np.array([numbers[text] for text in texts])
    left_out = len(source) - len(part)
    rest = f"; {left_out:,} have none and are left out" if left_out else ""
    log.info(f"labels: {len(part):,} images of {source.origin} have one in {table.path}{rest}")
    return part


def _column(path: Path, header: list[str], names: tuple[str, ...]) -> int:
    found = [index for index, name in enumerate(header) if name in names]
    if len(found) != 1:
        some = "several" if found else "none"
        got = ", ".join(header)[:200] or "an empty line"
        raise UsageError(
            f"labels: {path}, line 1: expected one column called {' or '.join(names)}, got {some} in: {got}"
        )
    return found[0]


def _is_number(text: str) -> bool:
    """Whether it is a finite number; 1_2 is a name, which Python alone reads as 12."""
    try:
        return "_" not in text and math.isfinite(float(text))
    except ValueError:
        return False
