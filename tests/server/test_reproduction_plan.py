"""From names of figures to models: the paper's settings, each model trained once, nothing done twice."""

import functools
import hashlib
import io
import json
import math
from dataclasses import replace
from itertools import combinations

import pytest
import yaml
from rich.console import Console

from fedsmooth_core.config import TrainingPlan, to_nested
from fedsmooth_core.errors import ConfigError, DataError
from server.reproduction import plan as planning
from server.reproduction import reproduce as command
from server.reproduction.figures import (
    ADVERSARIAL,
    ESTIMATORS,
    FIGURES,
    GAMMAS,
    NOISE,
    PAPER,
    SMOOTHADV,
    STANDARD,
    STRONG,
    centralized_label,
    federated_label,
    figures_named,
)
from server.reproduction.plan import make_plan
from server.reproduction.reproduce import reproduce
from server.reproduction.tasks import passes_of_round
from server.reproduction.timing import Log, seconds_left
from server.terms import procedure_of

# sigma, and epsilon in units of 1/255.
SIGMA_AND_EPSILON = {
    "fig1": (0.25, 128),
    "fig2": (0.5, 128),
    "fig3": (0.25, 128),
    "fig4": (0.5, 128),
    "fig5": (0.12, 128),
    "fig6": (0.12, 64),
    "fig7": (0.25, 64),
    "fig8": (0.5, 64),
    "fig9": (0.12, 256),
    "fig10": (0.25, 256),
    "fig11": (0.5, 256),
}
ABLATIONS = ("fig3", "fig4")
COMPARISONS = [name for name in SIGMA_AND_EPSILON if name not in ABLATIONS]
SCALES = ("paper", "cpu")
FEDERATED = federated_label(0.1, "stochastic")


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """Plans are made of settings and files: CIFAR-10 itself is not here."""
    monkeypatch.setattr(command, "refuse_other_data", lambda plans: None)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Plans of single figures with one seed, each composed apart from all others, below one root."""
    root = tmp_path_factory.mktemp("root")

    @functools.cache
    def make(name, scale="cpu"):
        (plan,) = make_plan([FIGURES[name]], scale, 1, [], root)
        return plan

    return make


def members_of(plan):
    return {label: member for label, (member,) in plan.members.items()}


def ablation(root, *overrides, name="fig3", num_seeds=1):
    """The plan of a small figure."""
    (plan,) = make_plan([FIGURES[name]], "cpu", num_seeds, overrides, root)
    return plan


def one_member(root, *overrides):
    """The first model of figure 3 alone: to compose takes a tenth of a second a curve."""
    figure = replace(FIGURES["fig3"], series=FIGURES["fig3"].series[:1])
    (plan,) = make_plan([figure], "cpu", 1, overrides, root)
    return plan.members[SMOOTHADV][0]


def touch_checkpoint(training, server_round):
    path = training.run_directory.checkpoint(server_round)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.with_suffix(".json").write_text(json.dumps({"sha256": "of weights"}))


def leave_summary(certifying):
    """Leave what is written last of the certificates of those weights."""
    summary = {"parameters": {"weights": "of weights"}}
    (certifying.folder / "summary.json").write_text(json.dumps(summary))


def leave_metrics(training, num_examples=500):
    """Leave the line of a round that had so much from its clients."""
    training.run_directory.append_metrics({"round": 1, "num_examples": num_examples})


def begin(training):
    """Leave what a process leaves that was killed before its first checkpoint."""
    training.run_directory.path.mkdir(parents=True, exist_ok=True)
    training.run_directory.record(training.config, "federated")


def leave_attack(task, **others):
    """Leave what a finished attack leaves, as far as it says whether it is done."""
    terms = task.terms
    rows = hashlib.sha256(task.certified.rows.read_bytes()).hexdigest()
    parameters = {"steps": terms.steps, "draws": terms.draws, "n": terms.n}
    content = {
        "parameters": parameters | {"weights": "of weights", "rows": rows} | others,
        "radii": [{"radius": radius} for radius in terms.radii],
    }
    task.result.write_text(json.dumps(content))


# The paper's settings


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SIGMA_AND_EPSILON)
def test_a_figure_has_the_papers_noise_and_budget_and_one_kind_of_certificates(
    planned, name, scale
):
    sigma, epsilon_255 = SIGMA_AND_EPSILON[name]
    plan = planned(name, scale)
    terms, images = set(), set()
    for label, member in members_of(plan).items():
        trained, certified = member.training.config, member.certifying.config
        assert trained.smoothing.sigma == (0 if label in (ADVERSARIAL, STANDARD) else sigma)
        assert certified.certified_sigma == sigma
        assert 255 * trained.attack.l2_budget == pytest.approx(epsilon_255)
        terms.add(procedure_of(certified))
        images.add((certified.dataset, certified.certification.num_images))
    assert len(terms) == len(images) == 1
    assert 255 * plan.config.attack.l2_budget == pytest.approx(epsilon_255)
    assert plan.config.certified_sigma == sigma


def test_the_papers_scale_is_the_papers_and_the_smaller_ones_are_as_documented(planned):
    for scale, num_clients, cohort, num_rounds, n in (
        ("paper", 1000, 100, 150, 100_000),
        ("cpu", 100, 10, 20, 1000),
        ("cpu-long", 100, 10, 150, 1000),
    ):
        config = members_of(planned("fig1", scale))[FEDERATED].training.config
        assert config.partition.num_clients == num_clients
        assert config.partition.samples_per_client == 500
        assert config.cohort_size == cohort
        assert config.federation.num_rounds == num_rounds
        assert (config.training.local_steps, config.training.batch_size) == (20, 30)
        assert (config.attack.attack_steps, config.smoothing.num_noise_vectors) == (2, 2)
        assert (config.dataset.name, config.model.name) == ("cifar10", "alexnet")
        assert (config.certification.n, config.certification.num_images) == (n, 500)


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_pool_is_trained_on_as_many_samples_a_round_as_a_cohort(planned, name):
    for estimator in ESTIMATORS:
        label = centralized_label(estimator)
        paper = members_of(planned(name, "paper"))[label].training.config.training
        assert (paper.local_steps, paper.batch_size) == (1000, 60)
        small = members_of(planned(name, "cpu"))[label].training.config
        of_cohort = small.cohort_size * 20 * 30
        assert small.training.local_steps * small.training.batch_size == of_cohort
        assert small.training.batch_size == 60


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_is_who_trains_gamma_and_estimator(planned, name):
    members = members_of(planned(name))
    found = {
        label: (
            member.training.is_centralized,
            None if member.training.is_centralized else member.training.config.partition.gamma,
            member.training.config.attack.estimator,
        )
        for label, member in members.items()
    }
    wanted = {centralized_label(estimator): (True, None, estimator) for estimator in ESTIMATORS}
    wanted |= {
        federated_label(gamma, estimator): (False, gamma, estimator)
        for gamma in GAMMAS
        for estimator in ESTIMATORS
    }
    assert found == wanted
    assert planned(name).speed is not None


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_trained_without_a_part_and_certified_at_the_figures_noise(planned, name):
    sigma, _ = SIGMA_AND_EPSILON[name]
    members = members_of(planned(name))
    found = {
        label: (member.training.config.smoothing.sigma, member.training.config.attack.attack_steps)
        for label, member in members.items()
    }
    assert found == {
        SMOOTHADV: (sigma, 2),
        NOISE: (sigma, 0),
        ADVERSARIAL: (0, 2),
        STANDARD: (0, 0),
    }
    assert {member.certifying.config.certified_sigma for member in members.values()} == {sigma}
    assert planned(name).speed is None


def test_the_recipe_is_held_against_figure_1_at_equal_size(planned):
    members = members_of(planned("strong"))
    ours, theirs = members[STRONG].training.config, members[PAPER].training.config
    assert theirs.plan == members_of(planned("fig1"))[FEDERATED].training.config.plan
    assert (ours.federation, ours.partition) == (theirs.federation, theirs.partition)
    assert replace(ours.training, loss=theirs.training.loss) == theirs.training
    assert (ours.attack.step_rule, ours.attack.warmup_rounds) == ("normalized", 10)
    assert 255 * ours.attack.l2_budget == pytest.approx(64)
    assert ours.certified_sigma == theirs.certified_sigma == 0.25


# Sharing


def test_no_model_is_trained_twice_and_no_folder_is_for_two(planned):
    def same(one, other):
        configs = [replace(training.config, name="x", run_dir=None) for training in (one, other)]
        return configs[0] == configs[1] and one.is_centralized == other.is_centralized

    trainings = [
        member.training
        for figure in figures_named(["all", "strong"])
        for member in members_of(planned(figure.name)).values()
    ]
    for one, other in combinations(trainings, 2):
        is_one_folder = one.run_directory.path == other.run_directory.path
        assert same(one, other) == is_one_folder, (one.name, other.name)
        assert is_one_folder == (one.title == other.title)


def test_all_figures_are_58_models_with_60_files_of_certificates(planned):
    plans = [planned(figure.name) for figure in figures_named(["all"])]
    members = [member for plan in plans for member in members_of(plan).values()]
    assert len(members) == 9 * 6 + 2 * 4
    # Figure 3's SmoothAdv is figure 1's, figure 4's is figure 2's; what is trained without noise is shared.
    assert len({member.training.name for member in members}) == len(members) - 4
    assert len({member.certifying.folder for member in members}) == len(members) - 2
    assert len({task.title for plan in plans for task in plan.tasks}) == 58 + 60 + 60 + 1


def test_figures_share_smoothadv_and_what_is_trained_without_noise(planned):
    first, second, third, fourth = (
        members_of(planned(name)) for name in ("fig1", "fig2", "fig3", "fig4")
    )
    assert third[SMOOTHADV].training == first[FEDERATED].training
    assert fourth[SMOOTHADV].training == second[FEDERATED].training
    assert third[SMOOTHADV].certifying.folder == first[FEDERATED].certifying.folder
    for label in (STANDARD, ADVERSARIAL):
        assert third[label].training == fourth[label].training
        assert third[label].certifying.folder != fourth[label].certifying.folder
        assert third[label].certifying.title != fourth[label].certifying.title
    assert third[NOISE].training != fourth[NOISE].training


def test_a_seed_is_a_model_of_its_own_and_only_the_first_is_attacked(tmp_path):
    plan = ablation(tmp_path, num_seeds=3)
    for members in plan.members.values():
        assert [member.seed for member in members] == [0, 1, 2]
        assert [member.training.config.seed for member in members] == [0, 1, 2]
        assert [member.certifying.config.seed for member in members] == [0, 1, 2]
        assert len({member.training.run_directory.path for member in members}) == 3
        assert [member.attacking is not None for member in members] == [True, False, False]
        assert members[0].attacking.terms.radii == (0.25, 0.5)
    # The first seed's models make a figure, so they come first; each after what it needs.
    tasks = [task.title for task in plan.tasks]
    assert len(tasks) == 4 * (3 + 2 + 2)
    assert all("seed0" in title for title in tasks[:12])
    for chain in plan.chains:
        assert [task.title.partition(" ")[0] for task in chain] in (
            ["train", "certify", "attack"],
            ["train", "certify"],
        )


def test_other_terms_of_certificates_are_another_folder_and_the_same_model(tmp_path):
    def folder(*overrides):
        return one_member(tmp_path, *overrides).certifying.folder

    others = [
        "certification.n=500",
        "certification.n0=50",
        "certification.alpha=0.01",
        "certification.num_images=100",
        "certification.num_images=null",
        "certification.precision=float32",
    ]
    folders = [folder(), *map(folder, others)]
    assert len(set(folders)) == len(folders)
    assert len({path.parent for path in folders}) == 1
    assert folder("certification.radius_step=0.1") == folders[0]  # of the table alone
    assert folder("certification.batch_size=7", "runtime.threads=2") == folders[0]


# What is asked for


def test_figures_are_named_in_any_number_each_once():
    assert [figure.name for figure in figures_named(["fig2", "fig1", "fig2"])] == ["fig2", "fig1"]
    every = [figure.name for figure in figures_named(["all"])]
    assert sorted(every) == sorted(SIGMA_AND_EPSILON)
    assert [figure.name for figure in figures_named(["fig4", "all", "fig1"])] == [
        "fig4",
        *(name for name in every if name != "fig4"),
    ]
    assert [figure.name for figure in figures_named(["all", "strong"])] == [*every, "strong"]


@pytest.mark.parametrize(
    ("words", "scale", "num_seeds", "said"),
    [
        (["fig12"], "cpu", 1, "'fig12' is no figure: allowed are fig1 to fig11, strong, or all."),
        (["fig1", "figure3"], "cpu", 1, "'figure3' is no figure"),
        ([], "cpu", 1, "Which figure?"),
        (["seed=1"], "cpu", 1, "Which figure?"),
        (["fig3"], "cpu", 0, "--seeds 0 trains nothing: allowed is 1 or more."),
        (["fig3"], "cpu", -1, "--seeds -1 trains nothing"),
        (["fig3"], "gpu", 1, "--scale gpu is unknown: allowed are paper, cpu, cpu-long."),
    ],
)
def test_what_cannot_be_asked_for_is_one_sentence(tmp_path, console, words, scale, num_seeds, said):
    with pytest.raises(ConfigError) as refused:
        reproduce(words, scale, num_seeds, tmp_path / "root", None, False, console)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "override",
    [
        "smoothing.sigma=0.5",
        "+smoothing.sigma=0.5",
        "++seed=3",
        "seed=3",
        "attack=salman",
        "attack.attack_steps=0",
        "attack.estimator=one_point",
        "attack.epsilon_255=64",
        "attack.epsilon=1",
        "partition=iid",
        "partition.scheme=iid",
        "partition.gamma=0.3",
        "experiment=fig2",
        "scale=cpu",
        "training=centralized",
        "certification.sigma=0.5",
        "certification.at_end=true",
        "certification.every=1",
        "service.address=127.0.0.1:1",
        "run_dir=x",
        "name=x",
        "resume=true",
    ],
)
def test_a_setting_that_says_what_a_curve_is_is_refused(tmp_path, override):
    with pytest.raises(ConfigError) as refused:
        one_member(tmp_path, override)
    assert str(refused.value).startswith(f"{override} says what a curve is")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        "training.momentun=0.5",
        "training.momentum=2",
        "certification.num_images=1",
        "model=alexnett",
        "dataset=imagenet",
        "training.momentum=0.5,0.9",
        "~training.momentum=0.5",
        "=",
    ],
)
def test_a_setting_that_is_none_is_refused_in_one_sentence(tmp_path, override):
    with pytest.raises(ConfigError) as refused:
        one_member(tmp_path, override)
    assert "\n" not in str(refused.value)


def test_settings_that_all_curves_share_pass(tmp_path):
    plan = ablation(
        tmp_path,
        "dataset=digits",
        "dataset.root=/data",
        "model=small_cnn",
        "partition.num_clients=10",
        "partition.samples_per_client=40",
        "federation.num_rounds=2",
        "training.local_steps=3",
        "training.momentum=0.5",
        "attack.step_size=0.1",
        "certification.n=200",
        "runtime.threads=1",
    )
    for member in members_of(plan).values():
        config = member.training.config
        assert (config.dataset.name, config.dataset.root) == ("digits", "/data")
        assert (config.model.name, config.partition.num_clients) == ("small_cnn", 10)
        assert (config.federation.num_rounds, config.federation.checkpoint_every) == (2, 5)
        assert (config.training.local_steps, config.training.momentum) == (3, 0.5)
        assert config.attack.step_size == 0.1
        assert member.certifying.config.certification.n == 200


def test_a_folder_may_be_called_anything(tmp_path):
    root = tmp_path / "Kim's runs, $HOME {a=b} [1]"
    training = one_member(root).training
    assert training.run_directory.path.parent == root / "models"


# What is in the folder already


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.momentum=0.5"], ["training.momentum=0.5 (was 0.9)"]),
        (
            ["federation.num_rounds=30", "partition.num_clients=200"],
            ["federation.num_rounds=30 (was 20)", "partition.num_clients=200 (was 100)"],
        ),
        (["federation.num_rounds=5"], ["federation.num_rounds=5 (was 20)"]),
        (["runtime.precision=float32"], ["runtime.precision=float32 (was bfloat16)"]),
        (["federation.cohort_fraction=0.2"], ["federation.cohort_fraction=0.2 (was 0.1)"]),
        (["dataset=cifar100"], ["dataset.name=cifar100 (was cifar10)"]),
        (["model=resnet20"], ["model.name=resnet20 (was alexnet)"]),
        (["aggregation.max_update_norm=3"], ["aggregation.max_update_norm=3.0 (was null)"]),
        (["federation.over_selection=3"], ["federation.over_selection=3.0 (was 0.0)"]),
        (["federation.quorum=1"], ["federation.quorum=1.0 (was 0.5)"]),
        (["federation.max_num_examples=9"], ["federation.max_num_examples=9 (was null)"]),
    ],
)
def test_a_model_of_other_settings_is_refused(tmp_path, overrides, said):
    training = one_member(tmp_path).training
    begin(training)
    with pytest.raises(ConfigError) as refused:
        one_member(tmp_path, *overrides)
    for part in (str(training.run_directory.path), "-o", *said):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_it_is_refused_before_anything_is_done(tmp_path, console):
    begin(ablation(tmp_path).members[STANDARD][0].training)
    files = sorted(tmp_path.rglob("*"))
    words = ["fig4", "fig3", "training.momentum=0.5"]
    with pytest.raises(ConfigError, match=r"training\.momentum=0\.5 \(was 0\.9\)"):
        reproduce(words, "cpu", 1, tmp_path, None, False, console)
    assert sorted(tmp_path.rglob("*")) == files
    assert console.file.getvalue() == ""


def test_models_of_one_scale_are_not_taken_for_those_of_the_other(tmp_path):
    begin(one_member(tmp_path).training)
    with pytest.raises(ConfigError, match=r"federation\.num_rounds=150 \(was 20\)"):
        make_plan([FIGURES["fig3"]], "paper", 1, [], tmp_path)


def test_what_does_not_change_a_model_may_differ_from_when_it_was_begun(tmp_path):
    begin(one_member(tmp_path).training)
    free = ["dataset.root=/elsewhere", "certification.n=500", "runtime.threads=2"]
    assert one_member(tmp_path, *free, "runtime.engine=plain", "federation.attempts=5").tasks


def test_a_record_that_is_damaged_is_one_sentence(tmp_path):
    training = one_member(tmp_path).training
    begin(training)
    path = training.run_directory.path / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["training"]["momentum"]
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=r"lacks the setting training\.momentum"):
        one_member(tmp_path)


def test_what_a_model_was_trained_with_is_what_is_compared(tmp_path):
    """Every setting that clients receive, but for where the images are."""
    config = one_member(tmp_path).training.config
    compared = planning._of_training(config)
    sent = to_nested(TrainingPlan())
    wanted = {
        f"{section}.{key}" if key else section
        for section, values in sent.items()
        for key in (values if isinstance(values, dict) else [""])
    } - {"dataset.root"}
    absent = {key for key in wanted if key.replace("_", "-") not in compared}
    # None is left out of it; two that differ are told apart all the same.
    assert absent == {"dataset.image_size", "attack.epsilon"}


# What is left, and how long it takes


def test_the_work_of_a_training_falls_with_its_checkpoints(tmp_path):
    training = one_member(tmp_path).training
    config = training.config
    a_round = config.cohort_size * passes_of_round(config)
    assert training.config.federation.checkpoint_every == 5
    assert training.work_left() == 20 * a_round
    for done in (0, 5, 15):
        touch_checkpoint(training, done)
        assert training.work_left() == (20 - done) * a_round
    training.run_directory.checkpoint(20).touch()  # without its record it is not complete
    assert training.work_left() == 5 * a_round
    touch_checkpoint(training, 20)
    leave_metrics(training)
    assert training.work_left() == 0


def test_a_model_that_no_client_has_trained_is_not_done(tmp_path):
    training = one_member(tmp_path).training
    touch_checkpoint(training, 20)
    assert training.work_left() > 0
    leave_metrics(training, num_examples=0)
    assert training.work_left() > 0
    leave_metrics(training)
    assert training.work_left() == 0


def test_the_pool_is_one_client(planned):
    member = members_of(planned("fig1"))[centralized_label("stochastic")]
    federated = members_of(planned("fig1"))[FEDERATED]
    assert member.training.work_left() == federated.training.work_left()


def test_passes_are_those_of_the_attack_and_of_training(planned):
    members = members_of(planned("fig1")) | members_of(planned("fig3"))

    def passes(label):
        return passes_of_round(members[label].training.config)

    batch = 20 * 30
    assert passes(SMOOTHADV) == batch * 2 * (2 * 2 + 3)
    assert passes(federated_label(0.1, "one_point")) == batch * 2 * (2 * 1 + 3)
    assert passes(NOISE) == batch * 2 * 3
    assert passes(ADVERSARIAL) == batch * (2 * 2 + 3)  # without noise there is one copy
    assert passes(STANDARD) == batch * 3


def test_the_work_of_a_certification_falls_with_its_rows(tmp_path):
    task = one_member(tmp_path).certifying
    of_image = 100 + 1000
    assert task.work_left() == 500 * of_image
    task.folder.mkdir(parents=True)
    header = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    # Whatever a crash leaves: nothing, a part of the header, a torn line.
    for text, done in [
        ("", 0),
        (header[:10], 0),
        (header, 0),
        (header + "0\t1\t1\t0.5\t1\t0.1\n", 1),
        (header + "0\t1\t1\t0.5\t1\t0.1\n20\t1", 1),
    ]:
        task.rows.write_text(text)
        assert task.work_left() == (500 - done) * of_image
    task.rows.write_text(header + "0\t1\t1\t0.5\t1\t0.1\n" * 500)
    assert task.work_left() == of_image  # the summary is missing
    leave_summary(task)
    assert task.work_left() > 0  # certificates of weights that are not there
    touch_checkpoint(task.model, 20)
    assert task.work_left() == 0


def test_an_attack_is_done_when_its_figures_are_there_of_these_terms(tmp_path):
    task = one_member(tmp_path).attacking
    terms = task.terms
    of_image = 2 * (2 * terms.steps * terms.draws + terms.n)  # at two radii
    work = terms.images * of_image
    assert (task.work_left(), task.read()) == (work, None)
    task.result.parent.mkdir(parents=True)
    task.certified.rows.write_text("the rows")
    touch_checkpoint(task.certified.model, 20)
    leave_attack(task)
    assert task.work_left() == 0
    assert task.read() == [{"radius": 0.25}, {"radius": 0.5}]
    others = [{"steps": 1}, {"draws": 1}, {"n": 50}, {"radii": (0.25,)}, {"radii": (0.5, 0.25)}]
    for other in others:
        leave_attack(replace(task, terms=replace(terms, **other)))
        assert (task.work_left(), task.read()) == (work, None)
    for other in ({"weights": "of others"}, {"rows": "others"}):
        leave_attack(task, **other)
        assert (task.work_left(), task.read()) == (work, None)
    for text in ("", "{", "[]", "{}", '{"radii": []}', '{"radii": 5, "parameters": 3}'):
        task.result.write_text(text)
        assert (task.work_left(), task.read()) == (work, None)


class Fixed:
    """A task of so much work."""

    def __init__(self, title, category, work):
        self.title, self.category, self._work = title, category, work

    def work_left(self):
        return self._work


def test_a_log_adds_up_and_does_not_mind_a_torn_line(tmp_path):
    path = tmp_path / "tasks.jsonl"
    log = Log(path)
    assert log.rates() == {}
    one, other = Fixed("train a", "training", 0), Fixed("certify a", "certification", 0)
    log.append(one, 1000, 10.0)
    with path.open("a") as file:
        file.write('{"task": "train a", "category": "trai')  # and the machine stopped
    log.append(one, 500, 5.0)
    log.append(other, 1500, 1.0)
    with path.open("a") as file:
        file.write('["no", "line"]\n{"task": "train a", "seconds": 3.0}\n\n')
    with path.open("ab") as file:
        file.write(
            b'\xff\xfe\n{"task": "train a", "category": "training", "work": 5, "seconds": 0.0}\n'
        )
        file.write(b'{"task": "train a", "category": "training", "work": 5, "seconds": Infinity}\n')
        file.write(b'{"task": "train a", "category": "training", "work": -5, "seconds": 1.0}\n')
    assert log.seconds_of("train a") == 15
    assert log.seconds_of("certify a") == 1
    assert log.seconds_of("train b") is None
    rates = log.rates()
    assert rates["training"] == pytest.approx(100)
    assert rates["certification"] == pytest.approx(1500)
    assert rates[""] == pytest.approx(3000 / 16)


def test_what_is_left_takes_as_long_as_its_category_took_or_else_as_all_together():
    rates = {"training": 10.0, "": 40.0}
    tasks = [Fixed("a", "training", 100), Fixed("b", "attack", 80), Fixed("c", "training", 0)]
    assert seconds_left(tasks, rates) == pytest.approx(100 / 10 + 80 / 40)
    assert seconds_left([], rates) == 0
    assert math.isnan(seconds_left(tasks, {}))


def shown(root, *words, num_seeds=1):
    """Show the plan of figures; nothing is trained, not even to measure how fast."""
    console = Console(file=io.StringIO(), width=200)
    reproduce(words, "cpu", num_seeds, root, None, True, console)
    return console.file.getvalue()


@pytest.fixture
def known_rate(monkeypatch):
    monkeypatch.setattr(command, "measured_rate", lambda config: 1e6)


def left(text, label):
    """What the table says of a series."""
    (line,) = (line for line in text.splitlines() if f" {label} " in line)
    return line.partition(f" {label} ")[2].strip()


def finish(member):
    """Leave the files that say that all of a model's tasks are done."""
    touch_checkpoint(member.training, 20)
    leave_metrics(member.training)
    member.certifying.folder.mkdir(parents=True, exist_ok=True)
    member.certifying.rows.write_text("the rows")
    leave_summary(member.certifying)
    leave_attack(member.attacking)


