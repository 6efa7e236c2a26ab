"""Both backends tell the same facts, and the type that says so leaves none out."""

from __future__ import annotations

import json

from eagle_target import RemoteEagle3TargetModel, RunnerEagle3TargetModel
from eagle_target.contract.model_info import ModelInfo, ServerState, TrafficTotals
from eagle_target.contract.target import TargetInfo
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import EmbeddingRunner

REMOTE = {"servers", "traffic", "bytes_per_token"}


def test_both_backends_tell_what_the_type_says() -> None:
    with RunnerEagle3TargetModel(EmbeddingRunner(), encoding="logits") as target:
        here = target.model_info()
    with (
        loopback_server(EmbeddingRunner) as server,
        RemoteEagle3TargetModel.from_urls([server.url], encoding="logits") as remote,
    ):
        there = remote.model_info()

    names = {*ModelInfo.__annotations__}
    assert {*TargetInfo.model_fields} <= names
    assert {*here} == names - REMOTE
    assert {*there} == names - {"transport"}
    assert {*there["servers"][0]} == {*ServerState.__annotations__}
    assert {*there["traffic"]} == {*TrafficTotals.__annotations__}
    shared = names - REMOTE - {"transport"}
    assert {name: value for name, value in here.items() if name in shared} == {
        name: value for name, value in there.items() if name in shared
    }
    assert json.loads(json.dumps(there)) == there
