import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmooth_core import aggregation
from fedsmooth_core.aggregation import clip_update, update_norm, weighted_mean

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make_states(num_states, shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"w": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)}
        for _ in range(num_states)
    ]


def oracle(states, weights, name="w"):
    """The formula as it stands, in NumPy and float64."""
    arrays = np.stack([state[name].double().numpy() for state in states])
    shares = np.array([weight / sum(weights) for weight in weights])
    return np.tensordot(shares, arrays, axes=1)


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
sample_counts = st.lists(st.integers(1, 100_000), min_size=1, max_size=8)


@settings(deadline=None)
@given(shapes, sample_counts, st.sampled_from(FLOATS), st.integers(0, 2**32))
def test_it_is_the_weighted_mean_of_the_formula(shape, weights, dtype, seed):
    states = make_states(len(weights), shape, dtype, seed)
    expected = oracle(states, weights)
    mean = weighted_mean(states, weights)["w"]
    assert mean.dtype == dtype
    assert mean.shape == shape
    # One rounding to the dtype, after float64 arithmetic on values of order 1.
    tolerance = torch.finfo(dtype).eps / 2 * (np.abs(expected) + 1e-4) + 1e-13
    assert (np.abs(mean.double().numpy() - expected) <= tolerance).all()


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3) | st.integers(1, 10**6), min_size=1, max_size=6),
    st.sampled_from(FLOATS),
    st.integers(0, 2**32),
)
def test_equal_states_give_exactly_that_state(weights, dtype, seed):
    (state,) = make_states(1, (3, 2), dtype, seed)
    assert torch.equal(weighted_mean([state] * len(weights), weights)["w"], state["w"])


@settings(deadline=None)
@given(st.permutations(range(6)), st.integers(0, 2**32))
def test_the_order_of_the_clients_does_not_matter(order, seed):
    states = make_states(6, (5,), torch.float64, seed)
    weights = [1, 20, 3, 400, 5, 60]
    shuffled = weighted_mean([states[i] for i in order], [weights[i] for i in order])
    torch.testing.assert_close(
        shuffled["w"], weighted_mean(states, weights)["w"], rtol=0, atol=1e-14
    )


def test_only_the_ratio_of_the_weights_matters_however_large_they_are():
    states = make_states(3, (4,), torch.float64, 0)
    expected = weighted_mean(states, [1, 2, 3])["w"]
    for scale in (1e-300, 5e307, 10**400):
        scaled = [scale * factor for factor in (1, 2, 3)]
        torch.testing.assert_close(weighted_mean(states, scaled)["w"], expected)


def test_many_small_updates_keep_float32_accuracy():
    value = torch.tensor([1.0, 1 / 3, 1e-8, -7e5])
    states = ({"w": value * (1 + 1e-7 * (-1) ** k)} for k in range(1000))
    torch.testing.assert_close(weighted_mean(states, [500] * 1000)["w"], value, rtol=1.3e-7, atol=0)


def test_float64_accumulates_what_bfloat16_would_lose():
    states = [{"w": torch.tensor([256.0], dtype=torch.bfloat16)}]
    states += [{"w": torch.tensor([257.0 + 1], dtype=torch.bfloat16)}] * 255
    assert weighted_mean(states, [1] * 256)["w"].item() == 258


def test_counters_and_flags_take_the_maximum_and_stay_integers():
    states = [
        {"count": torch.tensor(count), "flag": torch.tensor([flag, False])}
        for count, flag in ((3, False), (2**53 + 1, True), (5, False))
    ]
    mean = weighted_mean(states, [100, 1, 1])
    assert mean["count"].dtype == torch.int64
    assert mean["count"].item() == 2**53 + 1
    assert mean["flag"].tolist() == [True, False]


def test_batch_normalisation_aggregates():
    modules = [torch.nn.BatchNorm2d(2) for _ in range(3)]
    for steps, module in enumerate(modules, start=1):
        for _ in range(steps):
            module(torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(steps)))
    states = [module.state_dict() for module in modules]
    mean = weighted_mean(states, [1, 1, 2])
    assert mean["num_batches_tracked"].item() == 3
    np.testing.assert_allclose(
        mean["running_mean"].numpy(), oracle(states, [1, 1, 2], "running_mean"), rtol=1e-6
    )
    modules[0].load_state_dict(mean)


def test_it_is_pure():
    for dtype in (torch.float64, torch.float32, torch.int64):
        states = [{"w": torch.arange(3).to(dtype)}, {"w": torch.arange(3, 6).to(dtype)}]
        copies = [state["w"].clone() for state in states]
        for weights in ([1, 3], [1]):
            mean = weighted_mean(states[: len(weights)], weights)
            mean["w"].fill_(99)
            for state, copy in zip(states, copies, strict=True):
                assert torch.equal(state["w"], copy)


