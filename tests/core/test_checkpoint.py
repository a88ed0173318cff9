import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmooth_core import checkpoint as checkpoint_module
from fedsmooth_core.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    save_checkpoint,
    state_sha256,
)
from fedsmooth_core.config import to_nested
from fedsmooth_core.errors import CheckpointError
from fedsmooth_core.models import ModelSpec, build_model

SPEC = ModelSpec("resnet20", "he", 10, 3, 8, 8)


def make_model(seed=0, spec=SPEC):
    mean = [0.4] * spec.channels
    return build_model(spec, mean, mean, torch.Generator().manual_seed(seed))


def make_state():
    return {
        "float": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "double": torch.tensor(1 / 3, dtype=torch.float64),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(torch.nan_to_num(found[name]), torch.nan_to_num(tensor))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "round-0012.safetensors"
    save_checkpoint(path, make_state(), {"round": 12, "accuracy": [0.5, None]})
    return path


def test_state_and_metadata_come_back_as_they_were(saved):
    loaded = load_checkpoint(saved)
    assert_same(loaded.state, make_state())
    assert loaded.metadata == {"round": 12, "accuracy": [0.5, None]}


def test_a_checkpoint_is_two_files_and_no_others(saved):
    names = {file.name for file in saved.parent.iterdir()}
    assert names == {"round-0012.safetensors", "round-0012.json"}
    sidecar = json.loads(saved.with_suffix(".json").read_text())
    assert sidecar["sha256"] == state_sha256(make_state())


def test_views_shared_memory_and_strides_can_be_saved(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    state = {
        "a": base,
        "b": base[:1],
        "transposed": base.transpose(0, 1),
        "channels_last": base.to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base),
    }
    save_checkpoint(tmp_path / "x.safetensors", state, {})
    assert_same(load_checkpoint(tmp_path / "x.safetensors").state, state)


def test_saving_again_replaces(saved):
    save_checkpoint(saved, {"w": torch.ones(2)}, {"round": 13})
    loaded = load_checkpoint(saved)
    assert loaded.metadata == {"round": 13}
    assert_same(loaded.state, {"w": torch.ones(2)})


def test_metadata_that_json_cannot_hold_writes_nothing(saved):
    with pytest.raises(TypeError):
        save_checkpoint(saved, {"w": torch.ones(2)}, {"round": object()})
    assert_same(load_checkpoint(saved).state, make_state())


def test_a_path_without_the_suffix_is_refused(tmp_path):
    for call in (lambda path: save_checkpoint(path, {}, {}), load_checkpoint):
        with pytest.raises(CheckpointError, match=r"does not end in \.safetensors"):
            call(tmp_path / "round-0001.json")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "x.safetensors", {}, {})


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_missing_half_is_named(saved, suffix):
    saved.with_suffix(suffix).unlink()
    with pytest.raises(CheckpointError, match=rf"round-0012\{suffix} is missing"):
        load_checkpoint(saved)


def test_a_folder_in_the_weights_place_is_one_sentence(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"{}",
        b'{"sha256": "x"}',
        b'{"sha256": "x", "metadata": []}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_garbled_sidecar_is_refused(saved, text):
    saved.with_suffix(".json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"round-0012\.json is damaged"):
        load_checkpoint(saved)


def test_every_truncation_is_refused(saved):
    data = saved.read_bytes()
    for length in range(len(data)):
        saved.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="no complete safetensors file"):
            load_checkpoint(saved)


def test_a_tampered_weight_is_refused(saved):
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match the hash"):
        load_checkpoint(saved)


def test_another_checkpoints_weights_are_refused(saved):
    other = saved.with_name("round-0013.safetensors")
    save_checkpoint(other, {"w": torch.ones(2)}, {})
    other.replace(saved)
    with pytest.raises(CheckpointError, match="does not match the hash"):
        load_checkpoint(saved)


def _tamper(data, position, replacement):
    start = position % (len(data) + 1)
    return data[:start] + replacement + data[start + len(replacement) :]


@settings(deadline=None, max_examples=150)
@given(
    st.binary(max_size=200) | st.tuples(st.integers(0, 10**4), st.binary(min_size=1, max_size=9))
)
def test_no_bytes_whatever_break_out_of_the_one_error(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_checkpoint(path, make_state(), {})
    data = path.read_bytes()
    path.write_bytes(damage if isinstance(damage, bytes) else _tamper(data, *damage))
    try:
        loaded = load_checkpoint(path)
    except CheckpointError:
        return
    assert_same(loaded.state, make_state())  # the damage changed nothing that matters


def test_a_pickle_is_never_opened(tmp_path):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"w": torch.ones(2)}, {})
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no complete safetensors file"):
        load_checkpoint(path)


def test_the_hash_ignores_order_and_layout_but_nothing_else():
    state = make_state()
    digest = state_sha256(state)
    assert len(digest) == 64
    assert state_sha256(dict(reversed(state.items()))) == digest
    strided = torch.empty(2, 3).t().copy_(state["float"])
    assert not strided.is_contiguous()
    assert state_sha256(state | {"float": strided}) == digest
    changes = [
        {"float": state["float"] + 1e-6},
        {"float": state["float"].reshape(2, 3)},
        {"count": state["count"].to(torch.int32)},
        {"empty": torch.zeros(4, 0)},
        {"more": torch.zeros(0)},
    ]
    others = [state_sha256(state | change) for change in changes]
    others.append(state_sha256({f"x{name}": value for name, value in state.items()}))
    assert len({digest, *others}) == len(changes) + 2


