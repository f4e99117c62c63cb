"""The launch scripts against stand-ins for gcloud, gcluster, xpk, docker and kubectl that log how they were called;
and worker.sh, which starts vlmprune on a machine of a slice: it outlives its connection and stops in order.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from repository import HANG, ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TPU = {"PROJECT": "p", "ZONE": "z", "TPU_NAME": "slice", "ACCELERATOR": "v5litepod-16", "RUNTIME": "rt"}
GCE = {"PROJECT": "p", "ZONE": "us-a", "TPU_NAME": "slice", "TOPOLOGY": "2x2x2"}
GKE = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "WORKLOAD": "w", "IMAGE": "i", "TPU_TYPE": "v5litepod-16"}
GCLUSTER = {"PROJECT": "p", "ZONE": "us-a", "CLUSTER": "c", "WORKLOAD": "w", "IMAGE": "i", "TOPOLOGY": "2x2x2"}
MADE = {"BUCKET": "b", "BLUEPRINT": "seven.yaml"}
RUN = ["recover", "--config=c.py", "--config.recover.name=two words"]
SWEEP = ["2", "--config=c.py", "--workdir=/w"]
AT = ["slice", "--project=p", "--zone=z"]
ON_ALL = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", *AT, "--worker=all"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
CREATE = [*QUEUED, "create", "slice", "--node-id=slice", *AT[1:], "--accelerator-type=v5litepod-16",
          "--runtime-version=rt"]  # fmt: skip
QUOTED_RUN = r"recover --config=c.py --config.recover.name=two\ words"

# Logs its arguments; `describe` prints, and the run command exits with, the next line of a script that the test wrote.
# One at a time: slices of a sweep call it side by side.
STAND_IN = r"""#!/usr/bin/env bash
exec 9> "$LOG.lock"; flock 9
printf '%q ' "${0##*/}" "$@" >> "$LOG"; echo >> "$LOG"
next() {
  local line; line="$(head -n 1 "$1")"; sed -i 1d "$1"
  [[ -n "$line" ]] && echo "$line"
}
case "$*" in
  *queued-resources\ describe* | *instanceStatus*) next "$LOG.states" ;;
  *list-instances*) printf 'vm-%s\n' ${VMS:-1} ;;
  *-policies\ describe* | *-templates\ describe*) [[ -n "${LEFT:-}" ]] ;;
  *worker.sh\ run*) exit "$(next "$LOG.codes" || echo 0)" ;;
