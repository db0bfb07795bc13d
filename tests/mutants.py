"""Mutation test: plant one small fault at a time and count how many the tests find.

    make mutants                             # the fixed sample: a table, and mutants.json
    python tests/mutants.py --list           # show the sample, run nothing
    python tests/mutants.py --only guard     # one row of the table

Cosmic Ray's operators make the mutants: comparisons, arithmetic, constants, conditions, loops; one a line.
Everything runs in a copy of the repository. Tests that fail without a mutant are an error; a test that waits
without end fails by its timeout. Results are saved after every mutant; a second call with the same `--out`
goes on where the first one stopped.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parents[1]


class Target(NamedTuple):
    name: str
    count: int  # of mutants in the sample
    sources: str  # regular expression over real paths; a file belongs to the first row that matches
    tests: str  # names of test files, wherever they are under tests/; kernel_* run in Triton's interpreter


OPERATIONS = r"lejepa_fast/(triton_operators|functional|dispatch|collectives)\.py"
OPERATION_TESTS = "test_kernels test_sigreg test_sigreg_module test_trial test_distributed kernel_operators"
TARGETS = (
    Target("loss", 4, r"lejepa_fast/loss\.py", "test_loss"),
    Target("directions", 6, r"lejepa_fast/directions\.py", "test_directions"),
    Target("operators", 8, OPERATIONS, OPERATION_TESTS),
    Target("sums", 8, r"lejepa_fast/(?!__init__|errors)\w+\.py", "test_sigreg test_sigreg_module test_loss"),
    Target(
        "tiles",
        6,
        r"kernels/(autotune|configs)\.py",
        "test_kernels test_autotune kernel_accuracy test_kernel_compile",
    ),
    Target(
        "kernels",
        8,
        r"kernels/(?!__init__|color)\w+\.py",
        "kernel_operators kernel_memory kernel_accuracy kernel_generated",
    ),
    Target("sampler", 6, r".*/data/sampler\.py", "test_loader"),
    Target("draws", 6, r".*/data/draws\.py", "test_ops test_parity"),
    Target("guard", 6, r"train/engine/guard\.py", "test_step test_average test_train test_parallel"),
    Target("checkpoint", 8, r"train/checkpoint/[a-z]\w+\.py", "test_checkpoint test_resume test_model"),
    Target("probes", 8, r"train/evaluation/probes\.py", "test_probes"),
)
# test_in_the_interpreter would start all of the kernel tests.
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-o", "timeout=1200", "-k", "not test_in_the_interpreter"]
BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitXor_BitAnd RShift_LShift"
COMPARISON = "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_GtE Gt_LtE Is_IsNot IsNot_Is"
OTHERS = "ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd AddNot NumberReplacer"
OTHERS += " ZeroIterationForLoop ReplaceUnaryOperator_Delete_USub ReplaceUnaryOperator_Delete_Not"
OPERATORS = [f"ReplaceBinaryOperator_{swap}" for swap in BINARY.split()]
OPERATORS += [f"ReplaceComparisonOperator_{swap}" for swap in COMPARISON.split()] + OTHERS.split()
PLACE = "{file}:{line} {operator}: {change}"  # the line after the change


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if os.path.lexists(ROOT / name)]


def places(source: str) -> list[tuple[str, int, int]]:
    """(operator, occurrence, line) in functions that Python runs: not in annotations, nor in device code."""
    functions, skipped = [], []
    for node in ast.walk(ast.parse(source)):
        skipped += [part for name in ("annotation", "returns") if (part := getattr(node, name, None))]
        if isinstance(node, ast.FunctionDef):
            device = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            (skipped if device else functions).append(node)

    def inside(parts: list, start: tuple[int, int]) -> bool:
        spans = [((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset)) for p in parts]
        return any(first <= start < last for first, last in spans)

    nodes, found = list(ast_nodes(get_ast(source))), []
    for operator in OPERATORS:
        positions = get_operator(f"core/{operator}")().mutation_positions
        for occurrence, (start, _) in enumerate(position for node in nodes for position in positions(node)):
            if inside(functions, start) and not inside(skipped, start):
                found.append((operator, occurrence, start[0]))
    return found


def mutate(source: str, operator: str, occurrence: int) -> str | None:
    """The mutated source; None where the operator took a `*` of a signature or a call for a product."""
    mutated = mutate_code(source, get_operator(f"core/{operator}")(), occurrence)
    try:
        before, after = (Counter(map(type, ast.walk(ast.parse(text)))) for text in (source, mutated))
    except SyntaxError:
        return None
    return None if mutated == source or ("Binary" in operator and before == after) else mutated


def find_tests(root: Path, target: Target) -> list[Path]:
    """The test files of a target; SystemExit if one of its names has none."""
    paths, found = sorted((root / "tests").rglob("*.py")), []
    for name in target.tests.split():
        named = [path for path in paths if path.stem == name]
        if not named:
            raise SystemExit(f"error: no test file {name}.py of {target.name!r}; correct TARGETS")
        found += named
    return found


def sample(seed: int, only: str) -> list[tuple[Target, dict, str]]:
    """The sample that a seed stands for: target, row and the whole mutated file of each mutant."""
    files, chosen = tracked(), []
    for target in TARGETS:
        mine = [file for file in files if re.fullmatch(target.sources, file)]
        files = [file for file in files if file not in mine]
        find_tests(ROOT, target)  # all of them exist
        if not mine:
            raise SystemExit(f"error: {target.name!r} has no source; correct TARGETS")
        if not re.search(only, target.name):
            continue
        sources = {file: (ROOT / file).read_text() for file in mine}
        candidates = [(file, *place) for file in mine for place in places(sources[file])]
        random.Random(f"{seed} {target.name}").shuffle(candidates)
        picked: dict[tuple[str, int], tuple[Target, dict, str]] = {}
        for file, operator, occurrence, line in candidates:
            if len(picked) == target.count or (file, line) in picked:
                continue
            if mutated := mutate(sources[file], operator, occurrence):
                row = {"target": target.name, "file": file, "line": line, "operator": operator}
                row["change"] = mutated.splitlines()[line - 1].strip()
                picked[file, line] = target, row, mutated
        chosen += [picked[place] for place in sorted(picked)]
    return chosen


def pass_tests(copy: Path, target: Target) -> bool:
    """Whether the tests of a target pass in the copy."""
    for interpret in ("0", "1"):
        kernel = interpret == "1"
        files = [path for path in find_tests(copy, target) if path.stem.startswith("kernel_") == kernel]
        if not files:
            continue
        env = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": str(copy / ".numba")}
        command = [sys.executable, "-m", "pytest", *PYTEST, *files]
        with open(copy / "output.txt", "w") as output:
            try:
                subprocess.run(
                    command, cwd=copy, env=env, stdout=output, stderr=output, check=True, timeout=3600
                )
            except subprocess.SubprocessError:  # they fail, or do not end
                return False
    return True


def report(rows: list[dict]) -> None:
    """Print a table of the targets, then the mutants that no test found."""
    print("\n| target | killed | survived |\n|---|---|---|")
    for name in [*(target.name for target in TARGETS), "all"]:
        count = Counter(row["outcome"] for row in rows if name in ("all", row["target"]))
        print(f"| {name} | {count['killed']} | {count['survived']} |")
    for row in rows:
        if row["outcome"] == "survived":
            print("survived:", PLACE.format(**row))
    print(f"score: {100 * (1 - count['survived'] / max(1, len(rows))):.1f} %")


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--out", type=Path, default="mutants.json", help="results; continued if it exists")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name matches this regular expression")
    parser.add_argument("--list", action="store_true", help="show the sample and run nothing")
    args = parser.parse_args()
    mutants = sample(args.seed, args.only)
    if args.list:
        print(*(PLACE.format(**row) for _, row, _ in mutants), sep="\n")
        return
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {PLACE.format(**row) for row in rows}
    sound: set[Target] = set()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in tracked():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
        for target, row, source in mutants:
            if PLACE.format(**row) in done:
                continue
            if target not in sound and not pass_tests(copy, target):
                output = (copy / "output.txt").read_text()[-4000:]
                raise SystemExit(f"{output}\nerror: the tests of {target.name!r} fail without a mutant")
            sound.add(target)
            (copy / row["file"]).write_text(source)
            row["outcome"] = "survived" if pass_tests(copy, target) else "killed"
            shutil.copy2(ROOT / row["file"], copy / row["file"])
            rows.append(row)
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{row['outcome']}: {PLACE.format(**row)}", flush=True)
    report(rows)


if __name__ == "__main__":
    main()