@pytest.fixture
def small_spans(monkeypatch):
    """Blocks of a few elements, so that small tensors meet their edges."""
    monkeypatch.setattr(aggregation, "_SPAN", 8)
    monkeypatch.setattr(aggregation, "_CPU_BUFFER", 24)


@pytest.fixture
def three_threads():
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(own)


@pytest.mark.usefixtures("small_spans", "three_threads")
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 25, 200])
@pytest.mark.parametrize("num_states", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("stacked", [False, True])
def test_no_element_is_lost_at_the_edges_of_a_block(size, num_states, stacked):
    weights = list(range(1, num_states + 1))
    for dtype in FLOATS:
        states = make_states(num_states, (size,), dtype, size)
        expected = oracle(states, weights)
        if stacked:
            stack = torch.stack([state["w"] for state in states])
            states = [{"w": row} for row in stack]
        mean = weighted_mean(states, weights)["w"]
        tolerance = torch.finfo(dtype).eps / 2 * (np.abs(expected) + 1e-4) + 1e-13
        assert (np.abs(mean.double().numpy() - expected) <= tolerance).all()


def test_blocks_of_the_real_size_are_the_mean_too():
    for size in (aggregation._SPAN - 1, aggregation._SPAN, 2 * aggregation._SPAN + 1):
        states = make_states(7, (size,), torch.float32, size)
        weights = [3, 1, 4, 1, 5, 9, 2]
        expected = oracle(states, weights)
        mean = weighted_mean(states, weights)["w"].double().numpy()
        assert (np.abs(mean - expected) <= 2**-24 * (np.abs(expected) + 1e-4)).all()


@pytest.mark.usefixtures("three_threads")
def test_the_number_of_threads_changes_no_bit_and_stays_what_it_is():
    states = make_states(5, (3, aggregation._SPAN), torch.float32, 1)
    in_three = weighted_mean(states, [1, 2, 3, 4, 5])["w"]
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    assert torch.equal(weighted_mean(states, [1, 2, 3, 4, 5])["w"], in_three)


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    shape=shapes,
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
)
def test_slices_of_one_stack_give_what_separate_tensors_give(rows, shape, dtype, seed):
    """Rows at equal distances are read as a stack; gaps, repeats and other orders come out the same."""
    stack = make_states(1, (7, *shape), dtype, seed)[0]["w"]
    states = [{"w": stack[row]} for row in rows]
    weights = [10 + row for row in rows]
    apart = [{"w": state["w"].clone()} for state in states]
    mean = weighted_mean(states, weights)["w"]
    assert torch.equal(mean, weighted_mean(apart, weights)["w"])


def test_slices_of_one_stack_are_read_without_a_copy():
    stack = torch.arange(24.0).reshape(4, 2, 3)
    view = aggregation._as_stack([stack[1], stack[2], stack[3]])
    assert view.data_ptr() == stack[1].data_ptr()
    assert torch.equal(view, stack[1:].flatten(1))
    assert aggregation._as_stack([stack[2], stack[1]]) is None
    assert aggregation._as_stack([stack[0], stack[1], stack[3]]) is None
    assert aggregation._as_stack([row.t() for row in stack]) is None


def test_neighbours_that_are_no_slices_of_one_storage_are_no_stack():
    memory = np.zeros(64, np.float32)
    rows = [torch.from_numpy(memory[start : start + 16]) for start in (0, 16, 32)]
    assert aggregation._as_stack(rows) is None


def test_tensors_of_any_strides_are_averaged():
    states = [{"w": s["w"].t()} for s in make_states(3, (4, 5), torch.float32, 0)]
    np.testing.assert_allclose(
        weighted_mean(states, [1, 2, 3])["w"].numpy(), oracle(states, [1, 2, 3]), rtol=1e-6
    )


