"""Nodes upload their payload once where the coordinator has room for the copies."""

from __future__ import annotations

import pytest

from thinwire.node.bench.upload import NARROW, WIDE, measure_upload


@pytest.mark.swarm
@pytest.mark.usefixtures("own_temp_folder")
def test_a_payload_leaves_a_node_once_or_for_all_others() -> None:
    once = measure_upload(4, 2, WIDE)
    assert 1.0 <= once["payloads_up"] <= once["payloads_up_at_most"] < 1.1
    assert once["payloads_of_coordinator"] >= 12
    shared = measure_upload(4, 2, NARROW)
    # One to the coordinator and three to the others.
    assert 3.0 < shared["payloads_up"] < 4.1