def test_a_zero_and_a_negative_zero_are_different_weights():
    assert state_sha256({"w": torch.tensor(0.0)}) != state_sha256({"w": torch.tensor(-0.0)})


def test_latest_is_the_highest_complete_round(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None
    for name in ("round-0002", "round-0010", "round-9", "best", "round-x"):
        save_checkpoint(tmp_path / f"{name}.safetensors", {"w": torch.ones(1)}, {})
    (tmp_path / "round-0011.safetensors").write_bytes(b"weights without a sidecar")
    (tmp_path / "round-0012.json").write_text("a sidecar without weights")
    assert latest_checkpoint(tmp_path) == tmp_path / "round-0010.safetensors"


def test_rounds_beyond_four_digits_are_compared_as_numbers(tmp_path):
    for name in ("round-9999", "round-10000"):
        save_checkpoint(tmp_path / f"{name}.safetensors", {"w": torch.ones(1)}, {})
    assert latest_checkpoint(tmp_path) == tmp_path / "round-10000.safetensors"


@pytest.mark.parametrize("dies_before", [1, 2, 3])
def test_a_crash_between_any_two_writes_leaves_whole_checkpoints(saved, monkeypatch, dies_before):
    """Overwriting is the hard case: an old sidecar must never vouch for new weights."""
    earlier = saved.with_name("round-0011.safetensors")
    save_checkpoint(earlier, {"w": torch.zeros(2)}, {"round": 11})
    real_replace, calls = checkpoint_module.write_atomically, []

    def dying_replace(path, data):
        calls.append(path)
        if len(calls) == dies_before:
            raise KeyboardInterrupt
        real_replace(path, data)

    monkeypatch.setattr(checkpoint_module, "write_atomically", dying_replace)
    if dies_before <= 2:
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(saved, {"w": torch.ones(2)}, {"round": 12})
        assert latest_checkpoint(saved.parent) == earlier
    else:
        save_checkpoint(saved, {"w": torch.ones(2)}, {"round": 12})
        assert latest_checkpoint(saved.parent) == saved
    load_checkpoint(latest_checkpoint(saved.parent))


def test_kill_9_in_a_save_loop_always_leaves_a_checkpoint_that_loads(tmp_path):
    program = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from fedsmooth_core.checkpoint import save_checkpoint
        state = {"w": torch.zeros(200_000)}
        for server_round in range(1_000_000):
            state["w"].fill_(server_round)
            path = Path(sys.argv[1]) / f"round-{server_round:04d}.safetensors"
            save_checkpoint(path, state, {"round": server_round})
            if server_round == 0:
                print("saved", flush=True)
            for old in Path(sys.argv[1]).glob(f"round-{server_round - 3:04d}.*"):
                old.unlink()
    """)
    folders = [tmp_path / str(index) for index in range(3)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        for folder in folders
    ]
    for index, (folder, process) in enumerate(zip(folders, processes, strict=True)):
        with process:
            assert process.stdout.readline() == b"saved\n"
            time.sleep(0.05 + 0.0137 * index)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        latest = latest_checkpoint(folder)
        loaded = load_checkpoint(latest)
        assert latest.name == f"round-{loaded.metadata['round']:04d}.safetensors"
        assert (loaded.state["w"] == loaded.metadata["round"]).all()


def test_a_model_comes_back_from_its_checkpoint_alone(tmp_path):
    model = make_model()
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model(images)  # moves the batch statistics
    path = tmp_path / "round-0001.safetensors"
    save_checkpoint(path, model.state_dict(), {"model": to_nested(SPEC)})
    before = torch.get_rng_state()
    loaded = load_model(load_checkpoint(path))
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert_same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(images), model.eval()(images))


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (None, "describes no model"),
        ("resnet20", "describes no model"),
        (to_nested(SPEC) | {"name": "resnet9"}, "'resnet9' is not known"),
        (to_nested(SPEC) | {"height": 4}, "8x8 and larger"),
        (to_nested(SPEC) | {"depth": 20}, "depth is not a setting"),
        ({"name": "resnet20"}, "cannot be built"),
        (to_nested(SPEC) | {"num_classes": 3}, "'network.classifier.bias'"),
        (to_nested(SPEC) | {"name": "small_cnn"}, "not those of its model 'small_cnn'"),
        (to_nested(SPEC) | {"channels": 1}, "'network.conv.weight'"),
    ],
)
def test_weights_of_another_model_are_refused(description, reason):
    checkpoint = Checkpoint(make_model().state_dict(), {"model": description})
    with pytest.raises(CheckpointError, match=reason):
        load_model(checkpoint)


def test_weights_of_another_dtype_are_not_converted_silently():
    state = make_model().state_dict()
    state["network.conv.weight"] = state["network.conv.weight"].double()
    with pytest.raises(CheckpointError, match=r"network\.conv\.weight"):
        load_model(Checkpoint(state, {"model": to_nested(SPEC)}))
