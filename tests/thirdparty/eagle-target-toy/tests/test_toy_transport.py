"""The toy transport passes the suite. Its files outlive the server's process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from eagle_target_toy.transport import ToyFileOptions, ToyFileTransport

from eagle_target.plugins import ConnectError
from eagle_target.testing import MemoryControl, TransportConformance

if TYPE_CHECKING:
    from pathlib import Path

# A server that is killed leaves its files here.
FOLDER = tempfile.mkdtemp(prefix="eagle-target-toy-tests-")
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


class TestToyFileTransport(TransportConformance):
    transport = ToyFileTransport
    options: ClassVar[dict[str, Any]] = {"folder": FOLDER}
    survives_peer_death = True


def test_a_client_that_does_not_see_the_folder_is_refused(tmp_path: Path) -> None:
    endpoint = ToyFileTransport.listen(ToyFileOptions(folder=tmp_path))
    offer = {**endpoint.offer(), "root": str(tmp_path / "elsewhere")}

    with pytest.raises(ConnectError, match="does not see the server's folder"):
        ToyFileTransport.connect(ToyFileOptions(), offer, MemoryControl(endpoint))
    endpoint.close()
    assert not any(tmp_path.iterdir())
