"""The joining kit holds what a train message will say, and nothing that is secret."""

import json

import pytest

from fedsmooth_core.config import DatasetConfig, TrainingPlan
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.invitation import Invitation
from fedsmooth_core.models import ModelSpec
from server.cli import main
from server.configuration import compose

PLAN = TrainingPlan(seed=3, dataset=DatasetConfig(image_size=16))
SPEC = ModelSpec("small_cnn", "he", 2, 3, 16, 16)


def refusal(path):
    with pytest.raises(ConfigError) as error:
        Invitation.read(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_an_invitation_says_the_same_when_it_is_read(tmp_path):
    invitation = Invitation(("cat", "dog"), PLAN, SPEC, 50)
    invitation.write(tmp_path / "federation.json")
    assert Invitation.read(tmp_path / "federation.json") == invitation


def test_the_command_writes_the_joining_kit(tmp_path, capsys):
    (tmp_path / "ca.crt").write_text("BEGIN CERTIFICATE")
    kit = tmp_path / "kit"
    arguments = ["-o", str(kit), "--root-certificates", str(tmp_path / "ca.crt")]
    main(["invite", "experiment=quick", *arguments])
    assert sorted(path.name for path in kit.iterdir()) == ["ca.crt", "federation.json"]
    assert (kit / "ca.crt").read_text() == "BEGIN CERTIFICATE"
    invitation = Invitation.read(kit / "federation.json")
    assert invitation.plan == compose(["experiment=quick"]).plan
    assert invitation.class_names == tuple("0123456789")
    assert invitation.spec == ModelSpec("small_cnn", "he", 10, 1, 8, 8)
    assert invitation.max_num_examples == 1438  # the server's training images
    assert str(kit / "federation.json") in capsys.readouterr().out


def test_the_operators_cap_goes_into_the_kit(tmp_path):
    main(["invite", "experiment=quick", "federation.max_num_examples=70000", "-o", str(tmp_path)])
    assert Invitation.read(tmp_path / "federation.json").max_num_examples == 70000


@pytest.mark.parametrize("content", [None, "", "BEGIN CERTIFICATE BEGIN EC PRIVATE KEY"])
def test_nothing_but_a_certificate_is_handed_out(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "ca.crt").write_text(content)
    with pytest.raises(SystemExit) as end:
        main(
            ["invite", "-o", str(tmp_path / "kit"), "--root-certificates", str(tmp_path / "ca.crt")]
        )
    assert end.value.code == 2
    sentence = "is not a certificate alone" if content is not None else "cannot be used"
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"class-names": 1, "plan": 2, "spec": 3}'])
def test_what_is_no_invitation(tmp_path, text):
    path = tmp_path / "federation.json"
    path.write_text(text)
    assert "is no invitation" in refusal(path)


@pytest.mark.parametrize("cap", [None, 0, "5", True])
def test_an_invitation_without_a_usable_cap(tmp_path, cap):
    path = tmp_path / "federation.json"
    Invitation(("cat", "dog"), PLAN, SPEC, 50).write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max-num-examples": cap}))
    assert "or one of an older version" in refusal(path)


@pytest.mark.parametrize("names", [("cat",), ("cat", "dog", "emu"), ("cat", "cat"), ()])
def test_classes_that_are_not_the_models(tmp_path, names):
    path = tmp_path / "federation.json"
    Invitation(names, PLAN, SPEC, 50).write(path)
    assert "its model has 2 classes" in refusal(path)


def test_a_file_that_is_not_there(tmp_path):
    assert "cannot be read" in refusal(tmp_path / "federation.json")


@pytest.mark.parametrize("change", [{"attack.colour": "pink"}, {"seed": None}])
def test_an_invitation_of_another_version(tmp_path, change):
    path = tmp_path / "federation.json"
    Invitation(("cat", "dog"), PLAN, SPEC, 50).write(path)
    facts = json.loads(path.read_text())
    plan = facts["plan"] | change
    facts["plan"] = {key: value for key, value in plan.items() if value is not None}
    path.write_text(json.dumps(facts))
    assert "another version" in refusal(path)
