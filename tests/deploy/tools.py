"""The programs that check the files of a deployment, from where the test's packages put them."""

import subprocess
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run(program: str, *arguments: str | Path) -> str:
    """What `program` prints; where it fails, what it complains about is the test's message."""
    path = Path(sysconfig.get_path("scripts"), program)
    done = subprocess.run([path, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, f"{program} {arguments}:\n{done.stdout}{done.stderr}"
    return done.stdout
