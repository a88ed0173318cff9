"""A disk without room in the middle of a run. The kernel itself says so, at /dev/full."""

from pathlib import Path

import pytest
import torch

from fedsmooth_core.checkpoint import load_checkpoint
from server.cli import main
from server.run_directory import RunDirectory

pytestmark = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs Linux's /dev/full, a disk that is always full"
)


def test_a_full_disk_ends_the_run_with_a_sentence_and_room_continues_it(
    tmp_path, tiny_overrides, capsys
):
    run, undisturbed = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "undisturbed")
    # What the second round's checkpoint is written to before it gets its name.
    full = run.checkpoints / ".round-0002.safetensors.tmp"
    run.checkpoints.mkdir(parents=True)
    full.symlink_to("/dev/full")
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *tiny_overrides, f"run_dir={run.path}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert not run.checkpoint(2).exists()

    full.unlink()
    main(["simulate", f"run_dir={run.path}", "resume=true"])
    main(["simulate", *tiny_overrides, f"run_dir={undisturbed.path}"])
    assert [line["round"] for line in run.read_metrics()] == [1, 2, 3]
    final, wanted = (load_checkpoint(it.checkpoint(3)).state for it in (run, undisturbed))
    torch.testing.assert_close(final, wanted, rtol=0, atol=0)
