"""The test suite on the newest and on the oldest supported TensorFlow and Keras."""

import shutil
import subprocess

import nox

nox.options.sessions = ["tests_newest", "tests_oldest"]


def _python() -> str | None:
    """Python 3.11, which every supported TensorFlow and Keras runs on, else nox's own Python."""
    python = shutil.which("python3.11")
    # A version manager may put a name on the path that does not run.
    if python and subprocess.run([python, "--version"], capture_output=True).returncode == 0:
        return python
    return None


def _tests(session: nox.Session, *versions: str) -> None:
    # Editable, so that no build/ folder is left behind to go stale.
    session.install("--editable", ".[test]", *versions)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=_python())
def tests_newest(session: nox.Session) -> None:
    _tests(session)


# TensorFlow 2.16 itself asks for numpy<2.
@nox.session(python=_python())
def tests_oldest(session: nox.Session) -> None:
    _tests(session, "tensorflow==2.16.*", "keras==3.8.*")