def test_after_a_kill_what_is_left_is_the_plan(tmp_path, known_rate):
    text = shown(tmp_path, "fig3")
    assert left(text, SMOOTHADV).startswith("3 of 3 tasks")
    assert "12 tasks left" in text
    members = members_of(ablation(tmp_path))
    finish(members[SMOOTHADV])
    members[SMOOTHADV].attacking.result.unlink()
    begin(members[NOISE].training)
    touch_checkpoint(members[NOISE].training, 15)
    finish(members[STANDARD])
    text = shown(tmp_path, "fig3")
    assert left(text, SMOOTHADV).startswith("1 of 3 tasks")
    assert left(text, NOISE).startswith("3 of 3 tasks")
    assert left(text, ADVERSARIAL).startswith("3 of 3 tasks")
    assert left(text, STANDARD) == "nothing"
    assert "7 tasks left" in text
    for member in members.values():
        finish(member)
    assert "Nothing is left to train or certify." in shown(tmp_path, "fig3")


def test_what_would_compare_nothing_is_refused(tmp_path):
    for override, said in [
        ("certification.num_images=1", "compares nothing"),
        ("certification.method=sequential", "radii on a grid alone"),
        ("certification.radius_step=0.0001", "too small for radii up to"),
    ]:
        with pytest.raises(ConfigError, match=said):
            make_plan([FIGURES["fig1"]], "cpu", 1, [override], tmp_path)


