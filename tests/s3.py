"""A real S3 server on this machine (moto's), in a process of its own; `s3` is its fixture."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from torch.distributed.elastic.utils.distributed import get_free_port


@dataclass
class Bucket:
    """A bucket of the server: objects by their names."""

    process: subprocess.Popen
    endpoint: str
    url: str = "s3://bucket"

    def upload(self, folder: Path) -> str:
        """The URL of a copy of a folder."""
        url = f"{self.url}/{time.monotonic_ns()}/{folder.name}"
        for file in folder.iterdir():
            self.write(f"{url}/{file.name}", file.read_bytes())
        return url

    def write(self, url: str, content: bytes) -> None:
        with fsspec.open(url, "wb") as file:
            file.write(content)

    def read(self, url: str) -> bytes:
        with fsspec.open(url, "rb") as file:
            return file.read()

    def remove(self, url: str) -> None:
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.rm(path)

    def deny(self, yes: bool) -> None:
        """Ask for permissions, which nobody has here."""
        answered = 0 if yes else 1 << 30  # requests before it does
        header = {"Content-Type": "text/plain"}
        urllib.request.urlopen(
            urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", str(answered).encode(), header)
        ).close()

    def hang(self, yes: bool) -> None:
        self.process.send_signal(signal.SIGSTOP if yes else signal.SIGCONT)


@pytest.fixture(scope="module")
def s3() -> Iterator[Bucket]:
    """An empty bucket; AWS_* variables tell clients of the server."""
    port = get_free_port()
    command = [sys.executable, "-c", "import sys; from moto.server import main; main(sys.argv[1:])", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    variables = {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setitem(os.environ, name, value)
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.1)
        bucket = Bucket(process, endpoint)
        filesystem, path = fsspec.core.url_to_fs(bucket.url)
        filesystem.clear_instance_cache()  # of another module's server
        fsspec.core.url_to_fs(bucket.url)[0].mkdir(path)
        yield bucket
    process.kill()
    process.wait()
