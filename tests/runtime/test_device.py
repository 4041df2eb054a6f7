"""Devices by name, and the errors that the simulated device detects, on which the exactness tests rely."""

import pytest
import torch

from surfw.errors import ConfigurationError
from surfw.runtime import exponents
from surfw.runtime.device import check_device, open_device
from surfw.runtime.simulated import SimulatedDevice


def test_devices_by_name() -> None:
    assert [check_device(name) for name in ("cpu", "auto", torch.device("cuda:1"))] == ["cpu", "auto", "cuda:1"]
    assert open_device("cpu") is None
    with pytest.raises(ConfigurationError, match="device 'mps' cannot be used yet; expected 'cpu', 'cuda' or 'auto'"):
        check_device("mps")
    with pytest.raises(ConfigurationError, match="device 'cuda:0,cuda:1' names several, and a model computes on one"):
        check_device("cuda:0,cuda:1")
    with pytest.raises(ConfigurationError, match="device 'tpu' is not a device; expected 'cpu', 'cuda', 'cuda:1'"):
        check_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_auto_is_the_cpu_and_cuda_an_error() -> None:
    assert open_device("auto") is None
    with pytest.raises(ConfigurationError, match=r"device 'cuda:1' cannot be used: torch .* sees no CUDA device"):
        open_device("cuda:1")


def test_memory_is_garbage_until_its_copy_was_waited_for_and_then_kept_from_others() -> None:
    device = SimulatedDevice(latest_seconds=60)
    try:
        memory, source = device.allocate(8), torch.arange(8, dtype=torch.uint8)
        copied = device.copy(memory, source)
        assert memory.view(torch.float32).isnan().all()
        assert not copied.query()
        stream = device.wait(copied)
        assert torch.equal(memory, source)
        with pytest.raises(AssertionError, match="does not wait for those who read"):
            device.copy(memory, source)
        device.wait_for_computing(stream)
        device.copy(memory, source).synchronize()
    finally:
        device.close()


def test_what_is_decoded_is_kept_from_the_next_copy_until_that_waits() -> None:
    device = SimulatedDevice(latest_seconds=60)
    try:
        words = torch.randn(2048).to(torch.bfloat16).view(torch.int16)
        coded = torch.zeros(exponents.room_bytes(2048), dtype=torch.uint8)
        piece = exponents.encode(words, 0, coded)
        assert piece is not None
        stage, memory = device.allocate(len(coded)), device.allocate(2 * 2048)
        device.copy(stage, coded)
        decoded = device.decode(stage, piece, memory.view(torch.int16))
        with pytest.raises(AssertionError, match="does not wait for what is decoded with its memory"):
            device.copy(stage, coded)
        device.wait_for_decoding(decoded)
        device.copy(stage, coded)
        assert memory.view(torch.bfloat16).isnan().all(), "nothing has come yet"
        stream = device.wait(decoded)
        assert torch.equal(memory.view(torch.int16), words)
        with pytest.raises(AssertionError, match="does not wait for those who read"):
            device.decode(stage, piece, memory.view(torch.int16))
        device.wait_for_computing(stream)
        device.decode(stage, piece, memory.view(torch.int16)).synchronize()
    finally:
        device.close()
