"""Every flag that the files and guides give to Ray's commands is one that the installed Ray has."""

import re
from pathlib import Path

import pytest
import yaml
from ray.dashboard.modules.job.cli import job_cli_group
from ray.scripts.scripts import cli

ROOT = Path(__file__).parents[2]


def flags_of(command):
    return {option for parameter in command.params for option in parameter.opts}


def flags_in(text):
    return set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", text))


def unknown_start_flags():
    """Flags of `ray start` in the Slurm script, the AWS file and the manifests that it does not have."""
    slurm = (ROOT / "cluster" / "slurm.sh").read_text()
    started = slurm[slurm.index('"$bin/ray" start') : slurm.index("num_alive()")]
    started += " ".join(re.findall(r"^\s*start .*$", slurm, re.MULTILINE))
    aws = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    started += " ".join(aws["head_start_ray_commands"] + aws["worker_start_ray_commands"])
    (head,) = re.findall(r"rayStartParams:\n((?: {6}.*\n)+)", (ROOT / "cluster/kuberay/raycluster.yaml").read_text())
    started += "".join(f" --{name}" for name in re.findall(r"^ {6}([\w-]+):", head, re.MULTILINE))
    found = flags_in(started)
    assert {"--head", "--address", "--block", "--num-cpus", "--autoscaling-config", "--dashboard-host"} <= found
    return found - flags_of(cli.commands["start"])


def test_ray_start_has_every_flag_it_is_given():
    assert unknown_start_flags() == set()
    assert flags_in("ray start --heads") - flags_of(cli.commands["start"]) == {"--heads"}


@pytest.mark.parametrize("guide", ["cluster/README.md", "jobs/README.md"])
def test_ray_job_has_every_flag_of_the_guides(guide):
    text = (ROOT / guide).read_text().replace("\\\n", " ")
    for name, arguments in re.findall(r"^ray job (\w+)(.*)$", text, re.MULTILINE):
        assert flags_in(arguments.partition(" -- ")[0]) <= flags_of(job_cli_group.commands[name]), name


def test_the_guides_submit_follow_and_stop():
    text = (ROOT / "jobs/README.md").read_text()
    assert {"submit", "logs", "status", "stop"} <= set(re.findall(r"^ray job (\w+)", text, re.MULTILINE))
