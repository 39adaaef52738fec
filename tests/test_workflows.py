"""What GitHub's workflows and `.ci/run` name exists: `make` targets, files, jobs, artifacts. Their shell parses."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="not a clone: there are no workflows")
each = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def jobs_of(path):
    return yaml.safe_load(path.read_text())["jobs"]


def commands(path):
    """What the steps of a workflow run in a shell."""
    return [step["run"] for job in jobs_of(path).values() for step in job["steps"] if "run" in step]


def uses(job, action):
    """The arguments of a job's steps with an action."""
    return [step["with"] for step in job["steps"] if step.get("uses", "").startswith(f"actions/{action}@")]


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_commands(path):
    texts = commands(path) if path.suffix == ".yml" else [path.read_text()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = []
    for text in texts:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        assert not re.search(r"^\s*! .*\n.", text, re.MULTILINE), "`set -e` ignores what `!` negates"
        for called in re.findall(r"(?:^|(?<=[;&] ))\s*make ((?:[a-z-]+ ?)+)", text, re.MULTILINE):
            made += called.split()
        for name in re.findall(r"(?<![\w/-])(?:(?:tests|tools)/[\w./-]+|[\w-]+\.(?:md|toml|txt))\b", text):
            assert (ROOT / name).exists() or name == "newest.txt", name
    assert set(made) <= targets
    assert made, "the search finds something"


@each
def test_jobs(path):
    """A job waits for jobs that there are, takes what these made, and ends."""
    jobs = jobs_of(path)
    for name, job in jobs.items():
        assert job["timeout-minutes"] <= 120, name
        needed = [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
        made = [given["name"] for other in needed for given in uses(jobs[other], "upload-artifact")]
        for given in uses(job, "download-artifact"):
            pattern = given.get("pattern", given.get("name"))
            assert any(fnmatch(each, pattern) for each in made), f"{name} takes {pattern}"


def test_nothing_is_published_untested():
    """The job that publishes waits for all others. It alone has a token, and what it takes is what they made."""
    jobs = jobs_of(ROOT / ".github/workflows/release.yml")
    publish = jobs.pop("publish")
    assert set(publish["needs"]) == set(jobs)
    assert publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    assert not any("permissions" in job for job in jobs.values())
    assert publish["if"] == "github.event_name == 'push'"
    (taken,) = uses(publish, "download-artifact")
    made = [given["name"] for job in jobs.values() for given in uses(job, "upload-artifact")]
    assert len(made) == 3
    assert all(fnmatch(name, taken["pattern"]) for name in made)
