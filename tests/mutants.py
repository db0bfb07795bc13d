"""Mutation test: plant one small fault at a time and count how many the tests find.

    make mutants                             # the fixed sample: a table, and mutants.json
    python tests/mutants.py --list           # show the sample, run nothing
    python tests/mutants.py --only guard     # one row of the table

Cosmic Ray's operators make the mutants: comparisons, arithmetic, constants, conditions, loops; one a line.
Everything runs in a copy of the repository. Tests that fail without a mutant are an error. Results are saved
after every mutant; a second call with the same `--out` goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from fnmatch import fnmatch
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


TARGETS = (
    Target("loss", 4, r"lejepa_fast/loss\.py", "test_loss"),
    Target("directions", 6, r"lejepa_fast/directions\.py", "test_directions"),
    Target(
        "operators",
        8,
        r"lejepa_fast/(triton_)?(ops|operators|functional|dispatch|collectives)\.py",
        "test_kernels test_sigreg test_sigreg_module test_distributed kernel_operators",
    ),
    Target("sums", 8, r"lejepa_fast/(?!__init__|errors)\w+\.py", "test_sigreg test_sigreg_module test_loss"),
    Target("tiles", 6, r"kernels/(autotune|configs)\.py", "test_autotune kernel_tiles test_kernel_compile"),
    Target(
        "kernels", 8, r"kernels/(?!__init__|colou?r)\w+\.py", "kernel_operators kernel_memory kernel_tiles"
    ),
    Target("sampler", 6, r".*/data/sampler\.py", "test_data_ranks test_ranks test*_loader test_sampler"),
    Target("draws", 6, r".*/data/draws\.py", "test_data_ops test_data test_ops test_draws test_*parity"),
    Target("guard", 6, r"train/(\w+/)?guard\.py", "test_guard test_average test_train test_trainer"),
    Target(
        "checkpoint",
        8,
        r"train/(checkpoint/(?!__init__)\w+|checkpoint|saving|resume)\.py",
        "test_checkpoint test_resume",
    ),
    Target("probes", 8, r"train/(\w+/)?probes\.py", "test_probes"),
)
PYTEST = "-x -q -p no:cacheprovider -o timeout=1800"
BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitXor_BitAnd RShift_LShift"
COMPARISON = "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_GtE Gt_LtE Is_IsNot IsNot_Is"
OPERATORS = [
    *(f"ReplaceBinaryOperator_{swap}" for swap in BINARY.split()),
    *(f"ReplaceComparisonOperator_{swap}" for swap in COMPARISON.split()),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("AddNot", "NumberReplacer", "ZeroIterationForLoop"),
    *("ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not"),
]


class Mutant(NamedTuple):
    target: Target
    file: str
    line: int
    operator: str
    source: str  # the whole mutated file
    change: str  # the line after the change


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


def span(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    """Start and end of a node as (line, column)."""
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


def places(source: str) -> list[tuple[str, int, int]]:
    """(operator, occurrence, line) in functions that Python runs: not in annotations, nor in device code."""
    functions, skipped = [], []
    for node in ast.walk(ast.parse(source)):
        skipped += [span(part) for name in ("annotation", "returns") if (part := getattr(node, name, None))]
        if isinstance(node, ast.FunctionDef):
            device = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            (skipped if device else functions).append(span(node))
    nodes = list(ast_nodes(get_ast(source)))
    found = []
    for operator in OPERATORS:
        positions = get_operator(f"core/{operator}")().mutation_positions
        for occurrence, (start, _) in enumerate(position for node in nodes for position in positions(node)):
            inside = any(first <= start < last for first, last in functions)
            if inside and not any(first <= start < last for first, last in skipped):
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


def sample(seed: int, only: str) -> list[Mutant]:
    """The sample that a seed stands for: as many mutants of each target as `TARGETS` says."""
    files, chosen = tracked(), []
    for target in TARGETS:
        mine = [file for file in files if re.fullmatch(target.sources, file)]
        if not mine:
            raise SystemExit(f"error: no source file for {target.name!r} ({target.sources}); correct TARGETS")
        files = [file for file in files if file not in mine]
        if not re.search(only, target.name):
            continue
        sources = {file: (ROOT / file).read_text() for file in mine}
        candidates = [(file, *place) for file in mine for place in places(sources[file])]
        random.Random(f"{seed} {target.name}").shuffle(candidates)
        picked: list[Mutant] = []
        for file, operator, occurrence, line in candidates:
            taken = any((mutant.file, mutant.line) == (file, line) for mutant in picked)
            if len(picked) == target.count or taken:
                continue
            if mutated := mutate(sources[file], operator, occurrence):
                change = mutated.splitlines()[line - 1].strip()
                picked.append(Mutant(target, file, line, operator, mutated, change))
        chosen += sorted(picked, key=lambda mutant: (mutant.file, mutant.line))
    return chosen


def cpu_seconds() -> float:
    """CPU time of all processes that this one has started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_tests(copy: Path, target: Target, limit: int) -> str:
    """Run the tests of a target in the copy. Returns "killed", "survived" or "timeout".

    The limit is in seconds of CPU time, so that a busy machine makes no difference. A test that waits without
    end fails by its own timeout.
    """
    paths = sorted((copy / "tests").rglob("*.py"))
    found = [path for name in target.tests.split() for path in paths if fnmatch(path.stem, name)]
    if not found:
        raise SystemExit(f"error: no test file of {target.name!r} exists ({target.tests}); correct TARGETS")
    for interpret in ("0", "1"):
        files = [str(path) for path in found if path.stem.startswith("kernel_") == (interpret == "1")]
        env = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": str(copy / ".numba")}
        command = ["prlimit", f"--cpu={limit}", sys.executable, "-m", "pytest"]
        # test_in_the_interpreter would start all of the kernel tests.
        command += ["-k", "not test_in_the_interpreter", *PYTEST.split(), *files]
        with open(copy / "output.txt", "w") as output:
            code = subprocess.run(
                command, cwd=copy, env=env, stdout=output, stderr=output, check=False
            ).returncode
        if files and code:
            return "timeout" if code in (-signal.SIGXCPU, -signal.SIGKILL) else "killed"
    return "survived"


