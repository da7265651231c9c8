"""A container engine, found or installed, and what builds and runs need on a machine that grants little.

docker is used where its engine answers, podman otherwise.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

ROOT = Path(__file__).parents[1]
STAND_IN = "localhost/vllm-spectral-base:bookworm"
"""What stands in for the official Python image where no image registry is within reach."""
DEBIAN = ("podman", "runc", "netavark", "aardvark-dns", "debootstrap")
_PIP_PATHS = ("find-links", "extra-index-url", "index-url", "constraint", "cert")


class MissingToolError(RuntimeError):
    """Something that the job needs is not on this machine; the message says how to get it."""


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"-- {text}", flush=True)


def concluded(work: Callable[[], str]) -> int:
    """Do a command's work and say its figures; the exit code: 0, 1 if something does not hold, 2 if something is missing."""
    try:
        say(work())
    except MissingToolError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (AssertionError, RuntimeError) as error:
        sys.stderr.write(f"FAILED: {error}\n")
        return 1
    return 0


def install(*packages: str, why: str) -> None:
    """Install Debian packages, if we may.

    Raises:
        MissingToolError: if we may not, or it fails.
    """
    line = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.getuid() or not shutil.which("apt-get"):
        raise MissingToolError(f"{why}. As root on Debian or Ubuntu: {line}")
    say(f"{why}: {line}")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "-qq", "update"], check=False, env=environment, **quiet)
    done = subprocess.run(["apt-get", "-qq", "-y", *line.split()[1:]], check=False, env=environment, **quiet)
    if done.returncode:
        raise MissingToolError(f"{line} failed: {done.stderr.strip()[-500:]}")


