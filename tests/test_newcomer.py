"""Somebody who has only the address: a client that learns the contract by reflection gets a spoken answer."""

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.running import running

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]


def test_a_client_that_knows_nothing_but_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMIA_REFLECTION", "true")
    with running("--fake") as service, grpc.insecure_channel(service.address) as channel:
        known = ProtoReflectionDescriptorDatabase(channel)
        assert "kimia.v1.KimiAudio" in known.get_services()
        method = DescriptorPool(known).FindServiceByName("kimia.v1.KimiAudio").methods_by_name["Generate"]
        Request, Response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = channel.unary_stream(
            "/kimia.v1.KimiAudio/Generate", Request.SerializeToString, Response.FromString, _registered_method=False
        )
        asked = Request(messages=[{"role": "ROLE_USER", "text": {"text": "Good morning"}}])
        asked.options.max_new_tokens = 40
        events = [response.event for response in call(asked, timeout=60)]
    kinds = [event.WhichOneof("content") for event in events]
    assert (kinds[0], kinds[-1]) == ("started", "done")
    assert {"text", "audio"} <= set(kinds)
    assert sum(len(event.audio.data) for event in events) == 2 * events[-1].done.usage.audio_samples > 0
