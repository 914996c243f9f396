"""`ray up` on AWS: by Ray's own validator, as `ray up` itself prepares the file."""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster" / "aws.yaml").read_text()


@pytest.fixture
def config():
    return yaml.safe_load(TEXT)


def test_ray_accepts_the_file(config):
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(max_worker=1),
        lambda c: c["available_node_types"]["cpu"].update(minimum=1),
        lambda c: c["docker"].update(images="x"),
        lambda c: c["available_node_types"]["cpu"].update(min_workers="one"),
        lambda c: c.update(head_node_type="nobody"),
    ],
)
def test_ray_refuses_a_broken_one(config, change):
    change(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(config))


def test_the_head_has_no_work_and_workers_have_bounds(config):
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert set(types) == {"head", "cpu", "gpu"} and types["gpu"]["resources"]["GPU"] > 0
    workers = [types["cpu"], types["gpu"]]
    assert all(0 <= node["min_workers"] <= node["max_workers"] for node in workers)
    assert config["max_workers"] == sum(node["max_workers"] for node in workers)


def test_nothing_but_ssh_is_open_and_everything_asks_for_the_token(config):
    (rule,) = config["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert all(source["CidrIp"] != "0.0.0.0/0" for source in rule["IpRanges"])
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


def test_keys_are_files_of_the_user(config):
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert all(local.startswith("~/") for local in config["file_mounts"].values())
    assert not re.search(r"(API_KEY|AUTH_TOKEN|SECRET)\w*=", TEXT)


def test_the_shared_disk_is_the_same_folder_in_and_outside_the_container(config):
    assert "--volume /mnt/rayrl:/mnt/rayrl" in config["docker"]["run_options"]
    assert any("mount -t nfs4" in command and "/mnt/rayrl" in command for command in config["initialization_commands"])


def test_the_heads_boto3_goes_with_the_images_botocore(config):
    botocore = re.search(r"^botocore==(\S+)", (ROOT / "cluster" / "cpu.lock").read_text(), re.MULTILINE)[1]
    assert f"boto3=={botocore} " in " ".join(config["head_setup_commands"]) + " "
