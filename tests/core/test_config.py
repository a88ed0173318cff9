"""Settings: every violation is one sentence, and what is valid survives every way of writing it."""

import dataclasses
from typing import get_args, get_type_hints

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedsmooth_core.config import (
    AggregationConfig,
    AttackConfig,
    CertificationConfig,
    DatasetConfig,
    EvaluationConfig,
    FederationConfig,
    ModelConfig,
    PartitionConfig,
    RunConfig,
    RuntimeConfig,
    Section,
    ServiceConfig,
    SmoothingConfig,
    TrainingConfig,
    TrainingPlan,
    from_flat,
    from_nested,
    to_flat,
    to_nested,
)
from fedsmooth_core.errors import ConfigError

SECTIONS = [
    DatasetConfig,
    PartitionConfig,
    ModelConfig,
    SmoothingConfig,
    AggregationConfig,
    AttackConfig,
    TrainingConfig,
    FederationConfig,
    EvaluationConfig,
    CertificationConfig,
    ServiceConfig,
    RuntimeConfig,
]

naturals = st.integers(1, 10**9)
positives = st.floats(1e-9, 1e6)
names = st.text(min_size=1, max_size=20)


def section(cls, **fields):
    return st.builds(cls, **fields)


@st.composite
def attacks(draw):
    in_255 = draw(st.booleans())
    step_rule = draw(st.sampled_from(["gradient", "normalized"]))
    estimator = draw(st.sampled_from(["stochastic", "one_point"]))
    reductions = ["none"] if estimator == "stochastic" else ["none", "antithetic", "leave_one_out"]
    return AttackConfig(
        attack_steps=draw(st.integers(0, 100)),
        step_rule=step_rule,
        step_size=draw(positives if step_rule == "gradient" else st.none() | positives),
        epsilon=None if in_255 else draw(st.floats(0, 15.9)),
        epsilon_255=draw(st.just(0.0) | st.floats(1, 1e4)) if in_255 else None,
        estimator=estimator,
        variance_reduction=draw(st.sampled_from(reductions)),
    )


plan_parts = {
    "seed": st.integers(0, 2**62),
    "dataset": section(
        DatasetConfig,
        name=names,
        root=names,
        image_size=st.none() | naturals,
        flip=st.booleans(),
        crop_padding=st.integers(0, 99),
    ),
    "partition": section(
        PartitionConfig,
        scheme=st.sampled_from(["major_class", "iid", "dirichlet"]),
        num_clients=st.integers(1, 1_000_000),
        samples_per_client=st.none() | naturals,
        gamma=st.floats(0, 1),
        concentration=positives,
    ),
    "model": section(ModelConfig, name=names, init=st.sampled_from(["he", "default"])),
    "smoothing": section(SmoothingConfig, sigma=positives, num_noise_vectors=st.integers(2, 64)),
    "attack": attacks(),
    "training": section(
        TrainingConfig,
        local_steps=naturals,
        batch_size=naturals,
        learning_rate=positives,
        momentum=st.floats(0, 1, exclude_max=True),
        weight_decay=st.floats(0, 1),
        loss=st.sampled_from(["smoothed", "cross_entropy"]),
    ),
}
run_parts = {
    "name": st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", fullmatch=True),
    "run_dir": st.none() | names,
    "federation": section(
        FederationConfig,
        num_rounds=naturals,
        cohort_fraction=st.floats(0, 1, exclude_min=True),
        checkpoint_every=naturals,
        max_num_examples=naturals,
        deadline_seconds=positives,
        over_selection=st.floats(0, 10),
        quorum=st.floats(0, 1, exclude_min=True),
        attempts=st.integers(1, 99),
        strikes=st.integers(1, 99),
        suspension_rounds=st.integers(0, 99),
        connect_timeout_seconds=positives,
    ),
    "aggregation": section(
        AggregationConfig,
        rule=st.just("fedavg"),  # the others need cohorts of some size
        max_update_norm=st.none() | positives,
        trimmed_fraction=st.floats(0, 0.5, exclude_max=True),
        num_malicious=st.integers(0, 99),
    ),
    "evaluation": section(EvaluationConfig, every=st.integers(0, 99), batch_size=naturals),
    "certification": section(
        CertificationConfig,
        at_end=st.booleans(),
        every=st.integers(0, 99),
        sigma=st.none() | positives,
        n0=naturals,
        n=naturals,
        alpha=st.floats(0, 1, exclude_min=True, exclude_max=True),
        num_images=st.none() | naturals,
        batch_size=naturals,
        radius_step=positives,
    ),
    "service": section(
        ServiceConfig,
        address=st.sampled_from(["127.0.0.1:9100", "certifier:1"]),
        dataset=st.none() | st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", fullmatch=True),
        token_file=st.none() | names,
        insecure=st.booleans(),
        patience_seconds=st.floats(0, 1e6),
    ),
    "runtime": section(
        RuntimeConfig,
        device=st.sampled_from(["auto", "cpu", "cuda"]),
        threads=st.none() | naturals,
    ),
}
plans = st.builds(TrainingPlan, **plan_parts)
runs = st.builds(RunConfig, **plan_parts, **run_parts)