class Engine:
    """docker or podman, behind the part of their command lines that is the same.

    Args:
        name: ``docker`` or ``podman``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._podman = name == "podman"
        if self._podman and not Path("/run/systemd/system").exists():
            os.environ["CONTAINERS_CONF"] = str(ROOT / "deploy" / "containers.conf")

    def call(self, *argv: str, check: bool = True, show: bool = False) -> str:
        """Run a command of the engine; its standard output.

        Args:
            argv: the command.
            check: raise if it fails.
            show: let the output through instead.

        Raises:
            RuntimeError: if it fails; the message holds the end of what it wrote.
        """
        full = [self.name, *argv]
        done = subprocess.run(full, check=False, text=True, stdout=None if show else subprocess.PIPE,
                              stderr=None if show else subprocess.PIPE)  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(full)}: exit status {done.returncode}\n{(done.stderr or '')[-4000:]}")
        return (done.stdout or "").strip()

    def has(self, image: str) -> bool:
        """Whether there is such an image here."""
        return bool(self.call("images", "-q", image, check=False))

    def build(self, dockerfile: Path, tag: str, arguments: dict[str, str], *, verbose: bool = False) -> None:
        """Build an image from the checkout, with this machine's pip configuration as a secret.

        Args:
            dockerfile: which one.
            tag: name of the image.
            arguments: build arguments.
            verbose: show what the engine writes.
        """
        flags = ["--network", "host"]
        if self._podman:
            flags += ["--isolation", "chroot", "--format", "docker", "--layers"]
        with pip_configuration() as (configuration, folders):
            flags += ["--secret", f"id=pip,src={configuration}"]
            if self._podman:  # docker's builder mounts nothing of the machine
                flags += [part for folder in folders for part in ("--volume", f"{folder}:{folder}:ro")]
            for name, value in arguments.items():
                flags += ["--build-arg", f"{name}={value}"]
            self.call("build", *flags, "--file", str(dockerfile), "--tag", tag, str(ROOT), show=verbose)

    def can_pull(self, image: str) -> bool:
        """Whether an image is here, or could be pulled just now."""
        if self.has(image):
            return True
        try:
            self.call("pull", "--quiet", image)
        except RuntimeError:
            return False
        return True

    def obtain(self, wanted: str, instead: Path, tag: str) -> str:
        """A public image where it can be pulled, else one that is built in its place.

        Args:
            wanted: the public image.
            instead: Dockerfile of the other, on :data:`STAND_IN`.
            tag: name of the other.

        Returns:
            The name of what is there now.
        """
        if self.can_pull(wanted):
            return wanted
        say(f"{wanted} cannot be pulled: {instead.name} stands in for it")
        self.build(instead, tag, {"BASE_IMAGE": self.base(wanted)})
        return tag

    def base(self, wanted: str) -> str:
        """An image to build on: the wanted one where it can be had, else :data:`STAND_IN`, made from Debian's packages.

        Raises:
            MissingToolError: if neither can be had.
        """
        if self.has(STAND_IN) and not self.has(wanted):
            return STAND_IN
        if self.can_pull(wanted):
            return wanted
        say(f"{wanted} cannot be pulled: Debian 12 with its Python 3.11, made by debootstrap, stands in for it")
        _bootstrap(self, wanted)
        return STAND_IN

    def start(self, name: str, flags: Sequence[str], image: str, *argv: str) -> None:
        """Start a container in the background; one of that name that is left over goes first."""
        self.remove(name)
        self.call("run", "--detach", "--name", name, *flags, image, *argv)

    def once(self, flags: Sequence[str], image: str, *argv: str) -> str:
        """Run a container to its end; its standard output."""
        return self.call("run", "--rm", *flags, image, *argv)

    def remove(self, name: str) -> None:
        """Remove a container and its anonymous volumes, whatever its state."""
        self.call("rm", "--force", "--volumes", name, check=False)

    def inspect(self, what: str) -> dict[str, Any]:
        """What the engine knows of an image or a container."""
        known: list[dict[str, Any]] = json.loads(self.call("inspect", what))
        return known[0]

    def logs(self, name: str) -> str:
        """What a container wrote, both streams."""
        done = subprocess.run(
            [self.name, "logs", name],
            check=False,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.stdout


def find_engine() -> Engine:
    """Docker if its engine answers, else podman, installed if need be.

    Raises:
        MissingToolError: if there is neither and we may not install one.
    """
    if shutil.which("docker") and not subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        return Engine("docker")
    if not shutil.which("podman") or not shutil.which("runc") or not Path("/usr/lib/podman/netavark").exists():
        install(*DEBIAN, why="no docker engine answers, and podman is not here or not complete")
    return Engine("podman")


def _bootstrap(engine: Engine, wanted: str) -> None:
    if os.getuid():
        raise MissingToolError(
            f"{wanted} cannot be pulled, and making a base image from Debian's packages takes root: name one that is here "
            "with --base"
        )
    if not shutil.which("debootstrap"):
        install("debootstrap", why=f"{wanted} cannot be pulled")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        packages = "--include=python3,python3-venv,ca-certificates"
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", packages, "bookworm", str(root)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise MissingToolError(f"debootstrap failed: {done.stdout[-800:]}")
        # Certificates of this machine's own, as an organisation's base image would bring them.
        certificates = Path("/etc/ssl/certs/ca-certificates.crt")
        if certificates.exists():
            shutil.copy(certificates, root / certificates.relative_to("/"))
        archive = Path(folder) / "root.tar"
        subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
        engine.call("import", str(archive), STAND_IN)


@contextmanager
def pip_configuration() -> Iterator[tuple[Path, list[Path]]]:
    """This machine's pip configuration as one file, and the files and folders that it names."""
    settings, folders = pip_settings()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pip.conf"
        path.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
        yield path, folders


@functools.cache
def pip_settings() -> tuple[dict[str, str], list[Path]]:
    """Settings of pip's command line here, environment over files, and the local paths among them."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, str] = {}
    for prefix in ("global.", "install.", ":env:."):
        for line in listed.stdout.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(prefix):
                settings[key.removeprefix(prefix)] = " ".join(value.strip("'\"").replace("\\n", " ").split())
    local = {Path(urlparse(part).path) for key in _PIP_PATHS for part in settings.get(key, "").split()
             if urlparse(part).scheme in ("", "file")}  # fmt: skip
    # An index links to files beside it. Certificates come with the base image.
    folders = {path if path.is_dir() and path.name != "simple" else path.parent for path in local if path.exists()}
    return settings, sorted(folders - {Path("/etc/ssl/certs")})
