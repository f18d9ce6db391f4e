"""Every command and every example of the README runs."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fmrec_fast.data import synthetic_dataset

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_python_examples_run_in_order(tmp_path):
    examples = blocks("python")
    assert len(examples) >= 4
    script = tmp_path / "readme.py"
    script.write_text("\n".join(examples))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "'encoder', 'reference'" in done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the README's ratings.csv; item ids go to 100, so that 12,45,7 exist."""
    folder = tmp_path_factory.mktemp("readme")
    data = synthetic_dataset(num_users=60, num_items=100, num_clusters=5, mean_length=8)
    rows = ["user,item,timestamp"]
    for user in range(data.num_users):
        rows += [f"{user},{item},{at}" for at, item in enumerate(data.history(user).tolist())]
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_command_line_examples_run_in_order(workplace):
    executable = shutil.which("fmrec-fast", path=str(Path(sys.executable).parent))
    assert executable, "the console script is not installed beside the interpreter"
    examples = [line for line in commands() if line.startswith("fmrec-fast")]
    assert len(examples) >= 6
    for line in examples:
        done = subprocess.run(
            [executable, *shlex.split(line)[1:]],
            cwd=workplace,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (workplace / "recs.parquet").exists()


def test_the_other_commands_are_those_that_ci_runs():
    others = [line for line in commands() if not line.startswith("fmrec-fast")]
    ci = (ROOT / ".ci" / "run").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for line in others:
        if line.startswith("make "):
            assert line in ci, line
        else:  # the editable install, with more extras
            assert line.startswith("pip install -e '.[cli") and "-e '.[cli" in makefile, line


def test_speed_table_is_the_one_made_from_the_results():
    from benchmarks.table import readme_table

    table = re.search(r"<!-- speed -->\n(.*?)<!-- /speed -->", README, re.DOTALL).group(1)
    assert table.strip() == readme_table().strip()


def test_speed_tables_are_one_for_each_device_and_instruction_set(tmp_path):
    """A case measured on another device is a row of another table, not a newer one of the same."""
    from benchmarks.table import RESULTS, readme_table

    text = next(RESULTS.glob("*-full-training_step-default.json")).read_text()
    changes = ({}, {"gpu": "GPU of a test"}, {"cpu": "CPU of a test"}, {"isa": "avx2"})
    for number, change in enumerate(changes):
        results = json.loads(text)
        place = results["machine"]["versions"] if "isa" in change else results["machine"]
        place.update(change)
        (tmp_path / f"{number}-full-.json").write_text(json.dumps(results))
    headings = [line for line in readme_table(tmp_path).splitlines() if line.startswith("Median")]
    assert len(headings) == len(changes)
    for name in ("GPU of a test, torch", "CPU of a test (AMX)", "(AVX2, no AMX)", "(AMX)"):
        assert any(name in line for line in headings), name


def test_the_runbook_for_a_gpu_and_the_recipe_for_weights_are_commands_that_there_are():
    """They need a device, or write to a release: what they are made of is looked up here; what
    `fmrec-fast export --inference` writes is tests/test_cli.py's."""
    from benchmarks.__main__ import SETTINGS
    from fmrec_fast.cli.parser import build_parser
    from fmrec_fast.kernels import budget, tune

    text = (ROOT / "CONTRIBUTING.md").read_text().split("## The first session on a GPU")[1]
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    makefile, benchmarks = (ROOT / "Makefile").read_text(), ROOT / "benchmarks" / "conftest.py"
    known = set()
    for line in lines:
        program, *rest = shlex.split(line)
        if program == "make":
            assert f"\n{rest[0]}: setup\n" in makefile or rest == ["setup"], line
        elif rest[:1] == ["-m"]:
            assert program == ".venv/bin/python", line
            module, rest = rest[1], rest[2:]
            if module == "fmrec_fast.kernels.tune":
                assert tune._parser().parse_args(rest).write
            elif module == "fmrec_fast.kernels.budget":
                assert set(rest) - set(budget.kernel_modules()) == {"--write"}
            elif module == "benchmarks":
                assert rest[:2] == ["--allocator", SETTINGS[0]]
                flags = {flag for flag in rest[2:] if flag.startswith("--")}
                assert all(f'"{flag}"' in benchmarks.read_text() for flag in flags), line
            else:
                assert (module, rest[:2]) == ("pytest", ["-m", "gpu"]), line
        elif program == "fmrec-fast":
            assert build_parser().parse_args(rest).export.inference
        else:
            assert program in ("tar", "gh"), line
        known.add(program)
    assert known == {"make", ".venv/bin/python", "fmrec-fast", "tar", "gh"}