def test_seeds_that_are_done_belong_to_the_figure_whatever_number_is_asked_for(tmp_path):
    for members in ablation(tmp_path, num_seeds=2).members.values():
        for member in members:
            touch_checkpoint(member.training, 20)
            member.certifying.folder.mkdir(parents=True)
            leave_summary(member.certifying)
    seeds = [member.seed for member in ablation(tmp_path).members[NOISE]]
    assert seeds == [0, 1]
    # A seed of which a curve is missing is not shown, for curves are compared seed by seed.
    missing = ablation(tmp_path, num_seeds=2).members[NOISE][1].certifying
    (missing.folder / "summary.json").unlink()
    assert len(ablation(tmp_path).members[SMOOTHADV]) == 1
    assert len(ablation(tmp_path, num_seeds=3).members[SMOOTHADV]) == 3


def test_how_long_it_takes_is_unknown_without_the_data(tmp_path, monkeypatch, console):
    def no_data(config):
        raise DataError("cifar10 is not there.")

    monkeypatch.setattr(command, "measured_rate", no_data)
    assert "12 tasks left, about an unknown time." in shown(tmp_path, "fig3")
    with pytest.raises(DataError):
        reproduce(["fig3"], "cpu", 1, tmp_path / "root", None, False, console)
    assert not (tmp_path / "root").exists()