esac
"""


def add_program(folder, name, text=STAND_IN):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def launch(tmp_path):
    """Callable (script, *arguments, env=...) -> (finished process, calls as lists of arguments)."""
    for name in ("gcloud", "gcluster", "xpk", "docker", "kubectl"):
        add_program(tmp_path / "bin", name)
    add_program(tmp_path / "quick", "git", "#!/bin/sh\n")  # every `setup` would pack the repository: only gce.sh does
    log = tmp_path / "log"

    def call(script, *arguments, env=TPU, states=(), codes=()):
        log.write_text("")
        (tmp_path / "log.states").write_text("".join(f"{line}\n" for line in states))
        (tmp_path / "log.codes").write_text("".join(f"{line}\n" for line in codes))
        path = f"{tmp_path / 'bin'}:{tmp_path / ('bin' if script == 'gce.sh' else 'quick')}:{os.environ['PATH']}"
        quick = {"POLL_SECONDS": "0", "GRACE_SECONDS": "0", "TRIES": "3", "LOG": str(log), "PATH": path}
        done = subprocess.run([LAUNCH / script, *arguments], env={**quick, **env}, capture_output=True, text=True,
                              timeout=HANG, cwd=tmp_path)  # fmt: skip
        return done, [shlex.split(line) for line in log.read_text().splitlines()]

    return call


def kinds(calls: list[list[str]]) -> list[str]:
    """What each call of gcloud does besides looking and setting up: create, delete, or the part of worker.sh."""
    texts = [text for text in map(" ".join, calls) if not re.search(r" describe | scp |=mkdir |worker.sh setup", text)]
    return [re.search(r"(?<=queued-resources )\w+|(?<=worker.sh )\w+", text)[0] for text in texts]


TPU_ACTIONS = {
    "create": [CREATE],
    "state": [[*QUEUED, "describe", *AT, "--format=value(state.state)"]],
    "wait": [[*QUEUED, "describe", *AT, "--format=value(state.state)"]] * 2,
    "setup": [
        [*ON_ALL[:4], "scp", "/tmp/vlmprune-jax.tar.gz", "slice:", *AT[1:], "--worker=all"],
        [*ON_ALL, "--command=mkdir -p vlmprune-jax && tar xzf vlmprune-jax.tar.gz -C vlmprune-jax"],
        [*ON_ALL, "--command=vlmprune-jax/launch/worker.sh setup"],
    ],
    **{key: [[*ON_ALL, f"--command=vlmprune-jax/launch/worker.sh run {QUOTED_RUN}"]] for key in ("run", "resume")},
    "logs": [[*ON_ALL[:-1], "--worker=0", "--command=tail -n 100 -F vlmprune-jax/run.log"]],
    "stop": [[*ON_ALL, "--command=vlmprune-jax/launch/worker.sh stop"]],
    "delete": [[*QUEUED, "delete", *AT, "--force", "--quiet"]],
}
ON_CLUSTER = ["--project=p", "--zone=z", "--cluster=c"]
WORKLOAD = ["xpk", "workload", "create", *ON_CLUSTER, "--workload=w", "--docker-image=i", "--tpu-type=v5litepod-16",
            "--num-slices=1", "--max-restarts=100", "--termination-grace-period-seconds=120",
            f"--command=vlmprune {QUOTED_RUN}"]  # fmt: skip
DELETE = ["xpk", "workload", "delete", *ON_CLUSTER, "--workload=w", "--force"]
SELECTOR = "jobset.sigs.k8s.io/jobset-name=w,batch.kubernetes.io/job-completion-index=0"
GKE_ACTIONS = {
    "create": [["xpk", "cluster", "create", *ON_CLUSTER, "--tpu-type=v5litepod-16", "--num-slices=1"]],
    "setup": [["docker", "build", "--build-arg", "EXTRAS=tpu", "--tag", "i", str(ROOT)], ["docker", "push", "i"]],
    "run": [WORKLOAD],
    "resume": [DELETE, WORKLOAD],
    "logs": [["kubectl", "logs", "--follow", "--tail=100", f"--selector={SELECTOR}"]],
    "delete": [DELETE],
    "delete-cluster": [["xpk", "cluster", "delete", *ON_CLUSTER]],
}
IN_ZONE, IN_REGION = ["slice", "--project=p", "--zone=us-a"], ["slice", "--project=p", "--region=us"]
GROUP = ["gcloud", "compute", "instance-groups", "managed"]
STATES = [*GROUP, "list-instances", *IN_ZONE, "--format=csv[no-heading](instanceStatus,currentAction)"]
NAMES = [*GROUP, "list-instances", *IN_ZONE, "--format=value(instance.basename())"]
TEMPLATE = ["gcloud", "compute", "instance-templates", "create", *IN_ZONE[:2], "--machine-type=tpu7x-standard-4t",
            "--maintenance-policy=TERMINATE", "--scopes=cloud-platform",
            "--image-family=ubuntu-accel-2404-amd64-tpu-tpu7x", "--image-project=ubuntu-os-accelerator-images",
            "--boot-disk-type=hyperdisk-balanced", "--boot-disk-size=200GB"]  # fmt: skip
POLICY = ["gcloud", "compute", "resource-policies", "create", "workload-policy", *IN_REGION, "--type=HIGH_THROUGHPUT",
          "--accelerator-topology=2x2x2"]  # fmt: skip
OF_POLICY = "--workload-policy=projects/p/regions/us/resourcePolicies/slice"
CREATE_GROUP = [*GROUP, "create", *IN_ZONE, "--template=slice", "--size=2", "--default-action-on-vm-failure=do-nothing"]


def on_vm(command: str) -> list[list[str]]:
    return [NAMES, ["gcloud", "compute", "ssh", "vm-1", *IN_ZONE[1:], f"--command={command}"]]


GCE_ACTIONS = {
    "create": [POLICY, TEMPLATE, [*CREATE_GROUP, OF_POLICY]],
    "state": [STATES],
    "wait": [STATES] * 2,
    "setup": [
        NAMES,
        ["gcloud", "compute", "scp", "/tmp/vlmprune-jax.tar.gz", "vm-1:", *IN_ZONE[1:]],
        *on_vm("mkdir -p vlmprune-jax && tar xzf vlmprune-jax.tar.gz -C vlmprune-jax"),
        *on_vm("vlmprune-jax/launch/worker.sh setup"),
    ],
    **dict.fromkeys(("run", "resume"), on_vm(f"vlmprune-jax/launch/worker.sh run {QUOTED_RUN}")),
    "logs": on_vm("tail -n 100 -F vlmprune-jax/run.log"),
    "stop": on_vm("vlmprune-jax/launch/worker.sh stop"),
    "delete": [
        [*GROUP, "delete", *IN_ZONE, "--quiet"],
        ["gcloud", "compute", "instance-templates", "delete", *IN_ZONE[:2], "--quiet"],
        ["gcloud", "compute", "resource-policies", "delete", *IN_REGION, "--quiet"],
    ],
}
OF_CLUSTER = ["--project=p", "--location=us", "--cluster=c"]
SUBMIT = ["gcluster", "job", "submit", *OF_CLUSTER, "--name=w", "--image=i", "--topology=2x2x2",
          "--compute-type=tpu7x-standard-4t", "--num-slices=1", "--restarts=100",
          "--restart-on-exit-codes=134,137,143", "--grace-period=2m"]  # fmt: skip
COMMAND = f"--command=vlmprune {QUOTED_RUN}"
CANCEL = ["gcluster", "job", "cancel", "w", *OF_CLUSTER]
DEPLOY = ["gcluster", "deploy", "seven.yaml", "--auto-approve", "--backend-config=bucket=b",
          "--vars=project_id=p,deployment_name=c,region=us,zone=us-a,num_slices=1",
          "--vars=tpu_topology=2x2x2,reservation=r,authorized_cidr=0.0.0.0/0"]  # fmt: skip
GCLUSTER_ACTIONS = {
    "setup": GKE_ACTIONS["setup"],
    "run": [[*SUBMIT, COMMAND]],
    "resume": [CANCEL, [*SUBMIT, COMMAND]],
    "logs": [["gcluster", "job", "logs", "w", *OF_CLUSTER, "--follow"]],
    "delete": [CANCEL],
    "delete-cluster": [["gcluster", "destroy", "c", "--auto-approve"]],
}
ACTIONS = [("tpu_vm.sh", TPU, *case) for case in TPU_ACTIONS.items()]
ACTIONS += [("gce.sh", GCE | ({"LEFT": "1"} if name == "delete" else {}), name, of) for name, of in GCE_ACTIONS.items()]
ACTIONS += [("gke.sh", GKE, *case) for case in GKE_ACTIONS.items()]
ACTIONS += [("gcluster.sh", GCLUSTER, *case) for case in GCLUSTER_ACTIONS.items()]
ACTIONS += [("gcluster.sh", GCLUSTER | MADE | {"RESERVATION": "r"}, "create", [DEPLOY])]


@pytest.mark.parametrize(("script", "env", "action", "expected"), ACTIONS)
def test_every_action_calls_what_it_should_and_what_a_dry_run_prints(launch, script, env, action, expected):
    arguments = [action, *(RUN if action in ("run", "resume") else [])]
    states = [",CREATING", "RUNNING,NONE"] if script == "gce.sh" else ["PROVISIONING", "ACTIVE"]
    done, calls = launch(script, *arguments, env=env, states=states)
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if call[3:4] != ["describe"]] == expected  # what a create that failed has left
    done, calls = launch(script, "--dry-run", *arguments, env=env)
    assert (done.returncode, calls) == (0, [])
    printed = [shlex.split(line) for line in done.stdout.splitlines()]
    once = expected[:1] if action == "wait" else expected
    told = [[word.replace("vm-1", "VM") for word in call] for call in once]
    assert [line for line in printed if line[0] != "git"] == told


def made(launch, **env):
    """What gce.sh calls to create a slice, besides asking what a create that failed has left."""
    return [call for call in launch("gce.sh", "create", env={**GCE, **env})[1] if "describe" not in call]


def test_spot_slices_are_asked_for(launch):
    assert launch("tpu_vm.sh", "create", env={**TPU, "SPOT": "1"})[1] == [[*CREATE, "--spot"]]
    assert launch("gke.sh", "create", env={**GKE, "SPOT": "1"})[1][0][-1] == "--spot"
    made_spot = made(launch, SPOT="1")[1]
    assert made_spot == [*TEMPLATE, "--provisioning-model=SPOT", "--instance-termination-action=STOP"]
    assert "--gke-nap-provisioning=spot" in launch("gcluster.sh", "run", *RUN, env={**GCLUSTER, "SPOT": "1"})[1][0]


def test_a_slice_of_compute_engine(launch):
    """One VM needs no policy; what a create that failed has left is used; all VMs run a command, or the n-th one."""
    alone = [word.replace("size=2", "size=1") for word in CREATE_GROUP]
    assert made(launch, TOPOLOGY="2x2x1") == [TEMPLATE, alone]
    assert made(launch, LEFT="1") == [[*CREATE_GROUP, OF_POLICY]]
    assert [*TEMPLATE, "--reservation-affinity=specific", "--reservation=r", "--provisioning-model=RESERVATION_BOUND",
            "--instance-termination-action=DELETE"] in made(launch, RESERVATION="r")  # fmt: skip
    many = {**GCE, "VMS": "1 2 3"}
    assert sorted(call[3] for call in launch("gce.sh", "stop", env=many)[1][1:]) == ["vm-1", "vm-2", "vm-3"]
    assert [call[3] for call in launch("gce.sh", "logs", env={**many, "WORKER": "1"})[1][1:]] == ["vm-2"]
    failed, _ = launch("gce.sh", "run", *RUN, env=many, codes=[0, 134, 0])
    assert failed.returncode == 134


def test_the_state_of_a_group_is_that_of_its_vms(launch):
    states = {"RUNNING,NONE": "ACTIVE", "TERMINATED,NONE": "SUSPENDED", "STOPPING,NONE": "SUSPENDED"}
    states |= {listed: "PROVISIONING" for listed in (",CREATING", "STAGING,CREATING", "RUNNING,VERIFYING")}
    for listed, state in states.items():
        assert launch("gce.sh", "state", env=GCE, states=[listed])[0].stdout == f"{state}\n"


def test_a_bucket_is_at_one_place_for_all_workers(launch, tmp_path):
    """On TPU VMs each worker mounts it, which takes gcsfuse and happens once; XPK attaches it to the cluster."""
    bucket = {"BUCKET": "data"}
    calls = launch("tpu_vm.sh", "setup", env=TPU | bucket)[1]
    assert calls[-1] == [*ON_ALL, "--command=vlmprune-jax/launch/worker.sh setup data"]
    assert launch("gke.sh", "create", env=GKE | bucket)[1][0][-1] == "--enable-gcsfuse-csi-driver"
    attached = launch("gke.sh", "setup", env=GKE | bucket)[1][-1]
    assert attached[:4] == ["xpk", "storage", "attach", "data"]
    assert "--mount=gs://data:/mnt/data:rw" in launch("gcluster.sh", "run", *RUN, env=GCLUSTER | bucket)[1][0]
    assert {"--type=gcsfuse", "--bucket=data", "--mount-point=/mnt/data", "--auto-mount=true"} < set(attached)

    for name in ("gcsfuse", "sudo", "apt-get", "curl"):
        add_program(tmp_path / "bin", name)
    add_program(tmp_path / "bin", "mountpoint", STAND_IN + "\n[[ -f $LOG.mounted ]]\n")
    done, calls = launch("mount.sh", "data", env={})
    assert done.returncode == 0, done.stderr
    assert calls[1][:3] == ["sudo", "install", "--directory"]
    assert calls[2] == ["gcsfuse", "--implicit-dirs", "data", "/mnt/data"]
    (tmp_path / "log.mounted").touch()
    assert launch("mount.sh", "data", env={})[1] == [["mountpoint", "--quiet", "/mnt/data"]]


@pytest.mark.parametrize(
    ("script", "arguments", "env", "message"),
    [
        *(("tpu_vm.sh", ["create"], {**TPU, name: ""}, f"set {name}") for name in TPU),
        *(("gke.sh", ["run", *RUN], {**GKE, name: ""}, f"set {name}") for name in GKE),
        *(("gce.sh", ["create"], {**GCE, name: ""}, f"set {name}") for name in GCE),
        ("gce.sh", ["create"], {**GCE, "TOPOLOGY": "eight"}, "TOPOLOGY=eight: use for example 2x2x2"),
        *(("gcluster.sh", ["run", *RUN], {**GCLUSTER, name: ""}, f"set {name}") for name in GCLUSTER),
        *(("gcluster.sh", ["create"], {**GCLUSTER, **MADE, name: ""}, f"set {name}") for name in MADE),
        ("spot_loop.sh", RUN, {**TPU, "ZONE": ""}, "set ZONE"),  # of the list that sweep.sh has as well
        *(("spot_loop.sh", RUN, {**GCE, "BY": "gce", name: ""}, f"set {name}") for name in GCE),
        ("spot_loop.sh", RUN, {**TPU, "BY": "gke"}, "BY=gke: use tpu_vm or gce"),
        ("gcluster.sh", ["resume"], GCLUSTER, "no command: use gcluster.sh resume recover"),
        ("tpu_vm.sh", [], TPU, "unknown action ''"),
        ("tpu_vm.sh", ["crate"], TPU, "unknown action 'crate': use create, state"),
        ("tpu_vm.sh", ["run"], TPU, "no command: use tpu_vm.sh run recover"),
        ("gke.sh", ["crate"], GKE, "unknown action 'crate': use create, setup"),
        ("gke.sh", ["resume"], GKE, "no command: use gke.sh resume recover"),
        ("spot_loop.sh", [], TPU, "no command: use spot_loop.sh recover"),
        ("worker.sh", ["crate"], {}, "unknown action 'crate': use setup, run or stop"),
        ("mount.sh", [], {}, "no bucket: use mount.sh BUCKET"),
        *(("sweep.sh", SWEEP, {**TPU, name: ""}, f"set {name}") for name in TPU),
        *(("sweep.sh", SWEEP, {**GKE, "BY": "gke", name: ""}, f"set {name}") for name in GKE),
        *(("sweep.sh", SWEEP, {**GCLUSTER, "BY": "gcluster", name: ""}, f"set {name}") for name in GCLUSTER),
        ("sweep.sh", SWEEP, {**TPU, "BY": "hand"}, "BY=hand: use tpu_vm, gce, gke or gcluster"),
        ("sweep.sh", ["2"], TPU, "number of slices or command missing: use sweep.sh 4"),
        ("sweep.sh", SWEEP[1:], TPU, "number of slices or command missing: use sweep.sh 4"),
    ],
)
def test_wrong_use_gives_one_line_and_code_2(launch, script, arguments, env, message):
    done, calls = launch(script, *arguments, env=env)
    assert (done.returncode, calls, done.stdout) == (2, [], "")
    assert done.stderr.startswith(f"{script}: error: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("states", "codes", "code", "expected"),
    [
        # no slice yet; one preemption, seen as SUSPENDED after the workers died with 134; then success
        (["", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"], [134, 0], 0, "create run delete create run"),
        # the slice goes away before the first run
        (["ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"], [0], 0, "delete create run"),
        # SIGTERM saved (143), or the connection broke (255), on a slice that is still there: run again
        (["ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE"], [143, 0], 0, "run run"),
        (["ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE"], [255, 0], 0, "run run"),
        # the command's own failures: wrong input at once, anything else on a slice that stays
        (["ACTIVE", "ACTIVE"], [2], 2, "run"),
        (["ACTIVE", "ACTIVE", "ACTIVE"], [1], 1, "run"),
    ],
)
def test_the_spot_loop_resumes_after_a_preemption_and_stops_at_an_end(launch, states, codes, code, expected):
    done, calls = launch("spot_loop.sh", *RUN, states=states, codes=codes)
    assert done.returncode == code, done.stderr
    assert kinds(calls) == expected.split()
    runs = {call[-1] for call in calls if "worker.sh run" in call[-1]}
    assert runs == {f"--command=vlmprune-jax/launch/worker.sh run {QUOTED_RUN}"}
    assert all(call[-1] == "--spot" for call in calls if "create" in call)


def test_the_spot_loop_makes_a_slice_of_compute_engine_again(launch):
    """Its first state is of no group, its second that of a VM which was stopped while the command ran."""
    states = ["", "RUNNING,NONE", "TERMINATED,NONE", "TERMINATED,NONE", "RUNNING,NONE"]
    done, calls = launch("spot_loop.sh", *RUN, env={**GCE, "BY": "gce", "LEFT": "1"}, states=states, codes=[255, 0])
    assert done.returncode == 0, done.stderr
    groups = [call[4] for call in calls if call[:4] == GROUP and call[4] != "list-instances"]
    assert groups == ["create", "delete", "create"]
    assert sum("worker.sh run" in call[-1] for call in calls) == 2


def test_loops_end_where_the_slice_never_comes_and_show_one_round(launch):
    done, _ = launch("tpu_vm.sh", "wait", states=["PROVISIONING", "FAILED"])
    assert (done.returncode, done.stderr) == (1, "slice is FAILED: delete, then create\n")
    assert launch("tpu_vm.sh", "wait")[0].returncode == 1  # there is no such slice
    done, calls = launch("spot_loop.sh", *RUN)  # describe fails for ever
    assert (done.returncode, done.stderr) == (2, "spot_loop.sh: error: no slice after 3 tries\n")
    assert kinds(calls) == ["create"] * 3
    for script, arguments in (("spot_loop.sh", RUN), ("sweep.sh", SWEEP)):
        done, calls = launch(script, "--dry-run", *arguments)
        assert (done.returncode, calls) == (0, [])
        printed = [shlex.split(line) for line in done.stdout.splitlines()]
        if script == "spot_loop.sh":
            assert (printed[0], printed[-1][4]) == ([*CREATE, "--spot"], "delete")
    assert [line[5] for line in printed if "create" in line] == ["slice-1", "slice-2"]


@pytest.mark.parametrize(("codes", "code"), [([0, 0], 0), ([0, 2], 2), ([2, 0], 2)])
def test_a_sweep_gives_each_slice_its_share_and_deletes_it(launch, codes, code):
    states = ["ACTIVE"] * 4
    done, calls = launch("sweep.sh", *SWEEP, states=states, codes=codes)
    assert done.returncode == code, done.stdout
    runs = sorted(call[-1] for call in calls if "worker.sh run" in call[-1])
    command = "--command=vlmprune-jax/launch/worker.sh run sweep --config=c.py --workdir=/w --shard="
    assert runs == [f"{command}1/2", f"{command}2/2"]
    assert sorted(call[5] for call in calls if call[4:5] == ["delete"]) == ["slice-1", "slice-2"]


@pytest.mark.parametrize(("by", "env", "name"), [("gke", GKE, "--workload"), ("gcluster", GCLUSTER, "--name")])
def test_a_sweep_on_a_cluster_is_a_workload_each(launch, by, env, name):
    done, calls = launch("sweep.sh", *SWEEP, env={**env, "BY": by})
    assert done.returncode == 0, done.stdout
    assert sorted(call[6] for call in calls) == [f"{name}=w-1", f"{name}=w-2"]
    assert {call[-1][-4:] for call in calls} == {"=1/2", "=2/2"}


def test_scripts_are_short_and_shellcheck_finds_nothing():
    slices, clusters = {"tpu_vm.sh", "gce.sh", "spot_loop.sh", "worker.sh", "mount.sh"}, {"gke.sh", "gcluster.sh"}
    assert {path.name for path in SCRIPTS} == {*slices, *clusters, "sweep.sh", "lib.sh"}
    limits = {"gce.sh": 90, "lib.sh": 90}
    assert all(path.read_text().count("\n") <= limits.get(path.name, 40) for path in SCRIPTS)
    done = subprocess.run([Path(sys.executable).with_name("shellcheck"), *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- worker.sh, which starts vlmprune on a machine of a slice ---


@pytest.fixture
def worker(tmp_path):
    """Callable (*arguments) that starts worker.sh in a copy whose vlmprune waits for a file and exits with its text."""
    home = tmp_path / "vlmprune-jax"
    for name in ("worker.sh", "lib.sh"):
        add_program(home / "launch", name, (LAUNCH / name).read_text())
    program = '#!/usr/bin/env bash\ntrap "echo saved; exit 143" TERM\necho "started: $*"\n'
    program += 'until [[ -f go ]]; do sleep 0.05; done\nexit "$(cat go)"\n'
    add_program(home / ".venv/bin", "vlmprune", program)

    def start(*arguments):
        command = ["bash", home / "launch/worker.sh", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start, home


def test_a_worker_outlives_its_connection_and_is_not_started_twice(worker):
    start, home = worker
    with start("run", "recover", "--a=two words") as first:
        assert first.stdout.readline() == "started: recover --a=two words\n"
        first.kill()
    second = start("run", "recover", "--a=two words")
    other = start("run", "score")
    assert "'recover --a=two words' is running here: stop it first" in other.communicate(timeout=HANG)[0]
    assert other.returncode == 2
    (home / "go").write_text("7")
    assert second.communicate(timeout=HANG)[0] == "started: recover --a=two words\n"
    assert second.returncode == 7


def test_a_stopped_worker_saves_and_starts_again(worker):
    start, home = worker
    running = start("run", "recover")
    assert running.stdout.readline() == "started: recover\n"
    assert start("stop").communicate(timeout=HANG)[0] == ""
    assert running.communicate(timeout=HANG)[0].endswith("saved\n")
    assert running.returncode == 143
    (home / "go").write_text("0")
    again = start("run", "recover")
    again.communicate(timeout=HANG)
    assert again.returncode == 0
    assert (home / "run.log").read_text().count("started: recover") == 2
