"""The test suite on the newest and oldest supported TensorFlow and Keras, and on newer ones."""

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


# pip says that the newer versions are not asked for, and installs them: that is the point.
@nox.session(python=_python())
def tests_uncapped(session: nox.Session) -> None:
    session.install("--editable", ".[test]")
    session.install("--upgrade", "tensorflow", "keras")
    session.run("python", "-m", "pytest", *session.posargs)
