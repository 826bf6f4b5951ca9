import json
import os
import subprocess
import sys

from conftest import _free_ports

JOIN = "from mlx_openelm.commands.processes import join_processes; join_processes(patience_seconds=0.2)"


def test_a_process_that_waits_says_where_the_others_should_be(tmp_path):
    first = _free_ports(2)
    hosts = [[f"127.0.0.1:{first}"], [f"127.0.0.1:{first + 1}"]]
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    process = subprocess.Popen(
        [sys.executable, "-c", JOIN],
        env={**os.environ, "MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts.json")},
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    while "have" not in said and "has been waiting" not in said:
        said = process.stderr.readline()
        assert said
    process.kill()
    process.communicate(timeout=30)  # the watch ends with the process that it watches
    assert said == (
        "openelm-mlx: process 0 has been waiting 0.2 seconds for the other processes; expected at "
        f"127.0.0.1:{first}, 127.0.0.1:{first + 1}\n"
    )


def test_a_process_alone_waits_for_nobody():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    done = subprocess.run([sys.executable, "-c", JOIN], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
