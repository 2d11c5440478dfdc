import re

import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from papermill.translators import PythonTranslator

from udonlib import presets
from udonlib.errors import ParameterError, UserError
from udonlib.params import TrainParams
from udonlib.presets import DataParams, EmbeddingsParams, EvaluateParams, GapParams, GridParams, SamplerParams

CELL = 'preset: str = "paper"\ndomains: str = "all"\nsteps: int = None\nlearning_rate: float = None  # the preset\'s'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with presets of its own."""
    (tmp_path / "params" / "ablations").mkdir(parents=True)
    monkeypatch.setattr("udonlib.files.SHARE", tmp_path)

    def write(name: str, content: str | bytes):
        path = tmp_path / "params" / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def complaint(call, *args, **values) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **values)
    return str(caught.value)


def injected(**values: object) -> str:
    """The cell that papermill puts behind the parameters cell."""
    return PythonTranslator.codify(values)


def test_paper_is_the_defaults():
    assert presets.load() == presets.load("paper") == TrainParams()


def test_presets_refine_each_other_and_values_come_last(project):
    project("base.yaml", "preset: paper\nseed: 1\nlearning_rate: 1e-2\nstudent_dim: 16\n")
    project("ablations/fine.yaml", "preset: base\nseed: 2\nstudent_dim: 32\n")
    params = presets.load("ablations/fine", student_dim=48)
    assert (params.seed, params.learning_rate, params.student_dim) == (2, 0.01, 48)


def test_a_preset_may_be_a_path_and_refer_to_its_neighbours(project, tmp_path, monkeypatch):
    project("ablations/one.yaml", "seed: 5\n")
    path = project("ablations/two.yaml", "preset: one.yaml\n")
    assert presets.load(path).seed == presets.load(str(path)).seed == 5
    assert presets.load("params/ablations/two.yaml").seed == 5  # as written in the project's folder, from anywhere
    monkeypatch.chdir(tmp_path / "params" / "ablations")
    assert presets.load("two.yaml").seed == 5


def test_an_empty_preset_changes_nothing(project):
    project("empty.yaml", "# nothing\n")
    assert presets.load("empty") == TrainParams()


def test_an_unknown_preset_is_reported_with_the_nearest_name(project):
    project("smoke.yaml", "seed: 1\n")
    path = project("other.yaml", "preset: smok\n")
    assert complaint(presets.load, "smokes") == "no preset 'smokes'; did you mean 'smoke'?"
    assert complaint(presets.load, "zzz") == "no preset 'zzz'; valid: other, paper, smoke"
    assert complaint(presets.load, "other") == f"{path}: no preset 'smok'; did you mean 'smoke'?"
    assert complaint(presets.load, "x/y.yaml").startswith("no preset 'x/y.yaml'; ")


def test_a_chain_that_comes_back_to_itself_is_refused(project):
    project("a.yaml", "preset: b\n")
    path = project("b.yaml", "preset: a\n")
    assert complaint(presets.load, "a") == f"{path}: preset 'a' refines itself: a -> b -> a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\nrun: caf\xe9\n", ", line 2: not UTF-8 text: byte 0xe9"),
        ("seed: 1\nsteps: [1\n", ", line 3: not valid YAML: "),
        ("seed: 1\n\tsteps: 2\n", ", line 2: not valid YAML: "),
        ("seed: \x07\n", ": not valid YAML: "),
        ("run: &x [1]\ndata: *x\n", ", line 2: found the alias *x, expected the value itself"),
        ("# one\n- seed\n", ", line 2: expected lines of the form 'name: value'"),
        ("just text", ", line 1: expected lines of the form 'name: value'"),
        ("seed: 1\nsteps: 5\nseed: 2\n", ", line 3: 'seed' is set twice, first in line 1"),
        ("preset: 3\n", ": parameter 'preset': found 3, expected the name or the path of a preset"),
        ("a: &x 1\n*x : 2\n<<: 3\n", ", line "),
    ],
)
def test_a_broken_file_is_reported_by_name_and_line(project, content, message):
    path = project("broken.yaml", content)
    assert complaint(presets.load, "broken").startswith(f"{path}{message}")
    assert len(complaint(presets.load, "broken")) < len(str(path)) + 250


def test_a_wrong_value_names_the_file_that_set_it(project):
    path = project("base.yaml", "seed: -1\nstepz: 2\n")
    project("fine.yaml", "preset: base\nlearning_rate: 0.1\n")
    assert complaint(presets.load, "fine", scale="x").splitlines() == [
        f"parameter 'seed': found -1 (int), expected a whole number >= 0 and < 4294967296 (set in {path})",
        "parameter 'scale': found 'x' (str), expected a number > 0 and <= 1e+30",
        f"parameter 'stepz': no such parameter; did you mean 'steps'? (set in {path})",
    ]


def test_another_recipe_overrules_the_values_of_presets_below_it(project):
    project("udon.yaml", "sampler: balanced\nw_kl: 2.0\nseed: 4\n")
    project("plain.yaml", "preset: udon\nrecipe: us_rr\n")
    plain = presets.load("plain")
    assert (plain.sampler, plain.w_kl, plain.seed) == ("round_robin", 0.0, 4)
    assert plain == presets.load("udon", recipe="us_rr")
    again = presets.load("plain", recipe="udon")
    assert (again.sampler, again.w_kl) == ("balanced", 2.0)
    assert "fixes it to 'round_robin'" in complaint(presets.load, "udon", recipe="us_rr", sampler="balanced")


def test_a_notebooks_cells_become_parameters(project):
    project("base.yaml", "seed: 1\nlearning_rate: 0.5\nstudent_dim: 16\n")
    cells = [
        "",
        "import os",
        CELL.replace("paper", "base"),
        injected(seed=2, steps=50_000),
        "params = from_notebook(In)",
    ]
    params = presets.from_notebook(cells)
    assert (params.seed, params.steps, params.learning_rate, params.student_dim) == (2, 50_000, 0.5, 16)


def test_an_injected_preset_wins_over_the_notebooks(project):
    project("base.yaml", "seed: 1\n")
    assert presets.from_notebook([CELL, injected(preset="base")]).seed == 1


def test_only_the_last_run_of_the_parameters_cell_counts():
    cells = [CELL, injected(steps=50_000, seed=3), CELL.replace("steps: int = None", "steps: int = 60_000")]
    params = presets.from_notebook(cells)
    assert (params.steps, params.seed) == (60_000, 0)


def test_other_cells_are_not_taken_for_parameters():
    cells = [
        CELL,
        "steps = 3",
        "seed: int = 3\nprint(seed)",
        "x: int = 2",
        "%time\nnot python at all",
        "seed = learning_rate = 7",
    ]
    assert presets.from_notebook(cells) == TrainParams()


def test_a_name_misspelt_in_the_notebook_or_by_papermill_is_reported():
    assert complaint(presets.from_notebook, [CELL, injected(domainz="all")]) == (
        "parameter 'domainz': no such parameter; did you mean 'domains'?"
    )
    assert complaint(presets.from_notebook, [CELL + "\nstudent_dimm: int = None"]) == (
        "parameter 'student_dimm': no such parameter; did you mean 'student_dim'?"
    )
    assert complaint(presets.from_notebook, [CELL, injected(presett="x")]).endswith("did you mean 'preset'?")


def test_a_notebook_whose_parameters_cell_was_not_run_says_so():
    assert "run the cell with the parameters first" in complaint(presets.from_notebook, ["", "import udonlib"])


def test_a_notebook_on_data_takes_no_training_parameters():
    cell = 'data: str = "miniuned"\ndomains: str = "all"'
    assert presets.from_notebook([cell, injected(domains="flags")], DataParams).domains == ("flags",)
    assert "no such parameter" in complaint(presets.from_notebook, [cell, injected(steps=3)], DataParams)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "data": st.text(st.characters(codec="utf-8"), min_size=1),
            "domains": st.lists(st.sampled_from(["emoji", "kanji", "flags"]), min_size=1, unique=True),
            "seed": st.integers(0, 2**32 - 1),
            "learning_rate": st.floats(0, 1e30, exclude_min=True),
            "pretrained": st.booleans(),
            "max_grad_norm": st.none() | st.floats(1e-9, 1e9),
            "head_hidden_dims": st.lists(st.integers(1, 9999)),
            "backbone_args": st.dictionaries(st.text("abc", min_size=1), st.integers() | st.text() | st.none()),
        },
    )
)
def test_whatever_papermill_injects_arrives_unchanged(values):
    assert presets.from_notebook([CELL, injected(**values)]) == TrainParams(**values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-p domainz all", "ParameterError: parameter 'domainz': no such parameter; did you mean 'domains'?"),
        (
            "-p learning_rate fast",
            "ParameterError: parameter 'learning_rate': found 'fast' (str), expected a number > 0",
        ),
        ("-p steps 0", "ParameterError: parameter 'steps': found 0, expected at least 1 for recipe 'udon'"),
        ("-p domains emojis", "DataError: parameter 'domains': "),
    ],
)
def test_papermill_ends_with_the_one_message(tmp_path, warm_papermill, arguments, message):
    cells = [
        new_code_cell(CELL, metadata={"tags": ["parameters"]}),
        new_code_cell("import udonlib.presets\n\nparams = udonlib.presets.from_notebook(In)"),
        new_code_cell("from udonlib.data.catalog import load_catalog\n\nload_catalog(domains=params.domains)"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "in.ipynb")
    done = warm_papermill(tmp_path / "in.ipynb", tmp_path / "out.ipynb", *arguments.split())
    assert done.returncode == 1
    last = done.stderr.rsplit(']":\n', 1)[1].strip()  # after papermill's "Exception encountered at "In [3]":"
    assert last.startswith(message), done.stderr
    assert len(last.splitlines()) == 1
    assert "emojis" not in last or last.endswith("did you mean 'emoji'?")
    outputs = [o for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in cell.get("outputs", [])]
    errors = [output for output in outputs if output.output_type == "error"]
    assert [error.traceback for error in errors] == [[last]]
    assert f"{errors[0].ename}: {errors[0].evalue}" == last


@pytest.fixture
def steered(tmp_path, project):
    """The parameters of a run that a person may have steered, in the project's own outputs."""

    def write(name: str, outputs=tmp_path / "outputs", **values: object) -> TrainParams:
        params = TrainParams(run=name, **values)
        folder = outputs / "runs" / name
        folder.mkdir(parents=True)
        (folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
        return params

    return write


REPLAY = CELL.replace("steps: int = None", "steps: int = 60_000") + "\nreplay: str = None"


def test_a_replay_takes_the_parameters_of_its_run_and_not_those_of_the_cell(steered, project):
    project("base.yaml", "seed: 1\nlearning_rate: 0.5\n")
    there = steered("mine", seed=5, learning_rate=0.25, student_dim=16)
    params = presets.from_notebook([REPLAY.replace("paper", "base"), injected(replay="mine")])
    assert params == there.model_copy(update={"replay": "mine", "run": "auto"})
    assert params.run_name != "mine"
    assert presets.from_notebook([REPLAY.replace("replay: str = None", 'replay: str = "mine"')]) == params


def test_without_a_replay_the_cell_counts_as_ever(steered):
    steered("mine", seed=5)
    assert presets.from_notebook([REPLAY]) == TrainParams(steps=60_000)


def test_what_papermill_injects_beside_a_replay_counts(steered, tmp_path):
    steered("mine", seed=5, overwrite=True, n_workers=3)
    params = presets.from_notebook([REPLAY, injected(replay="mine", n_workers=2, run="again")])
    assert (params.seed, params.n_workers, params.run, params.overwrite) == (5, 2, "again", False)
    assert presets.from_notebook([REPLAY, injected(replay="mine", steps=70_000)]).steps == 70_000  # the run refuses it


def test_a_replay_keeps_where_the_notebook_computes_and_writes(steered, tmp_path):
    there = steered("mine", outputs=tmp_path / "elsewhere", seed=5, device="cuda:3")
    own = REPLAY + f'\ndevice: str = "cpu"\noutputs: str = "{tmp_path / "elsewhere"}"'
    params = presets.from_notebook([own, injected(replay="mine")])
    assert (params.device, params.outputs, params.seed) == ("cpu", str(tmp_path / "elsewhere"), there.seed)


def test_a_preset_that_a_notebook_is_given_is_named_with_its_parameter():
    said = complaint(presets.from_notebook, [CELL, injected(preset="smokes")])
    assert said.startswith("parameter 'preset': no preset 'smokes'; ")


def test_a_replay_of_a_run_that_is_not_there_is_reported_by_its_name(steered):
    steered("mine")
    assert re.match(
        r"(parameter 'replay': .*|no run )'mime'.*did you mean 'mine'",
        complaint(presets.from_notebook, [REPLAY, injected(replay="mime")]),
    )


LEAST = [
    (GapParams, {"k": 1, "n_bins": 1, "n_queries": 1, "seed": 0}),
    (EvaluateParams, {"k": 1, "eval_batch_size": 1}),
    (GridParams, {"jobs": 1, "steps": 1}),
    (SamplerParams, {"steps": 1, "batch_size": 1, "domains_per_batch": 1, "update_every": 1}),
    (EmbeddingsParams, {"max_points": 10, "n_hubs": 1}),
]


@pytest.mark.parametrize(
    ("kind", "name", "least"), [(kind, *each) for kind, values in LEAST for each in values.items()]
)
def test_the_least_value_is_valid_and_one_less_is_not(kind: type[DataParams], name: str, least: int) -> None:
    given = {"run": "mine"} if kind is EvaluateParams else {}
    assert getattr(kind(**given, **{name: least}), name) == least
    with pytest.raises(ParameterError, match=f"parameter '{name}': found {least - 1}"):
        kind(**given, **{name: least - 1})
