"""From Hydra's groups and a command line to a validated configuration."""

import ast
import dataclasses
import functools
import itertools
from pathlib import Path

import pytest
import yaml

from fedsmooth_core.config import RunConfig, from_nested, to_nested
from fedsmooth_core.errors import ConfigError
from server.configuration import CONF, compose, load, save, sweep, to_yaml, with_overrides

REPOSITORY = Path(__file__).resolve().parents[2]


def refusal(function, *args):
    with pytest.raises(ConfigError) as error:
        function(*args)
    message = str(error.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    return message


def flat(config):
    nested = to_nested(config)
    return {
        f"{group}.{key}" if isinstance(values, dict) else group: value
        for group, values in nested.items()
        for key, value in (values.items() if isinstance(values, dict) else [(None, values)])
    }


@pytest.fixture(autouse=True, scope="module")
def no_data_folder():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEDSMOOTH_DATA", raising=False)
        yield


@functools.cache
def composed(*overrides):
    """Compose once: Hydra takes a tenth of a second."""
    return compose(list(overrides))


def changes(*overrides):
    """What overrides change in the default configuration."""
    default, changed = flat(composed()), flat(composed(*overrides))
    return {key: value for key, value in changed.items() if value != default[key]}


# --- the files under conf/


def files(group):
    return sorted((CONF / group).glob("*.yaml"))


GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and files(path.name))
GLOBAL = {"experiment", "scale"}
"""Groups whose options set settings of all sections."""
OPTIONS = [(group, path) for group in GROUPS if group not in GLOBAL for path in files(group)]


def test_every_group_is_a_section_of_the_configuration_or_global():
    sections = {key for key, value in to_nested(RunConfig()).items() if isinstance(value, dict)}
    assert set(GROUPS) == sections | GLOBAL


@pytest.mark.parametrize(("group", "path"), OPTIONS, ids=lambda x: getattr(x, "stem", x))
def test_an_option_holds_exactly_the_settings_of_its_section(group, path):
    section = type(getattr(RunConfig(), group))
    assert set(yaml.safe_load(path.read_text())) == {f.name for f in dataclasses.fields(section)}


@pytest.mark.parametrize(("group", "path"), OPTIONS, ids=lambda x: getattr(x, "stem", x))
def test_every_option_composes(group, path):
    needed = ["dataset.root=somewhere"] if path.stem == "imagefolder" else []
    assert all(key.startswith(f"{group}.") for key in changes(f"{group}={path.stem}", *needed))


def test_without_overrides_the_files_say_what_the_dataclasses_say():
    """But for one listed difference: the default run certifies with fewer draws than the field."""
    defaults = flat(RunConfig())
    different = {k: value for k, value in flat(composed()).items() if value != defaults[k]}
    assert different == {"certification.n": 10_000}
    assert defaults["certification.n"] == 100_000


@pytest.mark.parametrize("path", files("experiment"), ids=lambda path: path.stem)
def test_every_experiment_composes_and_carries_its_own_name(path):
    needed = ["dataset.root=somewhere"] if "imagefolder" in path.read_text() else []
    config = composed(f"experiment={path.stem}", *needed)
    if path.stem != "paper_base":
        assert config.name.replace("-", "_") == path.stem


FIGURES = {
    1: (0.25, 128),
    2: (0.5, 128),
    3: (0.25, 128),
    4: (0.5, 128),
    5: (0.12, 128),
    6: (0.12, 64),
    7: (0.25, 64),
    8: (0.5, 64),
    9: (0.12, 256),
    10: (0.25, 256),
    11: (0.5, 256),
}


@pytest.mark.parametrize(("figure", "setting"), FIGURES.items())
def test_a_figure_has_the_papers_settings(figure, setting):
    config = composed(f"experiment=fig{figure}")
    assert (config.smoothing.sigma, config.attack.epsilon_255) == setting
    assert config.attack.l2_budget == setting[1] / 255
    assert config.certified_sigma == setting[0]
    assert (config.dataset.name, config.model.name) == ("cifar10", "alexnet")
    assert (config.partition.num_clients, config.partition.samples_per_client) == (1000, 500)
    assert (config.federation.num_rounds, config.cohort_size) == (150, 100)
    assert (config.training.local_steps, config.training.batch_size) == (20, 30)
    assert (config.smoothing.num_noise_vectors, config.attack.attack_steps) == (2, 2)
    assert config.training.learning_rate == config.attack.step_size == 0.01
    assert config.attack.step_rule == "gradient"
    assert config.certification.alpha == 0.001
    assert config.partition.scheme == "major_class"


def test_the_centralised_baseline_has_the_papers_batches():
    training = compose(["experiment=fig1", "training=centralized"]).training
    assert (training.local_steps, training.batch_size) == (1000, 60)