def test_it_works_in_inference_mode():
    states = make_states(3, (4,), torch.float32, 0)
    expected = weighted_mean(states, [1, 2, 3])["w"]
    with torch.inference_mode():
        assert torch.equal(weighted_mean(states, [1, 2, 3])["w"], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_gives_what_the_cpu_gives_without_being_waited_for():
    states = [
        {
            "w": torch.randn(300_000, generator=torch.Generator().manual_seed(k)),
            "n": torch.tensor(k),
        }
        for k in range(60)
    ]
    weights = list(range(1, 61))
    expected = weighted_mean(states, weights)
    there = [{name: tensor.cuda() for name, tensor in state.items()} for state in states]
    stack = torch.stack([state["w"] for state in there])
    for on_device in (there, [{"w": row, "n": torch.tensor(0).cuda()} for row in stack]):
        torch.cuda.set_sync_debug_mode("error")
        try:
            mean = weighted_mean(on_device, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert mean["w"].is_cuda
        torch.testing.assert_close(mean["w"].cpu(), expected["w"], rtol=1.2e-7, atol=1e-12)
    assert int(weighted_mean(there, weights)["n"]) == 59


def test_it_takes_parameters_that_require_gradients():
    layer = torch.nn.Linear(2, 2)
    mean = weighted_mean([dict(layer.named_parameters())] * 2, [1, 1])
    assert not mean["weight"].requires_grad


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf, -math.inf, 0.0])
def test_a_weight_that_is_no_number_of_samples_is_refused(weight):
    states = make_states(2, (2,), torch.float32, 0)
    with pytest.raises(ValueError, match=r"weight 1 is .*finite number > 0"):
        weighted_mean(states, [1, weight])


@pytest.mark.parametrize("num_states", [0, 1, 3])
def test_states_and_weights_must_pair_up(num_states):
    with pytest.raises(ValueError, match="states for"):
        weighted_mean(make_states(num_states, (2,), torch.float32, 0), [1, 1])


def test_nothing_to_aggregate_is_refused():
    with pytest.raises(ValueError, match="nothing to aggregate"):
        weighted_mean([], [])


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"w": torch.zeros(3)}, r"'w' is .*\(3,\) in state 1"),
        ({"w": torch.zeros(1)}, r"'w' is .*\(1,\) in state 1"),
        ({"w": torch.zeros(2, dtype=torch.float64)}, "float64.*in state 1"),
        ({"w": torch.zeros(2, dtype=torch.int64)}, "int64.*in state 1"),
        ({"v": torch.zeros(2)}, "state 1 has a tensor 'v' that state 0 lacks"),
        ({}, "state 0 has a tensor 'w' that state 1 lacks"),
        ({"w": torch.zeros(2), "x": torch.zeros(2)}, "state 1 has a tensor 'x'"),
    ],
)
def test_states_of_different_models_are_refused(second, reason):
    with pytest.raises(ValueError, match=reason):
        weighted_mean([{"w": torch.zeros(2)}, second], [1, 1])


@settings(deadline=None)
@given(st.floats(1e-3, 1e3), st.sampled_from((torch.float64, torch.float32)), st.integers(0, 2**32))
def test_a_clipped_update_has_the_allowed_length_and_its_old_direction(max_norm, dtype, seed):
    old, new = make_states(2, (4, 3), dtype, seed)
    clipped, was_clipped = clip_update(new, old, max_norm)
    norm = update_norm(new, old)
    assert was_clipped == (norm > max_norm)
    assert update_norm(clipped, old) <= min(norm, max_norm) * (1 + 1e-5) + 1e-5
    if was_clipped:
        expected = old["w"].double() + (new["w"].double() - old["w"].double()) * max_norm / norm
        torch.testing.assert_close(clipped["w"], expected.to(dtype), rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(clipped["w"], new["w"])


def test_clipping_leaves_counters_and_the_given_states_alone():
    old = {"w": torch.zeros(2), "n": torch.tensor(3)}
    new = {"w": torch.tensor([3.0, 4.0]), "n": torch.tensor(7)}
    clipped, was_clipped = clip_update(new, old, 1.0)
    assert was_clipped
    torch.testing.assert_close(clipped["w"], torch.tensor([0.6, 0.8]))
    assert int(clipped["n"]) == 7
    assert new["w"].tolist() == [3.0, 4.0]
    assert update_norm(new, old) == 5.0


def test_the_norm_of_a_long_update_is_that_of_all_its_parts():
    size = 2 * aggregation._SPAN + 3
    old, new = make_states(2, (size,), torch.float32, 0)
    expected = float(np.linalg.norm(new["w"].double().numpy() - old["w"].double().numpy()))
    assert update_norm(new, old) == pytest.approx(expected, rel=1e-12)
    assert update_norm({"n": torch.tensor(3)}, {"n": torch.tensor(5)}) == 0.0
    assert update_norm({"w": torch.zeros(0)}, {"w": torch.zeros(0)}) == 0.0


def test_the_norm_leaves_both_models_alone():
    for dtype in FLOATS:
        old, new = make_states(2, (3,), dtype, 0)
        copies = old["w"].clone(), new["w"].clone()
        update_norm(new, old)
        assert torch.equal(old["w"], copies[0])
        assert torch.equal(new["w"], copies[1])