def report(rows: list[dict]) -> None:
    """Print a table of the targets, then the mutants that no test found."""
    print("\n| target | mutants | killed | timeout | survived |\n|---|---|---|---|---|")
    for name in [*(target.name for target in TARGETS), "all"]:
        count = Counter(row["outcome"] for row in rows if name in ("all", row["target"]))
        outcomes = " | ".join(str(count[outcome]) for outcome in ("killed", "timeout", "survived"))
        print(f"| {name} | {sum(count.values())} | {outcomes} |")
    survivors = [row for row in rows if row["outcome"] == "survived"]
    for row in survivors:
        print(f"survived: {row['file']}:{row['line']} {row['operator']}: {row['change']}")
    print(f"score: {100 * (1 - len(survivors) / max(1, len(rows))):.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mutants.json"), help="results; continued if it exists"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name matches this regular expression")
    parser.add_argument("--list", action="store_true", help="show the sample and run nothing")
    args = parser.parse_args()
    mutants = sample(args.seed, args.only)
    rows = json.loads(args.out.read_text()) if args.out.exists() and not args.list else []
    done = {(row["file"], row["line"], row["change"]) for row in rows}
    limits: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in tracked():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
        for mutant in mutants:
            target, where = mutant.target, f"{mutant.file}:{mutant.line} {mutant.operator}: {mutant.change}"
            if args.list:
                print(where)
            if args.list or (mutant.file, mutant.line, mutant.change) in done:
                continue
            if target.name not in limits:
                before = cpu_seconds()
                if run_tests(copy, target, limit=36000) != "survived":
                    output = (copy / "output.txt").read_text()[-4000:]
                    raise SystemExit(f"{output}\nerror: the tests of {target.name!r} fail without a mutant")
                limits[target.name] = 60 + 3 * round(cpu_seconds() - before)
            start = time.monotonic()
            (copy / mutant.file).write_text(mutant.source)
            outcome = run_tests(copy, target, limits[target.name])
            shutil.copy2(ROOT / mutant.file, copy / mutant.file)
            seconds = round(time.monotonic() - start)
            rows.append(
                {
                    **mutant._asdict(),
                    "target": target.name,
                    "outcome": outcome,
                    "seconds": seconds,
                    "source": None,
                }
            )
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{outcome} ({seconds} s): {where}", flush=True)
    if not args.list:
        report(rows)


if __name__ == "__main__":
    main()
