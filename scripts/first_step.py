"""A scheduler that writes down when it first schedules a request: `vllm serve --scheduler-cls`.

Nothing but the writing of one line per request is added to vLLM's own.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput

PATH_VARIABLE = "FIRST_STEPS_FILE"
"""Environment variable: the file that lines go to."""
CLASS = "first_step.FirstStepScheduler"
"""What `--scheduler-cls` is given, with this folder on `PYTHONPATH`."""


class FirstStepScheduler(AsyncScheduler):
    """Writes the time at which the step is planned that computes a request's first tokens.

    A line is `time.monotonic_ns()`, which all processes of a machine share, and the request's id.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._path = Path(os.environ[PATH_VARIABLE])

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Plan a step."""
        output = super().schedule(*args, **kwargs)
        if output.scheduled_new_reqs:
            now = time.monotonic_ns()
            with self._path.open("a") as file:
                file.writelines(f"{now} {new.req_id}\n" for new in output.scheduled_new_reqs)
        return output


def first_steps(path: Path) -> list[float]:
    """The times in a file, in seconds of `time.monotonic()`, in order."""
    if not path.exists():
        return []
    return [int(line.split()[0]) / 1e9 for line in path.read_text().splitlines()]