def refusal(make, *args, **kwargs):
    """Return the one sentence that making something is refused with."""
    with pytest.raises(ConfigError) as error:
        make(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    return message


# --- round trips


@given(run=runs)
def test_a_run_comes_back_from_nested_and_from_flat_as_it_was(run):
    assert from_nested(RunConfig, to_nested(run)) == run
    assert from_flat(RunConfig, to_flat(run)) == run


@given(plan=plans)
def test_a_flat_plan_is_scalars_under_kebab_case_keys(plan):
    flat = to_flat(plan)
    assert all(type(value) in (str, int, float, bool) for value in flat.values())
    assert all("_" not in key for key in flat)
    assert from_flat(TrainingPlan, flat) == plan


@given(run=runs)
def test_the_plan_of_a_run_is_its_training_part(run):
    nested = to_nested(run)
    assert to_nested(run.plan) == {key: nested[key] for key in plan_parts}


@given(plan=plans, data=st.data())
def test_a_missing_flat_key_is_named_unless_it_may_be_null(plan, data):
    flat = to_flat(plan)
    key = data.draw(st.sampled_from(sorted(flat)))
    del flat[key]
    optional = ("dataset.image-size", "partition.samples-per-client")
    if key in optional:
        assert key not in to_flat(from_flat(TrainingPlan, flat))
    elif key == "attack.step-size" and plan.attack.step_rule == "normalized":
        assert from_flat(TrainingPlan, flat).attack.step_size is None
    elif key == "attack.step-size":
        assert "attack.step_size=null" in refusal(from_flat, TrainingPlan, flat)
    elif key in ("attack.epsilon", "attack.epsilon-255"):
        assert "exactly one" in refusal(from_flat, TrainingPlan, flat)
    else:
        assert refusal(from_flat, TrainingPlan, flat).startswith(f"{key} is missing")


def test_an_unknown_flat_key_is_named():
    flat = to_flat(TrainingPlan()) | {"smoothing.sigmas": 1.0}
    assert refusal(from_flat, TrainingPlan, flat) == (
        "smoothing.sigmas is not a setting: did you mean smoothing.sigma?"
    )


def test_what_is_absent_from_a_nested_mapping_keeps_its_default():
    run = from_nested(RunConfig, {"smoothing": {"sigma": 0.5}})
    assert run == dataclasses.replace(RunConfig(), smoothing=SmoothingConfig(sigma=0.5))


def test_whole_numbers_are_welcome_where_a_number_is_and_become_floats():
    run = from_nested(RunConfig, {"smoothing": {"sigma": 1}, "attack": {"epsilon_255": 64}})
    assert type(run.smoothing.sigma) is float
    assert type(run.attack.epsilon_255) is float


# --- refusals


def all_settings():
    for cls in [*SECTIONS, TrainingPlan, RunConfig]:
        hints = get_type_hints(cls)
        prefix = f"{cls.SECTION}." if hasattr(cls, "SECTION") else ""
        for item in dataclasses.fields(cls):
            hint = hints[item.name]
            if not (isinstance(hint, type) and issubclass(hint, Section)):
                yield pytest.param(
                    cls, item.name, hint, f"{prefix}{item.name}", id=cls.__name__ + "." + item.name
                )


def wrong_typed(hint):
    types = get_args(hint) or (hint,)
    values = [[1], {"a": 1}]
    if type(None) not in types:
        values.append(None)
    if str not in types:
        values.append("no such value")
    if bool not in types:
        values.append(True)
    if int not in types and float not in types:
        values.append(3)
    if float not in types:
        values.append(1.5)
    return values


@pytest.mark.parametrize(("cls", "name", "hint", "key"), list(all_settings()))
def test_every_setting_refuses_every_wrong_type_by_name(cls, name, hint, key):
    for value in wrong_typed(hint):
        message = refusal(cls, **{name: value})
        assert message.startswith(f"{key}={value!r} has the wrong type: allowed is ")


OUT_OF_RANGE = [
    (DatasetConfig, "image_size", [0, -8], "a number >= 1"),
    (DatasetConfig, "crop_padding", [-1], "a number >= 0"),
    (PartitionConfig, "scheme", ["IID", ""], "one of major_class, iid, dirichlet"),
    (
        RunConfig,
        "name",
        ["", "../x", "a b", ".hidden"],
        "a name of letters, digits, dots, dashes and underscores",
    ),
    (PartitionConfig, "num_clients", [0, 1_000_001], "a number in [1, 1000000]"),
    (PartitionConfig, "samples_per_client", [0], "a number >= 1"),
    (PartitionConfig, "gamma", [-0.1, 1.1], "a number in [0, 1]"),
    (PartitionConfig, "concentration", [0.0, -1.0], "a number > 0"),
    (ModelConfig, "init", ["xavier"], "one of he, default"),
    (SmoothingConfig, "sigma", [-0.25], "a number >= 0"),
    (SmoothingConfig, "num_noise_vectors", [0], "a number >= 1"),
    (AttackConfig, "warmup_rounds", [-1], "a number >= 0"),
    (AttackConfig, "attack_steps", [-1], "a number >= 0"),
    (AttackConfig, "step_rule", ["sign"], "one of gradient, normalized"),
    (AttackConfig, "step_size", [0.0, -0.1], "a number > 0"),
    (AttackConfig, "epsilon", [-0.5], "a number >= 0"),
    (AttackConfig, "epsilon_255", [-128.0], "a number >= 0"),
    (AttackConfig, "estimator", ["reinforce"], "one of stochastic, one_point"),
    (AttackConfig, "variance_reduction", ["some"], "one of none, antithetic, leave_one_out"),
    (TrainingConfig, "local_steps", [0], "a number >= 1"),
    (TrainingConfig, "batch_size", [0], "a number >= 1"),
    (TrainingConfig, "learning_rate", [0.0, -1.0], "a number > 0"),
    (TrainingConfig, "momentum", [-0.1, 1.0], "a number in [0, 1)"),
    (TrainingConfig, "weight_decay", [-1e-4], "a number >= 0"),
    (TrainingConfig, "loss", ["mse"], "one of smoothed, cross_entropy"),
    (FederationConfig, "num_rounds", [0], "a number >= 1"),
    (FederationConfig, "cohort_fraction", [0.0, 1.01], "a number in (0, 1]"),
    (FederationConfig, "checkpoint_every", [0], "a number >= 1"),
    (FederationConfig, "max_num_examples", [0], "a number >= 1"),
    (FederationConfig, "deadline_seconds", [0.0], "a number > 0"),
    (FederationConfig, "over_selection", [-0.1, 10.5], "a number in [0, 10]"),
    (FederationConfig, "quorum", [0.0, 1.1], "a number in (0, 1]"),
    (FederationConfig, "attempts", [0], "a number >= 1"),
    (FederationConfig, "strikes", [0], "a number >= 1"),
    (FederationConfig, "suspension_rounds", [-1], "a number >= 0"),
    (AggregationConfig, "rule", ["mean"], "one of fedavg, median, trimmed_mean, krum"),
    (AggregationConfig, "max_update_norm", [0.0], "a number > 0"),
    (AggregationConfig, "trimmed_fraction", [-0.1, 0.5], "a number in [0, 0.5)"),
    (AggregationConfig, "num_malicious", [-1], "a number >= 0"),
    (FederationConfig, "connect_timeout_seconds", [0.0], "a number > 0"),
    (EvaluationConfig, "every", [-1], "a number >= 0"),
    (EvaluationConfig, "batch_size", [0], "a number >= 1"),
    (CertificationConfig, "method", ["both"], "one of fixed, sequential"),
    (CertificationConfig, "precision", ["float16"], "one of float32, bfloat16"),
    (CertificationConfig, "sigma", [0.0, -0.5], "a number > 0"),
    (CertificationConfig, "every", [-1], "a number >= 0"),
    (CertificationConfig, "n0", [0], "a number >= 1"),
    (CertificationConfig, "n", [0], "a number >= 1"),
    (CertificationConfig, "alpha", [0.0, 1.0], "a number in (0, 1)"),
    (CertificationConfig, "num_images", [0], "a number >= 1"),
    (CertificationConfig, "batch_size", [0], "a number >= 1"),
    (CertificationConfig, "radius_step", [0.0], "a number > 0"),
    (
        ServiceConfig,
        "address",
        ["9100", "a:0"],
        "HOST:PORT with a port in 1 to 65535, e.g. 127.0.0.1:9464",
    ),
    (
        ServiceConfig,
        "dataset",
        ["", "a/b"],
        "a name of letters, digits, dots, dashes and underscores",
    ),
    (ServiceConfig, "patience_seconds", [-1.0], "a number >= 0"),
    (RuntimeConfig, "device", ["tpu"], "one of auto, cpu, cuda"),
    (RuntimeConfig, "threads", [0], "a number >= 1"),
    (RuntimeConfig, "engine", ["fast"], "one of auto, plain, stacked, vmap"),
    (RuntimeConfig, "precision", ["fp16"], "one of float32, tf32, bfloat16"),
    (
        RuntimeConfig,
        "metrics_address",
        ["9464", "a:0", "a:65536", ":9464"],
        "HOST:PORT with a port in 1 to 65535, e.g. 127.0.0.1:9464",
    ),
    (TrainingPlan, "seed", [-1, 2**62 + 1], f"a number in [0, {2**62}]"),
]


@pytest.mark.parametrize(
    ("cls", "name", "values", "allowed"),
    OUT_OF_RANGE,
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(cls, name, values, allowed):
    prefix = f"{cls.SECTION}." if hasattr(cls, "SECTION") else ""
    for value in values:
        assert refusal(cls, **{name: value}) == (
            f"{prefix}{name}={value!r} is out of range: allowed is {allowed}."
        )


def test_every_number_and_choice_has_its_range_tested():
    """A new setting with a range joins the table above."""
    declared = {
        (cls, item.name)
        for cls in [*SECTIONS, TrainingPlan, RunConfig]
        for item in dataclasses.fields(cls)
        if "allowed" in item.metadata and not (cls is RunConfig and item.name == "seed")
    }
    assert declared == {(cls, name) for cls, name, _, _ in OUT_OF_RANGE}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("cls", "name"),
    [(SmoothingConfig, "sigma"), (AttackConfig, "epsilon_255"), (TrainingConfig, "learning_rate")],
)
def test_numbers_are_finite(cls, name, value):
    assert f"{cls.SECTION}.{name}={value!r} is not finite" in refusal(cls, **{name: value})


def test_an_unknown_key_is_named_with_the_nearest_or_all_known_ones():
    assert refusal(from_nested, RunConfig, {"smoothing": {"sigme": 1}}) == (
        "smoothing.sigme is not a setting: did you mean smoothing.sigma?"
    )
    message = refusal(from_nested, EvaluationConfig, {"xyz": 1})
    assert message == "xyz is not a setting: allowed are batch_size, every."


@pytest.mark.parametrize("value", [None, 3, "digits", [1]])
def test_a_group_is_a_mapping(value):
    assert refusal(from_nested, RunConfig, {"dataset": value}) == (
        f"dataset={value!r} has the wrong type: allowed is a group of settings."
    )


def test_a_nested_refusal_names_the_whole_key():
    message = refusal(from_nested, RunConfig, {"smoothing": {"sigma": -1.0}})
    assert message.startswith("smoothing.sigma=-1.0 is out of range")


# --- epsilon


def test_epsilon_255_is_in_units_of_1_255_and_epsilon_in_pixel_units():
    assert AttackConfig(epsilon_255=128).l2_budget == 128 / 255
    assert AttackConfig(epsilon=0.5, epsilon_255=None).l2_budget == 0.5
    assert AttackConfig(epsilon_255=0).l2_budget == 0


@pytest.mark.parametrize("server_round", [1, 2, 5, 9, 10, 11, 1000])
def test_a_budget_grows_in_equal_steps_and_a_step_of_null_with_it(server_round):
    attack = AttackConfig(
        step_rule="normalized", step_size=None, epsilon_255=128, attack_steps=4, warmup_rounds=10
    )
    now = attack.in_round(server_round)
    assert now.l2_budget == pytest.approx(128 / 255 * min(1, server_round / 10), rel=1e-15)
    assert now.step == pytest.approx(now.l2_budget / 2, rel=1e-15)
    assert now.in_round(1) == now  # nothing grows any more
    assert AttackConfig().in_round(1) == AttackConfig()


@pytest.mark.parametrize("both", [(None, None), (0.5, 128.0), (0.0, 0.0)])
def test_exactly_one_unit_of_epsilon_is_given(both):
    message = refusal(AttackConfig, epsilon=both[0], epsilon_255=both[1])
    assert f"attack.epsilon={both[0]} and attack.epsilon_255={both[1]}" in message
    assert "exactly one" in message


@pytest.mark.parametrize("grey_levels", [16, 64, 128, 256])
def test_the_papers_epsilons_are_never_taken_for_pixel_units(grey_levels):
    message = refusal(AttackConfig, epsilon=float(grey_levels), epsilon_255=None)
    assert message.startswith(f"attack.epsilon={float(grey_levels)} is in [0, 1] pixel units")
    assert "attack.epsilon_255" in message


@pytest.mark.parametrize("pixels", [0.25, 0.5, 128 / 255])
def test_pixel_units_are_never_taken_for_grey_levels(pixels):
    message = refusal(AttackConfig, epsilon_255=pixels)
    assert message.startswith(f"attack.epsilon_255={pixels} is in units of 1/255")


# --- settings that contradict each other


def test_only_a_normalized_step_has_a_length_of_its_own():
    """Salman et al. take 2 epsilon / T."""
    salman = AttackConfig(step_rule="normalized", step_size=None, attack_steps=4, epsilon_255=64)
    assert salman.step == 2 * (64 / 255) / 4
    assert AttackConfig(step_size=0.3).step == 0.3
    assert "attack.step_rule=normalized" in refusal(AttackConfig, step_size=None)


def test_variance_reduction_belongs_to_the_one_point_estimator():
    message = refusal(AttackConfig, variance_reduction="antithetic")
    assert "attack.variance_reduction='antithetic'" in message
    assert "attack.estimator=one_point" in message


def test_the_one_point_estimator_needs_noise_only_where_it_is_used():
    attack = AttackConfig(estimator="one_point")
    message = refusal(TrainingPlan, attack=attack, smoothing=SmoothingConfig(sigma=0))
    assert "attack.estimator='one_point'" in message
    assert "smoothing.sigma=0" in message
    idle = dataclasses.replace(attack, attack_steps=0)
    assert TrainingPlan(attack=idle, smoothing=SmoothingConfig(sigma=0)).attack == idle


def test_leave_one_out_needs_two_draws():
    attack = AttackConfig(estimator="one_point", variance_reduction="leave_one_out")
    message = refusal(TrainingPlan, attack=attack, smoothing=SmoothingConfig(num_noise_vectors=1))
    assert "smoothing.num_noise_vectors=1" in message


def test_resuming_needs_a_run_directory():
    assert "run_dir" in refusal(RunConfig, resume=True)


def test_without_noise_there_is_nothing_to_certify_with():
    silent = SmoothingConfig(sigma=0)
    assert "certification.sigma" in refusal(RunConfig, smoothing=silent)
    with_level = CertificationConfig(sigma=0.5)
    assert RunConfig(smoothing=silent, certification=with_level).certified_sigma == 0.5
    RunConfig(smoothing=silent, certification=CertificationConfig(at_end=False))


@given(run=runs)
def test_a_run_is_certified_at_its_own_level_unless_another_is_given(run):
    expected = run.smoothing.sigma if run.certification.sigma is None else run.certification.sigma
    assert run.certified_sigma == expected


@given(clients=st.integers(1, 5000), fraction=st.floats(0, 1, exclude_min=True))
def test_a_cohort_is_the_fraction_of_the_clients_and_never_empty(clients, fraction):
    run = RunConfig(
        partition=PartitionConfig(num_clients=clients),
        federation=FederationConfig(cohort_fraction=fraction),
    )
    assert 1 <= run.cohort_size <= clients
    assume(fraction * clients >= 1)
    assert abs(run.cohort_size - fraction * clients) <= 0.5


@pytest.mark.parametrize("cls", [*SECTIONS, TrainingPlan, RunConfig])
def test_settings_are_frozen(cls):
    section = cls()
    name = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(section, name, getattr(section, name))
    assert hash(section) == hash(cls())


def test_models_are_certified_during_training_by_a_service_alone():
    every = CertificationConfig(every=2)
    assert "certification.every=2 needs a certification service" in refusal(
        RunConfig, certification=every
    )
    RunConfig(certification=every, service=ServiceConfig(address="127.0.0.1:9100"))
