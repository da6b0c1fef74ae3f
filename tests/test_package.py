"""What the package promises as a whole: quick import, no optional packages, README that is true."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

OPTIONAL = ["torch", "transformers", "tensorflow", "tokenizers", "sentencepiece", "tiktoken",
            "gguf", "PIL", "matplotlib", "tensorboardX", "wandb", "huggingface_hub", "qwix",
            "starlette", "uvicorn"]  # fmt: skip


def test_import_is_quick_and_pulls_in_nothing_optional():
    code = (
        "import sys, time; t = time.perf_counter(); import jaxherd; "
        "spent = time.perf_counter() - t; "
        f"print(spent, [m for m in {OPTIONAL!r} + ['jax', 'flax'] if m in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    seconds = min(float(run.stdout.split()[0]) for run in runs)
    assert seconds < 1.0
    assert runs[0].stdout.strip().endswith("[]")


def test_every_module_imports_with_core_packages_only():
    code = f"""
import importlib, pkgutil, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ImportError(name + " is optional")
sys.meta_path.insert(0, Refuse())
import jaxherd
names = [m.name for m in pkgutil.walk_packages(jaxherd.__path__, "jaxherd.")]
for name in names:
    if "._resources" not in name:
        importlib.import_module(name)
print(len(names))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 60


def _commands():
    """Return the `jaxherd` commands of the README's code blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    whole = [block.replace("\\\n", " ") for block in blocks]
    lines = [line.split("#")[0].strip() for block in whole for line in block.splitlines()]
    return [line for line in lines if line.startswith("jaxherd ")]


@pytest.mark.parametrize("command", _commands())
def test_readme_commands_parse(command, monkeypatch):
    """Each command's verb and flags exist: the verb is replaced, its parser is not."""
    import importlib
    import shlex

    import tyro

    verb, *arguments = shlex.split(command)[1:]
    module = importlib.import_module(f"jaxherd.cli.{verb}_")
    called = {}

    import functools

    main = getattr(module, "main", None)
    if main is None:
        main, arguments = module.VERBS[arguments[0]], arguments[1:]

    @functools.wraps(main)
    def spy(*args, **kwargs):
        called.update(args=args, kwargs=kwargs)
        return 0

    assert tyro.cli(spy, prog=verb, args=arguments) == 0
    assert called


def test_readme_python_runs_as_it_stands(tmp_path):
    """In a folder of its own, on the package that is under test, installed or not."""
    import jaxherd

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    script = tmp_path / "block.py"
    script.write_text(block + "print(tokenizer.decode(tokens))\nprint(logits.shape)\n")
    place = str(pathlib.Path(jaxherd.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": place},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    words, shape = run.stdout.strip().rsplit("\n", 1)
    assert "Paris" in words
    assert shape.startswith("(1, ") and shape.endswith(", 49152)")
    assert [path.name for path in tmp_path.iterdir()] == ["block.py"]


def test_pip_lines_name_extras_that_exist():
    import tomllib

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = re.findall(r"pip install '(?:\.|jaxherd)\[([\w,]+)\]", text)
    assert len(named) >= 5
    assert {extra for group in named for extra in group.split(",")} <= extras.keys()


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target
    for target in re.findall(r"^make ([\w-]+)", text, flags=re.MULTILINE):
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_notebook_is_run():
    tests = {p.stem for p in (ROOT / "tests" / "notebooks").glob("test_*.py")}
    assert tests == {f"test_{p.stem}_notebook" for p in (ROOT / "notebooks").glob("*.py")}
