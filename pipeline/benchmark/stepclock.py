"""StepClock: times a contender's training steps after a warm-up."""

import time
from typing import Any

import torch

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the dtypes of mixed precisions


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished all submitted work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class StepClock:
    """Counts steps; runs from the end of the warm-up until `seconds` have passed or `num_steps` steps have ended.

    waited: seconds of that time in which the loop waited for data, see waiting.py.
    """

    def __init__(self, device: torch.device, *, warmup_steps: int, seconds: float, num_steps: int | None = None):
        """warmup_steps: 1 or more; num_steps: replaces seconds, for processes that must stop at the same step."""
        self.device, self.warmup_steps, self.seconds, self.num_steps = device, warmup_steps, seconds, num_steps
        self.steps = self.images = 0
        self.began = self.elapsed = self.waited = self.first_step_at = 0.0

    @property
    def is_running(self) -> bool:
        return self.steps >= self.warmup_steps and not self.elapsed

    def step(self, num_images: int) -> bool:
        """Counts a finished step of `num_images` images; returns whether the clock has ended."""
        self.steps += 1
        if self.steps == 1:
            wait_for(self.device)
            self.first_step_at = time.time()
        if self.steps == self.warmup_steps:
            wait_for(self.device)
            self.began = time.perf_counter()
        elif self.steps > self.warmup_steps:
            self.images += num_images
            timed = self.steps - self.warmup_steps
            is_over = timed >= self.num_steps if self.num_steps else time.perf_counter() - self.began >= self.seconds
            if is_over:
                wait_for(self.device)
                self.elapsed = time.perf_counter() - self.began
        return self.elapsed > 0

    def figures(self) -> dict[str, Any]:
        """images_per_second, step_ms (the mean), wait_fraction, first_step_at (seconds since 1970), device, threads."""
        timed = self.steps - self.warmup_steps
        on_gpu = self.device.type == "cuda"
        return {
            "images_per_second": self.images / self.elapsed,
            "step_ms": 1000 * self.elapsed / timed,
            "steps": timed,
            "wait_fraction": self.waited / self.elapsed,
            "first_step_at": self.first_step_at,
            "device": device_name(self.device),
            "gpu_memory_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            "threads": torch.get_num_threads(),
        }
