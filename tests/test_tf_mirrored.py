"""MirroredStrategy over two virtual CPU devices equals one device with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_two_replicas_equal_one_device(tmp_path):
    """In a process of its own: devices are configured before TensorFlow starts, and strategies do not mix."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(HERE / "mirrored_tf.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused = "SMART: record= needs one device, and this MirroredStrategy has 2."
    assert done.stdout.strip().splitlines()[-1].startswith(f"equal, and {refused}")
