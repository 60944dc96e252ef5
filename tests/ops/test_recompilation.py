"""A user's next batch size waits for no compiler."""

import os
import subprocess
import sys
from pathlib import Path


def test_no_kernel_is_compiled_again_for_another_batch_size():
    """By Triton's own rules on divisible and constant arguments. The second stream's statistics once were compiled twice."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compilations"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == [""]
