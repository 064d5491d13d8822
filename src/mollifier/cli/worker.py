"""`mollifier worker`: executes runs and drains the buffer."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from mollifier.cli.logs import LogFile, start_log


def worker(log_file: LogFile = None) -> None:
    """Run a worker: it executes runs, and drains the buffer.

    Start as many as the work takes, beside `serve`. MOLLIFIER_TASKS names the modules whose functions are the tasks, of this folder or
    installed ones; they are recorded when the worker starts, and can be triggered from then on. Any worker may be given any run, so all
    of them need all tasks: a run whose task its worker does not have fails. Draining follows MOLLIFIER_ENABLED unless MOLLIFIER_DRAINER_ENABLED says
    otherwise. A server that is away is waited for. MOLLIFIER_WORKER_METRICS_PORT shows the worker's metrics to Prometheus.

    Stops on SIGTERM or Ctrl-C, once the work in hand is done or MOLLIFIER_DRAIN_SHUTDOWN_TIMEOUT_MS has passed. The log is JSON lines.

    For example:

        $ MOLLIFIER_TASKS=myapp.tasks mollifier worker
        $ MOLLIFIER_TASKS=myapp.tasks,myapp.reports mollifier worker --log-file worker.log
    """
    import uvloop

    # The console script's path begins with the folder that it is in; modules of tasks are looked for where the worker is started.
    sys.path.insert(0, str(Path.cwd()))

    from mollifier import config
    from mollifier.observability import configure_telemetry
    from mollifier.telemetry import Telemetry
    from mollifier.worker import run_worker_process

    start_log(log_file)
    settings = config.load()
    observability = configure_telemetry("mollifier-worker")
    telemetry = Telemetry(observability.meter_provider, observability.tracer_provider)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(
                run_worker_process(
                    settings,
                    telemetry=telemetry,
                    tracer_provider=observability.tracer_provider,
                    registry=observability.registry,
                )
            )
    finally:
        observability.shutdown()
