"""The same study on two worker processes, one of which is killed in the middle."""

import logging
import os
import signal
import threading
import time

import pandas as pd
import pytest

from medrobust_lib.studies.execute import LEADERBOARD, run_study
from medrobust_lib.studies.study_file import read_study

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL
    ) as local:
        yield local


@pytest.fixture
def study(study_file):
    return read_study(study_file())


def test_a_worker_killed_in_the_midst_of_a_study_changes_nothing(cluster, study, tmp_path, undisturbed):
    out = tmp_path / "out"
    before = {worker.pid for worker in cluster.workers.values()}
    killed = []

    def kill_one_at_work():
        # Its store appears when a worker has begun to certify.
        while not any(out.glob("cells/01*/store/journal.jsonl")):
            time.sleep(0.005)
        killed.append(min(before))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one_at_work, daemon=True)
    killer.start()
    finished = run_study(study, out, cluster=cluster.scheduler_address, announce=lambda line: None)
    killer.join(timeout=10)
    assert killed, "the worker was killed while the study ran"
    assert killed[0] not in {worker.pid for worker in cluster.workers.values()}
    assert (finished.done, finished.failures) == (3, {})
    without_git = [pd.read_csv(f / LEADERBOARD).drop(columns=["commit", "changed"]) for f in (out, undisturbed)]
    pd.testing.assert_frame_equal(*without_git)
    assert (out / "table.csv").read_bytes() == (undisturbed / "table.csv").read_bytes()
    again = run_study(study, out, cluster=cluster.scheduler_address, announce=lambda line: None)
    assert again.done == 3, "the same command, when nothing is left to do"


def test_workers_that_do_not_see_the_folder_are_refused_before_anything_runs(cluster, study, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "distributed.Client.run", lambda self, *_: {"tcp://10.0.0.7:1": True, "tcp://10.0.0.8:1": False}
    )
    with pytest.raises(
        ValueError, match=r"1 workers do not see the folder .*out \(tcp://10.0.0.8:1\).*--out on a file"
    ):
        run_study(study, tmp_path / "out", cluster=cluster.scheduler_address, announce=lambda line: None)
    assert not (tmp_path / "out" / "cells").exists()


def test_a_slurm_job_starts_a_worker_with_one_thread():
    from dask_jobqueue import SLURMCluster

    cluster = SLURMCluster(
        queue="cpu",
        cores=1,
        processes=1,
        job_cpu=4,
        memory="8GB",
        walltime="08:00:00",
        job_script_prologue=["export OMP_NUM_THREADS=4"],
        scheduler_options={"dashboard_address": None, "port": 0},
    )
    with cluster:
        script = cluster.job_script()
    for line in ("#SBATCH -p cpu", "#SBATCH --cpus-per-task=4", "#SBATCH --mem=8G", "#SBATCH -t 08:00:00"):
        assert line in script
    assert script.index("export OMP_NUM_THREADS=4") < script.index("--nthreads 1")


LEARNING = """
models: [demo-clip]
datasets: [phantom/chest]
n_images: 3
steps:
  - adapt: {name: adapted, fraction: 0.02, rank: 2, epochs: 8, n_val: 9, learning_rate: 2e-3}
  - benchmark: {models: [demo-clip, adapted], severities: [5]}
  - certify: {models: [adapted], sigmas: [0.1], n0: 2, n: 8, alpha: 0.05, methods: [{CoOp: {shots: 1, epochs: 2}}]}
"""


@pytest.mark.filterwarnings("ignore")
def test_a_worker_killed_while_a_model_is_adapted_changes_no_table(cluster, study_file, tmp_path):
    study, killed = read_study(study_file(LEARNING)), []
    run_study(study, tmp_path / "alone", announce=lambda line: None)

    def kill_the_one_that_trains():
        log = tmp_path / "out" / "cells"
        while not any(log.glob("01*/adapter.training/*")):
            time.sleep(0.005)
        killed.extend(worker.pid for worker in cluster.workers.values())
        os.kill(killed[0], signal.SIGKILL)
        os.kill(killed[1], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_one_that_trains, daemon=True)
    killer.start()
    finished = run_study(study, tmp_path / "out", cluster=cluster.scheduler_address, announce=lambda line: None)
    killer.join(timeout=10)
    assert killed and (finished.done, finished.failures) == (4, {})
    for path in sorted((tmp_path / "alone").glob("cells/*/cards/*.csv")):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "alone")).read_bytes() == path.read_bytes()