@pytest.mark.parametrize("figure", [3, 4])
@pytest.mark.parametrize(
    ("overrides", "sigma", "steps"),
    [
        (["smoothing.sigma=0", "attack.attack_steps=0"], 0, 0),
        (["smoothing.sigma=0"], 0, 2),
        ([], None, 2),
        (["attack.attack_steps=0"], None, 0),
    ],
    ids=["standard", "adversarial only", "adversarial and smoothed", "noise only"],
)
def test_the_ablations_are_configuration_alone_and_are_certified_alike(
    figure, overrides, sigma, steps
):
    config = composed(f"experiment=fig{figure}", *overrides)
    level = FIGURES[figure][0]
    assert config.smoothing.sigma == (level if sigma is None else sigma)
    assert config.attack.attack_steps == steps
    assert config.certified_sigma == level
    assert set(changes(f"experiment=fig{figure}", *overrides)) - set(
        changes(f"experiment=fig{figure}")
    ) <= {"smoothing.sigma", "attack.attack_steps"}


# --- overrides


def test_an_override_changes_its_setting_and_nothing_else():
    assert changes("smoothing.sigma=0.5", "partition.gamma=0.7") == {
        "smoothing.sigma": 0.5,
        "partition.gamma": 0.7,
    }


def test_an_override_wins_over_an_experiment_wherever_it_stands():
    for overrides in (
        ["experiment=fig1", "smoothing.sigma=0.7"],
        ["smoothing.sigma=0.7", "experiment=fig1"],
    ):
        assert compose(overrides).smoothing.sigma == 0.7


def test_values_may_hold_what_a_path_may_hold():
    assert compose(["run_dir='/tmp/a b/c=d'"]).run_dir == "/tmp/a b/c=d"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("smoothing.sigmaa=1", ["smoothing.sigmaa", "did you mean smoothing.sigma?"]),
        ("sigma=1", ["sigma is not a setting", "smoothing.sigma"]),
        ("smoothing.sigma=abc", ["smoothing.sigma='abc'", "allowed is a number"]),
        ("smoothing.sigma=-1", ["smoothing.sigma=-1", "allowed is a number >= 0"]),
        ("smoothing.sigma=nan", ["smoothing.sigma=nan", "finite"]),
        ("seed=1.5", ["seed=1.5", "allowed is an integer"]),
        ("seed=null", ["seed=None", "allowed is an integer"]),
        ("smoothing.sigma={a:1}", ["smoothing.sigma={'a': 1}", "allowed is a number"]),
        ("run_dir=3", ["run_dir=3", "allowed is a string or null"]),
        ("smoothing.sigma=0.1,0.2", ["smoothing.sigma=0.1,0.2", "add -m"]),
        ("seed=range(1,3)", ["seed=range(1,3)", "add -m"]),
        ("experiment=fig1,fig2", ["experiment=fig1,fig2", "add -m"]),
        ("+smoothing.x=1", ["+smoothing.x=1", "allowed is key=value"]),
        ("++smoothing.x=1", ["smoothing.x"]),
        ("~smoothing", ["~smoothing", "allowed is key=value"]),
        ("training@other=local", ["training@other=local", "allowed is key=value"]),
        ("model=foo", ["model=foo", "alexnet, resnet110, resnet20, small_cnn"]),
        ("experiment=fig12", ["experiment=fig12", "fig11", "quick"]),
        ("smoothing=1", ["smoothing=1", "gaussian"]),
        ("attack=null", ["attack=null", "salman, smoothadv"]),
        ("experiment=null", ["experiment=null", "fig11, "]),
        ("attack={a:1}", ["attack={a:1}", "salman, smoothadv"]),
        ("model=[alexnet,resnet20]", ["model=[alexnet,resnet20]", "small_cnn"]),
        ("dataset=imagefolder", ["dataset.root"]),
        ("hydra.run.dir=x", ["hydra.run.dir is not a setting"]),
        ("smoothing.sigma=${nothing}", ["nothing"]),
        ("seed", ["seed"]),
        ("seed=[", ["["]),
        ("name='a", ["name='a"]),
        ("seed=\n", ["seed="]),
        ("", [""]),
        ("=3", [""]),
        ("resume=true", ["resume=true", "run_dir"]),
    ],
)
def test_what_is_refused_is_said_in_one_line(override, said):
    message = refusal(compose, [override])
    for part in said:
        assert part in message


# --- sweeps


def test_a_sweep_is_every_combination_in_order():
    combinations = sweep(["smoothing.sigma=0.1,0.2", "name=x", "model=resnet20,small_cnn"])
    assert combinations == [
        [f"smoothing.sigma={sigma}", "name=x", f"model={model}"]
        for sigma, model in itertools.product(["0.1", "0.2"], ["resnet20", "small_cnn"])
    ]
    assert [compose(one).smoothing.sigma for one in combinations] == [0.1, 0.1, 0.2, 0.2]


def test_a_sweep_takes_ranges_and_quoted_values():
    combinations = sweep(["seed=range(0,3)", "dataset.root='a, b'"])
    assert [(c.seed, c.dataset.root) for c in map(compose, combinations)] == [
        (k, "a, b") for k in range(3)
    ]


