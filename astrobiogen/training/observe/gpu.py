"""Statistics of each NVIDIA card through NVML: utilisation, memory, power, temperature."""

import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

_LOG = logging.getLogger("astrobiogen")
Cards = dict[str, dict[str, float]]


class Nvml:
    """Readings of every card that the driver shows. `library` is the module `pynvml` (package nvidia-ml-py).

    Raises:
        library.NVMLError: there is no driver.
    """

    def __init__(self, library: Any) -> None:
        self.library = library
        library.nvmlInit()
        count = library.nvmlDeviceGetCount()
        self._handles = [library.nvmlDeviceGetHandleByIndex(number) for number in range(count)]

    def names(self) -> list[str]:
        """Product name of each card."""
        found = [self.library.nvmlDeviceGetName(handle) for handle in self._handles]
        return [name.decode() if isinstance(name, bytes) else str(name) for name in found]

    def read(self) -> Cards:
        """Card number -> utilisation and memory traffic in percent, memory in MiB, power in W, temperature in °C; what
        a card does not tell is left out.
        """
        return {str(number): self._card(handle) for number, handle in enumerate(self._handles)}

    def _card(self, handle: Any) -> dict[str, float]:
        library, values = self.library, {}

        def add(read: Callable[[], dict[str, float]]) -> None:
            try:
                values.update(read())
            except library.NVMLError_NotSupported:
                return  # e.g. power on some laptops: the value is then not there

        def utilisation() -> dict[str, float]:
            rates = library.nvmlDeviceGetUtilizationRates(handle)
            return {"utilisation_percent": float(rates.gpu), "memory_traffic_percent": float(rates.memory)}

        def memory() -> dict[str, float]:
            info = library.nvmlDeviceGetMemoryInfo(handle)
            return {"memory_used_mib": info.used / 2**20, "memory_total_mib": info.total / 2**20}

        add(utilisation)
        add(memory)
        add(lambda: {"power_watts": library.nvmlDeviceGetPowerUsage(handle) / 1000.0})
        sensor = library.NVML_TEMPERATURE_GPU
        add(lambda: {"temperature_celsius": float(library.nvmlDeviceGetTemperature(handle, sensor))})
        return values

    def close(self) -> None:
        """Release the driver."""
        self.library.nvmlShutdown()


class GpuSampler:
    """Reads every card each `seconds` in a thread of its own and hands the readings to `sink`; a context manager.

    Args:
        library: the NVML module; default: `pynvml`, if it is installed.
    """

    def __init__(
        self, device: torch.device, seconds: float, sink: Callable[[Cards], None], library: Any = None
    ) -> None:
        self._device = device
        self._seconds = seconds
        self._sink = sink
        self._library = library
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _open(self) -> Nvml | None:
        """NVML, or None with one line that says why there is none."""
        if self._seconds == 0:
            _LOG.info("GPU statistics: switched off (monitor.gpu_seconds 0)")
            return None
        if self._device.type != "cuda":
            _LOG.info("GPU statistics: none, the run is on the %s", self._device.type)
            return None
        try:
            library = self._library or importlib.import_module("pynvml")
        except ImportError:
            _LOG.warning("GPU statistics: none, nvidia-ml-py is not installed (pip install 'astrobiogen[gpu]')")
            return None
        try:
            nvml = Nvml(library)
        except library.NVMLError as error:
            _LOG.warning("GPU statistics: none, NVML does not start (%s)", error)
            return None
        _LOG.info("GPU statistics: every %g s of %s", self._seconds, ", ".join(nvml.names()))
        return nvml

    def __enter__(self) -> "GpuSampler":
        nvml = self._open()
        if nvml is not None:
            self._thread = threading.Thread(target=self._run, args=(nvml,), name="gpu statistics", daemon=True)
            self._thread.start()
        return self

    def _run(self, nvml: Nvml) -> None:
        library = nvml.library
        try:
            while True:
                self._sink(nvml.read())
                if self._stop.wait(self._seconds):
                    return
        except library.NVMLError as error:  # e.g. the card fell off the bus; training will notice by itself
            _LOG.warning("GPU statistics: ended, NVML says %s", error)
        finally:
            nvml.close()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10.0)