def test_what_figures_share_is_counted_once(tmp_path, known_rate):
    text = shown(tmp_path, "fig3", "fig4")
    head, _, tail = text.partition("fig4")
    assert left(head, STANDARD).startswith("3 of 3 tasks")
    assert left(tail, STANDARD).startswith("2 of 3 tasks")
    assert left(tail, SMOOTHADV).startswith("3 of 3 tasks")
    assert "22 tasks left" in text


def test_a_plan_takes_as_long_as_was_measured_and_writes_nothing(tmp_path, monkeypatch):
    work = sum(task.work_left() for task in ablation(tmp_path / "root").tasks)
    monkeypatch.setattr(command, "measured_rate", lambda config: work / 60)
    assert "12 tasks left, about 60 s." in shown(tmp_path / "root", "fig3")
    monkeypatch.setattr(command, "measured_rate", lambda config: work / 3600)
    assert "12 tasks left, about 60 min." in shown(tmp_path / "root", "fig3")
    monkeypatch.setattr(command, "measured_rate", lambda config: work / 36000)
    assert "12 tasks left, about 10 h 0 min." in shown(tmp_path / "root", "fig3")
    assert not (tmp_path / "root").exists()


def test_finished_tasks_say_how_long_the_rest_takes(tmp_path, monkeypatch):
    monkeypatch.delattr(command, "measured_rate")
    tasks = ablation(tmp_path).tasks
    work = sum(task.work_left() for task in tasks)
    Log(tmp_path / "tasks.jsonl").append(Fixed("another", "another", 0), work, 90.0)
    assert "12 tasks left, about 90 s." in shown(tmp_path, "fig3")