def test_without_several_values_a_sweep_is_one_run():
    assert sweep(["seed=1"]) == [["seed=1"]]


def test_a_sweep_over_an_unknown_key_is_refused():
    assert "sigmas" in refusal(sweep, ["smoothing.sigmas=1,2"])


# --- what a run recorded


def test_a_recorded_configuration_reads_back_as_it_was(tmp_path):
    config = compose(["experiment=fig3", "seed=7", "dataset.root='a: b # c'"])
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path) == config
    assert from_nested(RunConfig, yaml.safe_load(to_yaml(config))) == config


def test_a_folder_without_a_run_is_named(tmp_path):
    assert str(tmp_path) in refusal(load, tmp_path)


@pytest.fixture
def recorded(tmp_path):
    config = composed("experiment=fig5", "seed=7", "training.local_steps=3")
    save(config, tmp_path / "config.yaml")
    return config


def resumed(tmp_path, *overrides):
    return compose([f"run_dir={tmp_path}", "resume=true", *overrides])


def test_run_dir_and_resume_alone_continue_with_the_recorded_settings(tmp_path, recorded):
    expected = dataclasses.replace(recorded, run_dir=str(tmp_path), resume=True)
    assert resumed(tmp_path) == expected


def test_the_settings_of_the_start_may_be_repeated_on_resume(tmp_path, recorded):
    expected = dataclasses.replace(recorded, run_dir=str(tmp_path), resume=True)
    again = ["experiment=fig5", "seed=7", "training.local_steps=3"]
    assert resumed(tmp_path, *again) == expected


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=8", "seed=8 (was 7)"),
        ("smoothing.sigma=0.5", "smoothing.sigma=0.5 (was 0.12)"),
        ("partition.num_clients=10", "partition.num_clients=10 (was 1000)"),
        ("federation.cohort_fraction=0.2", "federation.cohort_fraction=0.2 (was 0.1)"),
        ("experiment=fig1", "smoothing.sigma=0.25 (was 0.12)"),
    ],
)
def test_a_setting_that_changes_finished_rounds_is_refused_on_resume(
    tmp_path, recorded, override, key
):
    message = refusal(resumed, tmp_path, override)
    assert key in message
    assert str(tmp_path) in message


def test_what_changes_no_finished_round_is_free_on_resume(tmp_path, recorded):
    config = resumed(
        tmp_path, "runtime.threads=2", "certification.n=500", "federation.num_rounds=151"
    )
    assert (config.runtime.threads, config.certification.n) == (2, 500)
    assert config.federation.num_rounds == 151
    assert config.seed == 7


def test_a_resumed_setting_is_checked_like_any_other(tmp_path, recorded):
    assert "certification.n='many'" in refusal(resumed, tmp_path, "certification.n=many")


def test_a_checkpoints_settings_take_single_overrides_alone():
    base = to_nested(compose(["experiment=fig5"]))
    config = with_overrides(base, ["certification.n=50", "certification.sigma=0.3"], "x.json")
    assert (config.certification.n, config.certified_sigma) == (50, 0.3)
    assert config.smoothing.sigma == 0.12
    assert "model=alexnet" in refusal(with_overrides, base, ["model=alexnet"], "x.json")
    assert "certification.nn" in refusal(with_overrides, base, ["certification.nn=1"], "x.json")
    assert "certification.n=" in refusal(with_overrides, base, ["certification.n=1,2"], "x.json")
    for idle in ("model.name=alexnet", "training.learning_rate=7", "resume=true", "run_dir=x"):
        assert "does not concern" in refusal(with_overrides, base, [idle], "x.json")


@pytest.mark.parametrize("damaged", [None, [], "text", {}, {"seed": 1}])
def test_settings_that_a_checkpoint_lacks_do_not_turn_into_defaults(damaged):
    assert "x.json" in refusal(with_overrides, damaged, [], "x.json")


def test_what_a_checkpoint_says_is_taken_literally(monkeypatch):
    monkeypatch.setenv("SECRET", "7")
    base = to_nested(compose([])) | {"seed": "${oc.env:SECRET}"}
    assert "${oc.env:SECRET}" in refusal(with_overrides, base, [], "x.json")


@pytest.mark.parametrize(
    "content", [b"", b"{bad", b"\xff\xfe", b"[1, 2]", b"seed: 1\n", b"seed: {a: 1}\n"]
)
def test_a_damaged_recorded_configuration_is_no_run_of_defaults(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    assert "config.yaml" in refusal(load, tmp_path)


# --- where Hydra is


def test_hydra_is_imported_in_one_module():
    importing = set()
    for package in ("fedsmooth_core", "client", "server"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] in ("hydra", "omegaconf") for name in names):
                    importing.add(path.relative_to(REPOSITORY).as_posix())
    assert importing == {"server/configuration.py"}
