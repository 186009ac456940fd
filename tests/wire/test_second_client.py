"""A second client while one is attached: accepted and refused at once."""

from __future__ import annotations

import os

import pytest

from vpci.vfu.client import Client, ServerError, ServerGone


def test_a_second_client_is_refused_at_once_and_the_first_goes_on(serve):
    server = serve()
    with server.client() as first:
        first.device_info()
        with pytest.raises((ServerGone, ServerError)):
            Client(server.path, timeout=3)
        refusal = server.wait_event(lambda event: event["event"] == "client_refused")
        assert refusal["holder"] == os.getpid()
        assert first.device_info().num_regions == 9
    with server.client() as third:
        assert third.device_info().num_regions == 9


def test_a_hundred_refusals_cost_the_first_nothing(client, disk_server):
    for _ in range(100):
        with pytest.raises((ServerGone, ServerError)):
            Client(disk_server.path, timeout=3)
    assert client.device_info().num_regions == 9
